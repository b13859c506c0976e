"""``intttrain eval --follow`` beside a run: its checkpoints are copied in whenever the command waits."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intttrain.app import evaluate, follow
from tests.app.small import NUM_STEPS, Outcome, World, cli, done, error_line, unchanged

CopyOf = Callable[..., Path]


@pytest.fixture
def at_waits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Callable[[], Any]]]:
    """``at_waits(a, b)`` calls ``a`` when the command waits for the first time, then ``b``; a third wait fails."""

    def install(*events: Callable[[], Any]) -> list[Callable[[], Any]]:
        left = list(events)
        monkeypatch.setattr(follow, "time", types.SimpleNamespace(sleep=lambda seconds: left.pop(0)()))
        return left

    return install


def followed(world: World, workdir: Path, *flags: str) -> tuple[str, ...]:
    return ("eval", world.config, f"--workdir={workdir}", "--follow", "--config.data.train=()", *flags)


def results(outcome: Outcome) -> list[str]:
    """Returns the files of results in the order in which they were written, as STEP/FILE."""
    lines = [line.split()[1] for line in outcome.out.splitlines() if line.startswith("json ")]
    return ["/".join(Path(line).parts[-2:]) for line in lines]


def lines_with(outcome: Outcome, text: str) -> list[str]:
    return [line for line in outcome.err.splitlines() if text in line]


def nothing() -> None:
    pass


def test_every_checkpoint_is_evaluated_once_as_it_appears(
    world: World, straight: Path, tmp_path: Path, at_waits: Callable[..., list[Any]]
) -> None:
    workdir = tmp_path / "run"

    def begin() -> None:
        workdir.mkdir()
        shutil.copy(straight / "config.json", workdir)

    def save(*steps: int) -> Callable[[], None]:
        def copy() -> None:
            for step in steps:
                shutil.copytree(straight / "checkpoints" / str(step), workdir / "checkpoints" / str(step))

        return copy

    left = at_waits(nothing, begin, nothing, save(2, 4), nothing, save(NUM_STEPS))
    outcome = done(*followed(world, workdir))
    assert not left
    assert results(outcome) == ["4/positions.json", "2/positions.json", f"{NUM_STEPS}/positions.json"]
    assert [line.removeprefix("waiting for ") for line in lines_with(outcome, "waiting")] == [
        f"a run in {workdir}",
        f"a checkpoint; there is none yet of {NUM_STEPS}",
        f"a checkpoint; the newest is step 4 of {NUM_STEPS}",
    ]
    with unchanged(workdir):  # the same once more has nothing to do
        again = done(*followed(world, workdir))
    assert lines_with(again, f"has positions.json of step 2, 4, {NUM_STEPS} already") and not again.out
    # Another task has results of its own.
    context = ("--task=context", "--config.eval.context.lengths=(32,64)", "--config.eval.context.block_tokens=16")
    for step in (2, 4):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert results(done(*followed(world, workdir, *context))) == [f"{NUM_STEPS}-2/context.json"]


@pytest.fixture
def vanishing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps in this list are removed, as retention does, when they are about to be read."""
    steps: list[int] = []
    load = evaluate.load_trained

    def load_too_late(workdir: Path, step: int | None, **kwargs: Any) -> Any:
        if step in steps:
            shutil.rmtree(workdir / "checkpoints" / str(step) / "params")
        return load(workdir, step, **kwargs)

    monkeypatch.setattr(evaluate, "load_trained", load_too_late)
    return steps


def test_a_checkpoint_that_is_removed_while_it_is_read_is_passed_over(
    world: World, copy_of: CopyOf, vanishing: list[int], at_waits: Callable[..., list[Any]]
) -> None:
    workdir = copy_of(4, NUM_STEPS)
    vanishing.append(4)
    left = at_waits(lambda: shutil.rmtree(workdir / "checkpoints" / "4"))
    outcome = done(*followed(world, workdir))
    assert not left
    assert results(outcome) == [f"{NUM_STEPS}/positions.json"]
    assert lines_with(outcome, "note: the checkpoint of step 4 was removed before it was read")


def test_a_damaged_checkpoint_that_stays_is_an_error(
    world: World, copy_of: CopyOf, vanishing: list[int], at_waits: Callable[..., list[Any]]
) -> None:
    workdir = copy_of(4, NUM_STEPS)
    vanishing.append(NUM_STEPS)
    at_waits(nothing)
    line = error_line(cli(*followed(world, workdir)), after_other_lines=True)
    assert f"checkpoint step {NUM_STEPS}" in line and "damaged or incomplete" in line


@pytest.mark.parametrize("flag", ["--step=4", "--json=result.json"])
def test_what_belongs_to_one_checkpoint_is_refused(world: World, straight: Path, flag: str) -> None:
    with unchanged(straight):
        assert f"{flag} belongs to one" in error_line(cli(*followed(world, straight, flag)))
