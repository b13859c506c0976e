"""Meshes that fit, and those that are refused in one line with what would fit."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from intttrain.config import MeshConfig, default_config, resolve
from intttrain.config.errors import UserError
from intttrain.layout import axes
from intttrain.layout.axes import AXES
from intttrain.layout.mesh import make_mesh, resolve_mesh
from intttrain.layout.sharding import check_batch, constrain, named_shardings, partition_spec


def mesh(**sizes: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
    )


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(data=2, tensor=2), 8, (2, 2, 1, 2)),
        (MeshConfig(data=2, fsdp=2, context=4, tensor=1), 16, (2, 2, 4, 1)),
        (MeshConfig(data=2, slices=2), 8, (2, 4, 1, 1)),
        (MeshConfig(fsdp=2, context=None), 16, (1, 2, 8, 1)),
    ],
)
def test_sizes(config, devices, sizes):
    assert tuple(resolve_mesh(config, devices).sizes.values()) == sizes


@pytest.mark.parametrize(
    ("config", "devices", "said"),
    [
        (MeshConfig(tensor=3), 8, ("tensor 3 = 3", "8 devices", "[2, 4, 8]")),
        (MeshConfig(fsdp=4), 8, ("fsdp 4", "= 4", "8 devices", "mesh.fsdp=8")),
        (MeshConfig(fsdp=16), 8, ("there are 8 devices", "mesh.fsdp=8")),
        (MeshConfig(fsdp=3, context=None), 8, ("fsdp 3", "= 3", "8 devices", "[2, 4, 8]")),
        (MeshConfig(fsdp=3, tensor=3), 8, ("= 9", "product is 8", "9 devices")),
        (MeshConfig(data=3, slices=3), 8, ("mesh.slices=3", "8 devices")),
    ],
)
def test_what_does_not_fit_is_refused(config, devices, said):
    with pytest.raises(UserError) as error:
        resolve_mesh(config, devices)
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in said), line


def test_rules_report_collisions_and_unknown_names():
    P = jax.sharding.PartitionSpec
    assert partition_spec(("embed", "heads", "head_dim")) == P(("fsdp", "context"), ("tensor",), None)
    assert partition_spec(("batch", "tokens", None)) == P(("data", "fsdp"), ("context",), None)
    with pytest.raises(ValueError, match="'heads' and 'mlp' both want the mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'head' in .* has no rule"):
        partition_spec(("head",))


@pytest.mark.parametrize(
    ("table", "configured", "said"),
    [
        ({"AXES": ("replica", *AXES)}, AXES, "'replica' has no size"),
        ({}, (*AXES, "replica"), "'replica' is not among layout.axes.AXES"),
        ({"AXES": ("replica", *AXES)}, (*AXES, "replica"), "'replica' cuts nothing"),
        ({"RULES": axes.RULES | {"batch": ("replica", "data", "fsdp")}}, AXES, "'replica' has no size"),
        ({"RULES": axes.RULES | {"batch": ("replica", "data", "fsdp")}}, (*AXES, "replica"), "not among"),
        ({"RULES": axes.RULES | {"embed": ("fsdp", "tensor")}}, AXES, r"\['tensor'\] cut 'embed'.*several times"),
    ],
)
def test_an_axis_that_is_added_in_one_place_alone_is_refused(table, configured, said, monkeypatch):
    axes.check_axes(AXES)
    for name, value in table.items():
        monkeypatch.setattr(axes, name, value)
    with pytest.raises(ValueError, match=said):
        axes.check_axes(configured)


def test_a_mesh_is_made_of_the_axes_of_the_table_only(monkeypatch):
    monkeypatch.setattr(axes, "AXES", ("replica", *AXES))
    with pytest.raises(ValueError, match=r"'replica' has no size: config\.MeshConfig"):
        make_mesh(MeshConfig(), jax.devices()[:1])


def test_a_dim_that_does_not_divide_names_the_parameter():
    leaf = jax.ShapeDtypeStruct((6, 30), np.float32)
    with pytest.raises(UserError) as error:
        named_shardings(mesh(fsdp=2, context=2), {"a": {"w": ("vocab", "embed")}}, {"a": {"w": leaf}})
    assert "parameter a.w: dim 'embed' of size 30" in str(error.value) and "fsdp 2 x context 2 = 4" in str(error.value)
    assert "use 3 or 5 or 6" in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "changes", "said"),
    [
        ({"fsdp": 3}, {}, ("train.batch_rows=8", "fsdp 3 = 3", "train.batch_rows=6 or 9")),
        ({"fsdp": 8}, {"microbatches": 2}, ("2 microbatches gives 4 rows", "train.batch_rows=16")),
        ({"context": 3}, {}, ("data.seq_len=1024", "mesh.context=3", "mesh.context=2 or 4")),
        ({"context": 16}, {}, ("64 tokens a device", "model.ttt.chunk_tokens=128", "mesh.context=2 or 4 or 8")),
    ],
)
def test_batches_that_do_not_divide_are_refused(sizes, changes, said):
    tree = default_config()
    tree.train.update(changes)
    config = resolve(tree)
    check_batch(config, mesh(fsdp=2))
    with pytest.raises(UserError) as error:
        check_batch(config, mesh(**sizes))
    assert all(part in str(error.value) for part in said), str(error.value)


def test_slices_have_to_divide_data():
    tree = default_config()
    tree.mesh.slices = 2
    with pytest.raises(UserError, match=r"mesh\.slices=2 does not divide mesh\.data=1.*mesh\.data=2"):
        resolve(tree)


def test_without_a_mesh_nothing_is_constrained():
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", "tokens") is x
