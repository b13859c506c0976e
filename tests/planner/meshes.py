"""Meshes of described TPUs for tests."""

from __future__ import annotations

import functools
import importlib.util

import jax
import pytest

from intttrain.config import MeshConfig
from intttrain.layout.mesh import make_mesh
from intttrain.planner.topology import describe_topology, topology_devices


@functools.cache
def devices(name: str, slices: int = 1) -> tuple[jax.Device, ...]:
    """Devices of a described topology; skips the test where libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU that is not there needs libtpu (pip install libtpu)")
    return tuple(topology_devices(describe_topology(name, slices)))


def tpu_mesh(name: str, slices: int = 1, **axes: int) -> jax.sharding.Mesh:
    """A mesh over a described topology; ``fsdp`` takes what is left."""
    return make_mesh(MeshConfig(slices=slices, **axes), devices(name, slices))
