"""What every step of one run tells others: the watchdog that it is complete, its checkpoint how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intttrain.app import commands
from intttrain.config.training import CheckpointConfig
from intttrain.pod.watchdog import Watchdog
from intttrain.train import Checkpoints
from tests.app.small import NUM_STEPS, World, done, metrics

EVALUATED = (3, 6, 9, NUM_STEPS)
LIMIT_S = 7777


class Listening(Watchdog):
    """Remembers what it is told."""

    limits: list[int | None] = []  # noqa: RUF012
    beats: list[int] = []  # noqa: RUF012

    def __init__(self, limit_s: int | None, *arguments: Any, **options: Any) -> None:
        self.limits.append(limit_s)
        super().__init__(limit_s, *arguments, **options)

    def beat(self, step: int) -> None:
        self.beats.append(step)
        super().beat(step)


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one piece that saves every step and evaluates every third."""
    workdir = tmp_path_factory.mktemp("each") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "Watchdog", Listening)
        done(
            "train", world.config, f"--workdir={workdir}", f"--config.train.watchdog_seconds={LIMIT_S}",
            "--config.eval.every_steps=3", "--config.train.checkpoint.every_steps=1",
            "--config.train.checkpoint.keep_last=100",
        )  # fmt: skip
    return workdir


def test_a_checkpoint_holds_the_loss_of_its_own_step_or_none(run: Path) -> None:
    """A checkpoint that took the loss of an evaluation before it would be among the best, or push one of them out."""
    measured = {record["step"]: record["eval/on"] for record in metrics(run) if "eval/on" in record}
    assert tuple(measured) == EVALUATED
    with Checkpoints(run / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        found = {step: checkpoints.read_info(step).heldout_loss for step in checkpoints.steps()}
    assert found == {step: measured.get(step) for step in range(1, NUM_STEPS + 1)}


def test_the_watchdog_hears_of_every_step_and_has_the_limit_of_the_run(run: Path) -> None:
    assert run.exists() and Listening.limits == [LIMIT_S]
    assert Listening.beats == list(range(NUM_STEPS)), "each is complete when the next one has been started"
