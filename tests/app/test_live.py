"""Evaluation while a run trains: it leaves the run as it is, and says what ``intttrain eval`` would say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intttrain.app import loop, step_log
from intttrain.config.training import CheckpointConfig
from intttrain.data import Batch
from intttrain.logs.metrics import METRICS_FILE, read_metrics
from intttrain.logs.progress import StepTimer
from intttrain.train import Checkpoints
from tests.app.small import BATCH_ROWS, NUM_STEPS, World, assert_same_state, cli, done, error_line, metrics

EVERY = "--config.eval.every_steps=3"
STEP_S, EVALUATION_S = 2.0, 1000.0


class Clock:
    """Stands still but for steps and evaluations, which take their time each."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make_batches, evaluate = loop.make_batches, loop.LiveEvaluation.evaluate

        def make_timed_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
            for batch in make_batches(*args, **kwargs):
                self.now_s += STEP_S
                yield batch

        def timed_evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
            self.now_s += EVALUATION_S
            return evaluate(*args, **kwargs)

        monkeypatch.setattr(loop, "make_batches", make_timed_batches)
        monkeypatch.setattr(loop.LiveEvaluation, "evaluate", timed_evaluate)
        monkeypatch.setattr(step_log, "StepTimer", lambda: StepTimer(clock=self))


@pytest.fixture(scope="module")
def evaluated(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that is evaluated every three steps and was stopped after one of them, and what both calls reported."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    command = ("train", world.config, f"--workdir={workdir}", EVERY)
    with pytest.MonkeyPatch.context() as context:
        Clock().install(context)
        return workdir, [done(*command, "--stop_at_step=6").err, done(*command).err]


def split(workdir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the records of steps and those of evaluations."""
    of_steps = [record for record in metrics(workdir) if "loss" in record]
    return of_steps, [record for record in metrics(workdir) if "loss" not in record]


def test_the_run_is_the_one_without_evaluation(evaluated: tuple[Path, list[str]], straight: Path) -> None:
    assert_same_state(evaluated[0], straight, NUM_STEPS)
    assert split(evaluated[0])[0] == metrics(straight)


def test_chosen_steps_and_the_last_are_evaluated_once(evaluated: tuple[Path, list[str]]) -> None:
    records = split(evaluated[0])[1]
    assert [record["step"] for record in records] == [3, 6, 9, NUM_STEPS]
    buckets = ("", "/0-15", "/16-31", "/32-63")
    names = {f"eval/{name}{bucket}" for name in ("on", "off", "on-off") for bucket in buckets}
    assert all(set(record) == {"step"} | names for record in records)
    lines = [[line for line in err.splitlines() if "held out" in line] for err in evaluated[1]]
    assert [[int(line.split()[1][:-1]) for line in part] for part in lines] == [[3, 6], [9, NUM_STEPS]]
    assert f"held out on {records[0]['eval/on']:.4f}, off {records[0]['eval/off']:.4f} bits per byte" in lines[0][0]


def test_the_numbers_are_those_of_eval(evaluated: tuple[Path, list[str]], world: World) -> None:
    workdir = evaluated[0]
    for record in split(workdir)[1][-1:] + split(workdir)[1][1:2]:  # of steps that have a checkpoint
        done("eval", world.config, f"--workdir={workdir}", f"--step={record['step']}", "--config.data.train=()")
        content = json.loads((workdir / "eval" / str(record["step"]) / "positions.json").read_text())
        columns = {"": content["all"]} | {f"/{c['begin']}-{c['end'] - 1}": c for c in content["buckets"]}
        for name, column in columns.items():
            values = column["levels"] | column["differences"]
            assert record[f"eval/on{name}"] == values["on"]["value"] != 0
            assert record[f"eval/off{name}"] == values["off"]["value"]
            assert record[f"eval/on-off{name}"] == values["on - off"]["value"]
    assert record["eval/on-off/0-15"] == 0 != record["eval/on-off/32-63"], "the first chunk reads what training left"


def test_a_checkpoint_of_an_evaluated_step_holds_the_loss(evaluated: tuple[Path, list[str]]) -> None:
    wanted = {record["step"]: record["eval/on"] for record in split(evaluated[0])[1]}
    with Checkpoints(evaluated[0] / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        found = {step: checkpoints.read_info(step).heldout_loss for step in checkpoints.steps()}
    assert found == {6: wanted[6], 8: None, NUM_STEPS: wanted[NUM_STEPS]}


def test_its_time_is_not_that_of_training(evaluated: tuple[Path, list[str]]) -> None:
    rates = [record.get("tokens_per_second") for record in read_metrics(evaluated[0] / METRICS_FILE)]
    known = [rate for rate in rates if rate is not None]
    assert len(known) > NUM_STEPS / 2
    # A step is read when the next batch has been taken, before an evaluation at once: hence not always equal.
    assert all(rate >= BATCH_ROWS * 64 / STEP_S for rate in known), known


def test_a_run_may_go_on_without_it_and_a_dense_one_has_one_level(world: World, dense: Path, tmp_path: Path) -> None:
    command = ("train", world.dense_config, f"--workdir={tmp_path / 'run'}", "--stop_at_step=2")
    done(*command, "--config.eval.every_steps=1")
    done(*command[:-1])
    of_steps, of_evaluations = split(tmp_path / "run")
    assert of_steps == metrics(dense)
    assert [record["step"] for record in of_evaluations] == [1, 2]
    assert all(name.startswith("eval/dense") for record in of_evaluations for name in record if name != "step")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("config.data.heldout = None", "eval.every_steps=3 needs data.heldout, which is None"),
        ("config.eval.min_document_tokens = 10**5", "no document of eval.min_document_tokens=100000 or more"),
    ],
)
def test_nothing_to_evaluate_is_refused_before_training(world: World, tmp_path: Path, line: str, wanted: str) -> None:
    end = "    return config"
    (tmp_path / "small.py").write_text((world.root / "small.py").read_text().replace(end, f"    {line}\n{end}"))
    command = ("train", f"--config={tmp_path / 'small.py'}", f"--workdir={tmp_path / 'run'}", EVERY)
    assert wanted in error_line(cli(*command))
    assert not (tmp_path / "run").exists()
