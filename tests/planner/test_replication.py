"""Planted replicated arguments and activations are found; well-sharded ones give no alarm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.planner.replication import replicated_arguments
from tests.forced_devices import on_eight_cpu_devices
from tests.planner.meshes import tpu_mesh
from tests.planner.planted_replication import FAULTS, ROWS, TOKENS, WIDTH, found

# --- activations ------------------------------------------------------------------------------------------------------

_AXES = {
    "everything": {("fsdp", "context")},
    "rows": {("fsdp",)},
    "tokens": {("context",)},
}


@pytest.fixture(scope="module")
def on_cpu():
    return on_eight_cpu_devices("tests.planner.planted_replication", "2")


def _check(fault, rows):
    """Rows of JSON or objects alike, as dicts."""
    if fault in ("clean", "tokens in attention"):
        assert rows == []
        return
    assert {tuple(row["axes"]) for row in rows} == _AXES[fault]
    assert any("planted_replication.py:" in row["line"] for row in rows)
    whole = ROWS * TOKENS * WIDTH * 4
    pieces = {"everything": 1, "rows": 2, "tokens": 4}[fault]
    assert rows[0]["bytes"] == whole // pieces
    assert any("mlp" in row["name"] for row in rows)


@pytest.mark.parametrize("fault", FAULTS)
def test_on_cpu(on_cpu, fault):
    _check(fault, on_cpu[fault])


@pytest.mark.parametrize("target", ["v5e:2x4", "v5p:2x2x2"])
@pytest.mark.parametrize("fault", FAULTS)
def test_on_tpu(target, fault):
    _check(fault, [row.to_json() for row in found(fault, tpu_mesh(target, context=2))])


@pytest.mark.parametrize(("fault", "count"), [("clean", 0), ("rows", 1)])
def test_without_context(fault, count):
    rows = found(fault, tpu_mesh("v5e:2x4"))
    assert min(1, len(rows)) == count
    assert {row.axes for row in rows} <= {("fsdp",)}


# --- arguments ------------------------------------------------------------------------------------------------------


def _leaf(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_arguments():
    mesh = tpu_mesh("v5e:2x4", data=2, context=2)  # fsdp 2
    tree = {
        "cut": _leaf(mesh, (1024, 1024), ("fsdp", "context")),
        "half": _leaf(mesh, (1024, 1024), "fsdp"),
        "whole": _leaf(mesh, (1024, 2048)),
        "small": _leaf(mesh, (1024,)),
        "odd": _leaf(mesh, (1023, 1025)),
    }
    rows = replicated_arguments(tree)
    assert [(row.name, row.bytes, row.axes) for row in rows] == [
        ("whole", 8 * 2**20, ("fsdp", "context")),
        ("half", 2 * 2**20, ("context",)),
    ]
    assert rows[1].shape == "float32[512,1024]"


def test_copies_over_data_are_wanted_for_parameters_not_for_a_batch():
    mesh = tpu_mesh("v5e:2x4", data=8)
    leaf = {"x": _leaf(mesh, (1024, 1024))}
    assert replicated_arguments(leaf) == ()
    assert [row.axes for row in replicated_arguments(leaf, by_design=())] == [("data",)]
