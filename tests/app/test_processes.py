"""Four processes with two devices each train as one with eight, and other devices go on from a checkpoint of either."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.app.small import World, checksums, done, steps
from tests.forced_devices import COMPILE_FAST

REPO = Path(__file__).resolve().parents[2]
TIMING = ("tokens_per_second", "eta_seconds", "time")
FLAGS = (
    "--config.train.batch_rows=8", "--config.train.num_steps=4", "--config.train.schedule.warmup_steps=0",
    "--config.mesh.data=2", "--config.mesh.context=4",  # two processes share rows when there are four
    "--config.train.checkpoint.every_steps=2", "--config.train.log_every_steps=1",
)  # fmt: skip
EVALUATE = "--config.eval.every_steps=4"  # at the end, in another stage where there are two


def launch(
    world: World, processes: int, devices: int, workdir: Path, *flags: str, program: str = "intttrain",
    stages: Sequence[dict[str, Any]] = (), status: int = 0,
) -> str:  # fmt: skip
    text = (world.root / "small.py").read_text()
    end = "    return config"
    config = world.root / f"staged-{len(stages)}.py"
    config.write_text(text.replace(end, f"    config.train.stages = {tuple(stages)}\n{end}"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("INTTTRAIN_", "XLA_FLAGS"))}
    environment |= {
        "PYTHONPATH": str(REPO),
        "XLA_FLAGS": COMPILE_FAST,
        "JAX_COMPILATION_CACHE_DIR": str(world.root / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [str(REPO / "launch" / "local.sh"), str(processes), str(devices), sys.executable, "-m", *program.split()]
    command += ["train", f"--config={config}", f"--workdir={workdir}", *flags_with(*flags)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == status, ended.stdout[-3000:] + ended.stderr
    return ended.stdout


def flags_with(*flags: str) -> list[str]:
    """``FLAGS`` with others, which replace those of the same name: a flag may be given once."""
    return list({flag.partition("=")[0]: flag for flag in (*FLAGS, *flags)}.values())


def mesh(**sizes: int) -> list[str]:
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
    return [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records if "loss" in record}


def evaluations(workdir: Path) -> dict[int, tuple[float, float]]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["eval/on"], record["eval/off"]) for record in records if "eval/on" in record}


@pytest.mark.slow
def test_four_processes_train_as_one_and_others_go_on_from_either(world: World, tmp_path: Path) -> None:
    """Both layouts straight through; and each stopped half-way, to be finished by others."""
    one, four, one_four, four_one, alone = (
        tmp_path / name for name in ("one", "four", "one_four", "four_one", "alone")
    )
    launch(world, 1, 8, one, EVALUATE)
    # One of them goes on from one mesh to another between two stages, which changes nothing but who holds what.
    stages = [{"until_step": 3, "overrides": {}}, {"until_step": 4, "overrides": {"mesh.fsdp": 2, "mesh.context": 2}}]
    output = launch(world, 4, 2, four, EVALUATE, stages=stages, program=f"tests.app.counting {tmp_path / 'counts'}")
    assert output.count("finished at step 4") == 1, "only process 0 reports"
    launch(world, 1, 8, one_four, "--stop_at_step=2")
    assert "resumed at step 2" in launch(world, 4, 2, one_four)
    # SIGTERM to one process stops all, and the same rows and columns of weights go on over any other devices.
    output = launch(world, 4, 2, four_one, program="tests.app.terminated 1", status=143)
    assert "stopped at step 2 of 4" in output and steps(four_one) == [2]
    assert "resumed at step 2" in launch(world, 1, 8, four_one, *mesh(fsdp=2, context=4), "--stop_at_step=3")
    shutil.copytree(four_one, alone)
    assert "resumed at step 3" in launch(world, 1, 2, four_one, *mesh(fsdp=2))
    assert "resumed at step 3" in done("train", world.config, *flags_with(*mesh()), f"--workdir={alone}").err

    # Two devices hold half of the tokens of a row, and all of them in the second stage. Each process reads these and
    # the label after their end, no others.
    counts = [json.loads(path.read_text()) for path in sorted((tmp_path / "counts").iterdir())]
    assert len(counts) == 4
    for count in counts:
        lengths = [tokens for tokens, _ in count]
        assert set(lengths) == {32, 64}
        assert lengths.count(32) >= 3 * 8 // 2, "half of the rows of three steps"
        assert lengths.count(64) >= 8 // 4, "a quarter of the rows of one"
        assert all(places <= tokens + 1 for tokens, places in count), count

    # The programs are the same; gloo may add in another order than the threads of one process (fp32 rounding).
    wanted = losses(one)
    assert sorted(wanted) == [1, 2, 3, 4]
    for workdir in (four, one_four, four_one, alone):
        found = losses(workdir)
        assert sorted(found) == [1, 2, 3, 4]
        for step, values in wanted.items():
            np.testing.assert_allclose(found[step], values, rtol=2e-5, err_msg=f"{workdir.name} step {step}")
    # Evaluating changes nothing: these two are compared above with runs that do not.
    assert sorted(evaluations(one)) == sorted(evaluations(four)) == [4]
    np.testing.assert_allclose(evaluations(four)[4], evaluations(one)[4], rtol=2e-5)
    # What was resumed is what was saved, to the bit, and the other layout left it as it was.
    for first, resumed in ((one, one_four), (four, four_one)):
        assert checksums(first, 2) == checksums(resumed, 2)
