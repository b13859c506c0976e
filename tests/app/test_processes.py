"""Four processes with two devices each train as one with eight, and each goes on from the checkpoint of the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.app.small import World

REPO = Path(__file__).resolve().parents[2]
TIMING = ("tokens_per_second", "eta_seconds", "time")
FLAGS = (
    "--config.train.batch_rows=8", "--config.train.num_steps=4", "--config.train.schedule.warmup_steps=0",
    "--config.mesh.data=2", "--config.mesh.context=4",  # two processes share rows when there are four
    "--config.train.checkpoint.every_steps=2", "--config.train.log_every_steps=1",
)  # fmt: skip


def launch(world: World, processes: int, devices: int, workdir: Path, *flags: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("INTTTRAIN_", "XLA_FLAGS"))}
    environment |= {
        "PYTHONPATH": str(REPO),
        "JAX_COMPILATION_CACHE_DIR": str(world.root / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [str(REPO / "launch" / "local.sh"), str(processes), str(devices), sys.executable, "-m", "intttrain"]
    command += ["train", world.config, f"--workdir={workdir}", *FLAGS, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records}


def arrays(workdir: Path, step: int) -> dict[str, int]:
    """The checksum of every array of a checkpoint."""
    document = json.loads((workdir / "checkpoints" / str(step) / "info" / "metadata").read_text())
    return {name: entry["checksum"] for name, entry in document["arrays"].items()}


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both layouts, straight through; and stopped half-way by one layout to be finished by the other."""
    root = tmp_path_factory.mktemp("processes")
    one, four = root / "one", root / "four"
    launch(world, 1, 8, one)
    output = launch(world, 4, 2, four)
    assert output.count("finished at step 4") == 1, "only process 0 reports"
    one_four, four_one = root / "one_four", root / "four_one"
    launch(world, 1, 8, one_four, "--stop_at_step=2")
    assert "resumed at step 2" in launch(world, 4, 2, one_four)
    launch(world, 4, 2, four_one, "--stop_at_step=2")
    assert "resumed at step 2" in launch(world, 1, 8, four_one)
    return {"one": one, "four": four, "one_four": one_four, "four_one": four_one}


def test_losses_are_the_same(runs: dict[str, Path]) -> None:
    """The programs are the same; gloo may add in another order than threads of one process (fp32 rounding)."""
    wanted = losses(runs["one"])
    assert sorted(wanted) == [1, 2, 3, 4]
    for name in ("four", "one_four", "four_one"):
        found = losses(runs[name])
        assert sorted(found) == [1, 2, 3, 4]
        for step, values in wanted.items():
            np.testing.assert_allclose(found[step], values, rtol=2e-5, err_msg=f"{name} step {step}")


def test_changing_the_layout_changes_no_bit_of_the_state(runs: dict[str, Path]) -> None:
    """What was resumed is what was saved: the checkpoint of the first half is still there, untouched."""
    for first, resumed in (("one", "one_four"), ("four", "four_one")):
        assert arrays(runs[first], 2) == arrays(runs[resumed], 2)
