"""One device and eight compute the same step, whatever the mesh: loss, every gradient, every new parameter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.devices.equality import MESHES

REPO = Path(__file__).resolve().parents[2]

# fp32 sums in another order. Gradients: the sums run over up to 256 tokens, so a few times 2^-24 * sqrt(256) relative
# to the largest entry. Parameters: Adam's first update is lr * g / |g|, which turns the rounding of the smallest
# gradients into a visible part of lr.
TOLERANCE = {"gradient": 1e-5, "loss": 2e-6, "row_loss": 2e-6, "params": 2e-4}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    program = [sys.executable, str(REPO / "tests" / "devices" / "equality.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["ttt", "dense"])
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_compute_what_one_computes(found: dict[str, Any], kind: str, mesh: str) -> None:
    distances = found["distances"][f"{kind} {mesh}"]
    assert len(distances) > 20 and ("gradient.ttt.conv" in distances) == (kind == "ttt")
    too_far = {name: value for name, value in distances.items() if not value <= TOLERANCE[name.split(".")[0]]}
    assert not too_far


@pytest.mark.parametrize("kind", ["ttt", "dense"])
def test_the_planner_lowers_the_step_that_training_runs(found: dict[str, Any], kind: str) -> None:
    planned, trained = found["lowerings"][kind]
    assert planned == trained
    assert "mhlo.num_partitions = 8" in planned and planned.count("sharding") > 50
    assert found["lowerings"]["ttt"][0] != found["lowerings"]["dense"][0]
