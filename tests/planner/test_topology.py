"""Names of topologies, refusals before libtpu sees them, and the devices and meshes that they give."""

from __future__ import annotations

import pytest
from jax.experimental import topologies

from intttrain.config import MeshConfig
from intttrain.config.errors import UserError
from intttrain.layout.hardware import chip
from intttrain.layout.mesh import make_mesh
from intttrain.planner.topology import describe_topology, roomier, topology_devices
from tests.planner.meshes import devices


@pytest.mark.parametrize(
    ("name", "resolved", "count", "hosts"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 16),
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v5e-256", "v5e:16x16", 256, 64),
        ("v5litepod-16", "v5e:4x4", 16, 4),
        ("V6E-256", "v6e:16x16", 256, 64),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 128, 16),
        ("tpu7x-128", "tpu7x:4x4x4", 128, 16),
        ("v5p:4x4x6", "v5p:4x4x6", 96, 24),
    ],
)
def test_names(name, resolved, count, hosts):
    topology = describe_topology(name)
    assert (topology.name, topology.devices, topology.hosts) == (resolved, count, hosts)


def test_slices():
    topology = describe_topology("v5p-128", slices=4)
    assert (topology.chips, topology.devices, str(topology)) == (256, 256, "4 x v5p:4x4x4")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5x:4x4", "no chip is called 'v5x'; did you mean 'v5p'"),
        ("h100", "'h100' has to look like v5p:4x4x4.*choose from tpu7x, v4, v5e, v5p, v6e"),
        ("v5p", "has to look like"),
        ("v5p:4x4", "has 3 lengths of at least 1, v5p:AxBxC; the nearest are v5p:2x2x4"),
        ("v5e:0x4", "has 2 lengths of at least 1"),
        ("v5e:4x4x", "has 2 lengths"),
        ("v5e:3x5", "hosts have 2 x 2 chips.*v5e:4x6, v5e:4x4"),
        ("v5p:3x3x3", "the nearest are v5p:4x4x3"),
        ("v5e:32x32", "1024 chips, but a slice of v5e has at most 256"),
        ("v5p-100", r"no slice of v5p has 100 TensorCores; the nearest are v5p-64 \(2x4x4\), v5p-128 \(4x4x4\)"),
        ("v6e-7", r"no slice of v6e has 7 chips; the nearest are v6e-4 \(2x2\)"),
        ("v6e-0", "no slice of v6e has 0 chips"),
    ],
)
def test_refused_in_one_line_before_libtpu_is_asked(monkeypatch, name, said):
    monkeypatch.setattr(topologies, "get_topology_desc", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UserError, match=said) as refused:
        topology_devices(describe_topology(name))
    assert "\n" not in str(refused.value)


def test_zero_slices():
    with pytest.raises(UserError, match="slices=0"):
        describe_topology("v5e:4x4", slices=0)


def test_what_libtpu_refuses_is_one_line(monkeypatch):
    devices("v5e:2x2")  # skips without libtpu

    def refuse(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match="cannot describe v5e:4x4: first line; the libtpu has to fit jax") as refused:
        topology_devices(describe_topology("v5e:4x4"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "slices"),
    [("v4:4x4x4", 1), ("v5p:4x4x4", 1), ("v5e:16x16", 1), ("v6e:16x16", 1), ("tpu7x:4x4x4", 1)]
    + [("v5e:4x4", 2), ("v5p:2x2x2", 2), ("v4:2x2x1", 2), ("tpu7x:2x2x2", 2), ("v5p:4x8x4", 1), ("v6e:2x4", 1)],
)
@pytest.mark.parametrize("axes", [{}, {"context": 2, "tensor": 2}, {"context": 4}])
def test_devices_and_meshes(name, slices, axes):
    topology, found = describe_topology(name, slices), devices(name, slices)
    assert len(found) == topology.devices
    assert chip(found[0].device_kind) == topology.chip
    assert len({d.process_index for d in found}) == topology.hosts
    mesh = make_mesh(MeshConfig(data=slices, slices=slices, **axes), found)
    assert mesh.devices.shape[0] == slices
    for row in mesh.devices:  # a slice is one row of the axis `data`
        assert len({getattr(d, "slice_index", 0) for d in row.flat}) == 1


def test_roomier():
    assert roomier(describe_topology("v5e:4x4")).devices == 16
    assert roomier(describe_topology("v5e:4x4")).chip.device_hbm_bytes > 90 * 2**30
    assert roomier(describe_topology("v5p:4x4x4")) is None


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v5e:8x16", (False, True, False)),
        ("v6e:16x16", (True, True, False)),
        ("tpu7x:4x4x8", (True, True, True)),
    ],
)
def test_rings(name, wraps):
    """As the Cloud TPU documentation says: 3D slices made of whole 4x4x4 cubes, 2D dimensions of 16."""
    assert describe_topology(name).wraps() == wraps


def test_meshes_of_another_number_of_slices_are_refused():
    with pytest.raises(UserError, match=r"mesh\.slices=4, but there are 2 slices; use mesh\.slices=2"):
        make_mesh(MeshConfig(data=4, slices=4), devices("v5e:4x4", 2))
    with pytest.raises(UserError, match=r"one slice; use mesh\.slices=1"):
        make_mesh(MeshConfig(data=2, slices=2), devices("v5e:4x4", 1))
