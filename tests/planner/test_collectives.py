"""Bytes, axes and executions of planted collectives; the printed forms of groups; asynchronous and fused ones."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.layout.hardware import CHIPS
from intttrain.planner.collectives import moved_bytes, sum_traffic
from intttrain.planner.xla.groups import MeshGroups, read_groups
from tests.forced_devices import on_eight_cpu_devices
from tests.planner.meshes import tpu_mesh
from tests.planner.planted_collectives import COLUMNS, OWN, PLANTED, TRIPS, compiled, found, read


@pytest.fixture(scope="module")
def on_cpu():
    return on_eight_cpu_devices("tests.planner.planted_collectives")


@pytest.mark.parametrize("name", PLANTED)
def test_planted_on_cpu(on_cpu, name):
    planted, (only,) = PLANTED[name], on_cpu[name]
    assert (only["kind"], tuple(only["axes"]), only["whole_axes"]) == (planted.kind, planted.axes, True)
    assert only["bytes"] == OWN * planted.factor
    assert only["executions"] == TRIPS
    assert only["total_bytes"] == OWN * planted.factor * TRIPS
    assert only["line"].partition(":")[0].endswith("planted_collectives.py")
    assert only["seconds"] is None
    assert not only["crosses_slices"]


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_on_tpu(name, topology):
    planted, (only,) = PLANTED[name], found(name, tpu_mesh(topology, context=2))
    assert (only.kind, only.axes, only.whole_axes) == (planted.kind, planted.axes, True)
    assert (only.bytes, only.executions) == (OWN * planted.factor, TRIPS)
    assert only.overlapped == (name == "permute")
    assert only.seconds > 0
    assert json.loads(json.dumps(only.to_json()))["total_bytes"] == only.total_bytes


def test_time_is_bytes_over_the_links_of_the_group():
    """Links of 50 GB/s: two where a group extends over both dimensions of the 2 x 4 chips, one for a neighbour."""
    mesh = tpu_mesh("v5e:2x4", context=2)
    (gather,) = found("gather", mesh)
    assert gather.seconds == pytest.approx(3 * OWN / (2 * 50e9))
    (permute,) = found("permute", mesh)
    assert permute.seconds == pytest.approx(OWN / 50e9)


def test_a_ring_has_twice_the_links():
    mesh = tpu_mesh("v5p:4x4x4")
    groups = MeshGroups(mesh, 64)
    assert groups.torus_lengths(tuple(range(64)), CHIPS["v5p"]) == [(4, True)] * 3
    assert MeshGroups(tpu_mesh("v5p:2x2x2"), 8).torus_lengths(tuple(range(8)), CHIPS["v5p"]) == [(2, False)] * 3


def test_between_slices():
    mesh = tpu_mesh("v5e:2x4", slices=2, data=2, context=2)
    (between,) = read(compiled(lambda x: jax.lax.psum(x, "data"), mesh), mesh)
    assert (between.kind, between.axes, between.crosses_slices) == ("all-reduce", ("data",), True)
    assert (between.bytes, between.executions, between.group_size) == (OWN, TRIPS, 2)
    assert between.seconds == pytest.approx(OWN / 3.125e9)
    (within,) = found("gather", mesh)
    assert (within.axes, within.bytes, within.crosses_slices) == (("fsdp",), 3 * OWN, False)


# --- fused and asynchronous ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overlapped():
    """Fully sharded weights of two matmuls in a scan, forward and backward, on v5e: gathers beside matmuls."""
    mesh = tpu_mesh("v5e:2x4")
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731

    def loss(weights, x):
        def body(x, w):
            up, down = (jax.lax.with_sharding_constraint(w[k].astype(jnp.bfloat16), at()) for k in ("up", "down"))
            return x + jnp.tanh(x @ up) @ down, None

        y, _ = jax.lax.scan(jax.checkpoint(body), x, weights)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    shardings = {"up": at(None, "fsdp"), "down": at(None, None, "fsdp")}
    weights = {
        "up": jax.ShapeDtypeStruct((6, 2048, 4096), jnp.float32, sharding=shardings["up"]),
        "down": jax.ShapeDtypeStruct((6, 4096, 2048), jnp.float32, sharding=shardings["down"]),
    }
    x = jax.ShapeDtypeStruct((8 * 4096, 2048), jnp.bfloat16, sharding=at("fsdp"))
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(at(), shardings))
    text = step.lower(weights, x).compile().as_text()
    return text, read(text, mesh)


def test_every_gather_is_counted_once(overlapped):
    """Two weights, gathered forward and again backward, in six layers, however many fusions hold a copy."""
    text, collectives = overlapped
    gathers = [c for c in collectives if c.kind == "all-gather"]
    weight = 4096 * 2048 * 2
    assert [(c.bytes, c.executions) for c in gathers] == [(weight * 7 // 8, 6)] * 4
    assert text.count(" all-gather(") > 4, "nothing to be counted twice: this compiler fuses no gather any more"
    assert {c.overlapped for c in gathers} == {True, False}


def test_fused_reduce_scatters(overlapped):
    """Gradients: one device's part of the sum over eight, although the text has an all-reduce and a slice."""
    scatters = [c for c in overlapped[1] if c.kind == "reduce-scatter"]
    assert [(c.bytes, c.executions) for c in scatters] == [(4096 * 2048 * 2 * 7 // 8, 6)] * 2


def test_traffic_by_kind_and_axis(overlapped):
    rows = {(t.kind, t.axes): t for t in sum_traffic(overlapped[1])}
    gathers = rows["all-gather", ("fsdp",)]
    assert gathers.bytes == 4 * 6 * 4096 * 2048 * 2 * 7 // 8
    assert gathers.executions == 24
    assert gathers.overlapped_seconds > 0


_MODULE = """HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}

ENTRY %main (p: f32[8,4], i: s32[]) -> f32[{rows},4] {{
  %p = f32[8,4] parameter(0)
  %i = s32[] parameter(1)
  %zero = f32[] constant(0)
  %z = s32[] constant(0)
  %zeros = f32[64,4] broadcast(%zero), dimensions={{}}
{body}
}}
"""


def test_an_all_reduce_in_the_place_of_a_gather():
    body = """  %own = f32[64,4] dynamic-update-slice(%zeros, %p, %i, %z)
  ROOT %r = f32[64,4] all-reduce(%own), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add"""
    (only,) = read(_MODULE.format(rows=64, body=body), tpu_mesh("v5e:2x4"))
    assert (only.kind, only.stands_for) == ("all-reduce", "all-gather")
    assert only.bytes == 2 * 64 * 4 * 4 * 7 // 8


def test_an_all_reduce_in_the_place_of_a_reduce_scatter():
    body = """  %r = f32[8,4] all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %s = f32[1,4] dynamic-slice(%r, %i, %z), dynamic_slice_sizes={1,4}"""
    (only,) = read(_MODULE.format(rows=1, body=body), tpu_mesh("v5e:2x4"))
    assert (only.kind, only.stands_for) == ("all-reduce", "reduce-scatter")


# --- groups ----------------------------------------------------------------------------------------------------------

EVENS_AND_ODDS = ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}", EVENS_AND_ODDS),
        ("channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), x=1", EVENS_AND_ODDS),
        ("replica_groups=[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=mesh['data'=1,'fsdp'=4,'context'=2,'tensor'=1] {'fsdp'}, y=2", EVENS_AND_ODDS),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", EVENS_AND_ODDS),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, z=1", EVENS_AND_ODDS),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups={}, dimensions={0}", (tuple(range(8)),)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_printed_groups(text, groups):
    assert read_groups(text, 8) == groups


def test_axes_of_groups():
    groups = MeshGroups(tpu_mesh("v5e:2x4", context=2), 8)
    assert groups.axes(EVENS_AND_ODDS) == (("fsdp",), True)
    assert groups.axes((tuple(range(8)),)) == (("fsdp", "context"), True)
    assert groups.axes(((0, 2), (1, 3), (4, 6), (5, 7))) == (("fsdp",), False)
    assert groups.axes(((0, 1), (1, 0), (2, 3), (3, 2)))[0] == ("context",)


def test_bytes_of_one_device_are_none():
    assert all(moved_bytes(kind, COLUMNS, 1) == 0 for kind in ("all-gather", "all-reduce", "collective-permute"))
