"""Meshes of described TPUs for tests, and this process's Python with eight CPU devices."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from intttrain.core.config import MeshConfig
from intttrain.core.mesh import make_mesh
from intttrain.planner.topology import describe_topology, topology_devices

REPO = Path(__file__).resolve().parents[2]


@functools.cache
def devices(name: str, slices: int = 1) -> tuple[jax.Device, ...]:
    """Devices of a described topology; skips the test where libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU that is not there needs libtpu (pip install libtpu)")
    return tuple(topology_devices(describe_topology(name, slices)))


def tpu_mesh(name: str, slices: int = 1, **axes: int) -> jax.sharding.Mesh:
    """A mesh over a described topology; ``fsdp`` takes what is left."""
    return make_mesh(MeshConfig(slices=slices, **axes), devices(name, slices))


def on_eight_cpu_devices(module: str, *arguments: str) -> Any:
    """Runs ``python -m module`` with eight CPU devices and returns the JSON in its last line."""
    flags = "--xla_force_host_platform_device_count=8"
    ran = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPO, env=dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])
