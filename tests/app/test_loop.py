"""A run that stops, in whatever way, and goes on is the run that never stopped."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.app import loop, step_log
from intttrain.config import Config
from intttrain.config.training import CheckpointConfig
from intttrain.data import Batch
from intttrain.logs.metrics import METRICS_FILE, read_metrics
from intttrain.train import Checkpoints, Program, TrainState
from tests.app.paused import WAITING
from tests.app.small import (
    BATCH_ROWS,
    NUM_STEPS,
    REPO,
    World,
    assert_same_run,
    assert_same_state,
    cli,
    done,
    error_line,
    metrics,
    saved,
    steps,
    unchanged,
)

CopyOf = Callable[..., Path]
DEADLINE_S = 300  # for a machine that is busy with other things; reached only by a process that hangs


def intercept(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Batch], Batch]) -> None:
    """Hands the batch of ``step`` (counted from the start of the process) to ``action`` first."""
    make_batches = loop.make_batches

    def make_intercepted(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for number, batch in enumerate(make_batches(*args, **kwargs), start=1):
            yield action(batch) if number == step else batch

    monkeypatch.setattr(loop, "make_batches", make_intercepted)


class PausedRun:
    """A training process of its own that waits before one batch."""

    def __init__(self, batch: int, world: World, workdir: Path, *flags: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }
        program = [sys.executable, str(REPO / "tests" / "app" / "paused.py"), str(batch)]
        self.process = subprocess.Popen(
            [*program, "train", world.config, f"--workdir={workdir}", *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.seen: list[str] = []
        for line in self.process.stdout:
            if line.strip() == WAITING:
                return
            self.seen.append(line)
        pytest.fail(f"ended early: {self.seen} {self.process.communicate()}")

    def go_on(self) -> tuple[int, str, str]:
        """Lets the run continue and returns its exit status, its remaining output and its errors."""
        out, err = self.process.communicate("\n", timeout=DEADLINE_S)
        return self.process.returncode, out, err


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that another process does."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def start_paused() -> Iterator[Callable[..., PausedRun]]:
    """Starts paused runs and ends those that a failing test left behind."""
    runs: list[PausedRun] = []

    def start(*args: Any) -> PausedRun:
        runs.append(PausedRun(*args))
        return runs[-1]

    yield start
    for paused in runs:
        if paused.process.poll() is None:
            paused.process.kill()
        paused.process.communicate()


# --- stopping and going on -----------------------------------------------------------------------------------------


def test_stop_at_step_and_resume_is_never_having_stopped(world: World, straight: Path, tmp_path: Path) -> None:
    command = ("train", world.config, f"--workdir={tmp_path / 'run'}")
    stopped = done(*command, "--stop_at_step=5")
    assert "stopped at step 5 of 10" in stopped.out and "run the same command to go on" in stopped.out
    assert steps(tmp_path / "run") == [4, 5]
    assert_same_state(tmp_path / "run", straight, 5)
    resumed = done(*command)
    assert "resumed at step 5 of 10" in resumed.err and "finished at step 10" in resumed.out
    assert_same_run(tmp_path / "run", straight)


def test_sigterm_saves_and_resume_is_never_having_stopped(
    world: World, straight: Path, tmp_path: Path, start_paused: Callable[..., PausedRun]
) -> None:
    workdir = tmp_path / "run"
    paused = start_paused(6, world, workdir)
    paused.process.send_signal(signal.SIGTERM)
    status, out, err = paused.go_on()
    assert status == 128 + signal.SIGTERM == 143, err
    assert "stopped at step 6 of 10" in out and "Traceback" not in err
    assert_same_state(workdir, straight, 6)
    done("train", world.config, f"--workdir={workdir}")
    assert_same_run(workdir, straight)


def test_a_signal_while_the_processes_ask_each_other_is_not_lost(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too late for the third question it is in the fourth, whose answer comes before the fifth step."""
    asked = []

    def ask(value: int) -> Callable[[], int]:
        asked.append(value)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGTERM)
        return lambda: value

    monkeypatch.setattr("intttrain.app.interrupts.process_count", lambda: 2)
    monkeypatch.setattr("intttrain.app.interrupts.ask_largest", ask)
    outcome = cli("train", world.config, f"--workdir={tmp_path / 'run'}")
    assert outcome.status == 143 and asked[:4] == [0, 0, 0, signal.SIGTERM]
    assert "stopped at step 4 of 10" in outcome.out


def test_control_c_saves_first(world: World, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(batch: Batch) -> Batch:
        signal.raise_signal(signal.SIGINT)
        return batch

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    intercept(monkeypatch, 3, press)
    outcome = cli("train", world.config, f"--workdir={tmp_path / 'run'}")
    assert outcome.status == 130
    assert "stopped at step 3 of 10" in outcome.out
    assert_same_state(tmp_path / "run", straight, 3)
    assert metrics(tmp_path / "run") == metrics(straight)[:3]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_second_control_c_ends_at_once_and_loses_at_most_what_came_after_the_checkpoint(
    world: World, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_twice(batch: Batch) -> Batch:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return batch

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as context:
        intercept(context, 7, press_twice)
        outcome = cli("train", world.config, f"--workdir={tmp_path / 'run'}")
    assert (outcome.status, outcome.err.splitlines()[-1]) == (130, "error: interrupted")
    assert steps(tmp_path / "run") == [4]
    assert signal.getsignal(signal.SIGINT) == handler
    assert "resumed at step 4" in done("train", world.config, f"--workdir={tmp_path / 'run'}").err
    assert_same_run(tmp_path / "run", straight)  # the records of steps 5 and 6 are there once


def test_resuming_a_finished_run_does_nothing_and_says_so(
    world: World, straight: Path, copy_of: CopyOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = copy_of(10)
    make_program = loop.make_program
    monkeypatch.setattr(
        loop, "make_program", lambda config: dataclasses.replace(make_program(config), step=lambda *_: pytest.fail())
    )
    with unchanged(workdir / "checkpoints"):
        outcome = done("train", world.config, f"--workdir={workdir}")
    assert "resumed at step 10 of 10, nothing is left to do" in outcome.err
    assert "finished at step 10" in outcome.out
    assert metrics(workdir) == metrics(straight)


@pytest.mark.parametrize("step", [0, 4])
def test_stop_at_a_step_that_is_behind_stops_at_once(world: World, copy_of: CopyOf, step: int) -> None:
    workdir = copy_of(4)
    with unchanged(workdir / "checkpoints"):
        outcome = done("train", world.config, f"--workdir={workdir}", f"--stop_at_step={step}")
    assert "stopped at step 4 of 10" in outcome.out


# --- the same run or another one -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("--config.train.num_steps=12", "train.num_steps=10 in the run but 12 now"),
        ("--config.model.ttt.eta=0.5", "model.ttt.eta=0.3 in the run but 0.5 now"),
        ("--config.train.seed=7", "train.seed=0 in the run but 7 now"),
        ("--config.train.batch_rows=4", "train.batch_rows=2 in the run but 4 now"),
    ],
)
def test_another_configuration_is_refused_with_both_values(
    world: World, copy_of: CopyOf, flag: str, difference: str
) -> None:
    workdir = copy_of(4)
    with unchanged(workdir):
        assert difference in error_line(cli("train", world.config, f"--workdir={workdir}", flag))


def test_another_store_is_refused_and_a_moved_one_is_not(world: World, copy_of: CopyOf, tmp_path: Path) -> None:
    workdir, other = copy_of(10), tmp_path / "other"
    done("prepare", world.config, f"--output={other}", "--config.prepare.heldout_fraction=0.6")
    shutil.copytree(world.root / "data" / "train", tmp_path / "moved")
    path = "--config.data.train=({'path': '%s', 'weight': 1.0},)"
    with unchanged(workdir):
        line = error_line(cli("train", world.config, f"--workdir={workdir}", path % (other / "train")))
    old, new = (word for word in line.split() if len(word) == 16 and set(word) <= set("0123456789abcdef"))
    assert old != new and "the token store has fingerprint" in line
    assert "finished at step 10" in done("train", world.config, f"--workdir={workdir}", path % (tmp_path / "moved")).out


def test_what_is_only_shown_may_change(world: World, straight: Path, copy_of: CopyOf) -> None:
    workdir = copy_of(4)
    outcome = done("train", world.config, f"--workdir={workdir}", "--config.train.log_every_steps=4")
    assert [record["step"] for record in metrics(workdir)] == [1, 2, 3, 4, 8, 10]
    assert [line.split()[1] for line in outcome.out.splitlines() if line.startswith("step ")] == ["8/10", "10/10"]
    assert_same_state(workdir, straight, NUM_STEPS)


# --- steps that are not finite -------------------------------------------------------------------------------------


def spoil_second_row(batch: Batch) -> Batch:
    weights_BT = np.array(batch.loss_weights_BT)
    weights_BT[1, 5] = np.inf
    return dataclasses.replace(batch, loss_weights_BT=weights_BT)


@pytest.mark.parametrize("step", [4, 6, 10], ids=["at a checkpoint", "between checkpoints", "at the end"])
def test_non_finite_step_is_not_applied_and_names_its_row(
    world: World, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    workdir = tmp_path / "run"
    with monkeypatch.context() as context:
        intercept(context, step, spoil_second_row)
        outcome = cli("train", world.config, f"--workdir={workdir}", "--config.train.skip.max_in_a_row=1")
    line = error_line(outcome, status=3, after_other_lines=True)
    row = step * BATCH_ROWS - 1
    assert f"step {step}: loss=nan" in line and f"step {step - 1} is saved" in line
    assert f"row {row}: {world.root / 'data' / 'train'}" in line and f"row {row - 1}:" not in line
    assert steps(workdir)[-1] == step - 1
    assert_same_state(workdir, straight, step - 1)
    assert metrics(workdir) == metrics(straight)[: step - 1]
    if step == 6:
        done("train", world.config, f"--workdir={workdir}")
        assert_same_run(workdir, straight)


def drop(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Leaves batches out, counted from the start of the process."""
    make_batches = loop.make_batches

    def make_fewer(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        return (batch for n, batch in enumerate(make_batches(*args, **kwargs), start=1) if n not in numbers)

    monkeypatch.setattr(loop, "make_batches", make_fewer)


def spoil_rows(monkeypatch: pytest.MonkeyPatch, batches: tuple[int, ...], change: Callable[[Batch], Batch]) -> None:
    """Changes batches whenever they are read, counted from the beginning of the data."""
    make_batches = loop.make_batches

    def make_spoiled(*args: Any, cursor: int, **kwargs: Any) -> Iterator[Batch]:
        for n, batch in enumerate(make_batches(*args, cursor=cursor, **kwargs), start=cursor // BATCH_ROWS + 1):
            yield change(batch) if n in batches else batch

    monkeypatch.setattr(loop, "make_batches", make_spoiled)


def surprise(batch: Batch) -> Batch:
    """Every label is a byte that text does not have."""
    return dataclasses.replace(batch, labels_BT=np.full_like(batch.labels_BT, 1))


SPIKES = ("--config.train.skip.spike_deviations=1", "--config.train.schedule.peak_learning_rate=0.03")


@pytest.mark.parametrize(
    ("change", "flags", "reason"),
    [(spoil_second_row, (), "loss=nan"), (surprise, SPIKES, "a spike")],
    ids=["not finite", "a spike"],
)
def test_bad_batches_are_skipped_as_if_they_were_not_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, flags: tuple[str, ...], reason: str
) -> None:
    """One in the middle, two in a row at a checkpoint, and one at the end; also over a stop between the two."""
    monkeypatch.setattr("intttrain.train.step.SPIKE_WINDOW", 3)
    bad = (5, 7, 8, 13)
    with monkeypatch.context() as context:
        drop(context, *bad)
        done("train", world.config, f"--workdir={tmp_path / 'without'}", *flags)
    with monkeypatch.context() as context:
        spoil_rows(context, bad, change)
        whole = done("train", world.config, f"--workdir={tmp_path / 'whole'}", *flags)
        done("train", world.config, f"--workdir={tmp_path / 'parts'}", *flags, "--stop_at_step=5")
        done("train", world.config, f"--workdir={tmp_path / 'parts'}", *flags)
    lines = [line for line in whole.err.splitlines() if "skipped" in line]
    assert len(lines) == 4 and all(reason in line for line in lines), whole.err
    assert "step 5:" in lines[0] and "1 in a row, 1 in all" in lines[0]
    assert "step 6:" in lines[2] and "2 in a row, 3 in all" in lines[2]
    wanted = saved(tmp_path / "without", NUM_STEPS)
    for name in ("whole", "parts"):
        found = saved(tmp_path / name, NUM_STEPS)
        assert int(found.pop("data_cursor")) == (NUM_STEPS + len(bad)) * BATCH_ROWS
        for key, array in found.items():
            np.testing.assert_array_equal(array, wanted[key], err_msg=f"{name}: {key}")
        with Checkpoints(tmp_path / name / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
            skipped = checkpoints.read_info(NUM_STEPS).skipped
        assert [list(batch) for batch in skipped] == [[4, 8], [5, 12], [5, 14], [9, 24]]


def test_three_in_a_row_stop_the_run_with_a_report_and_more_may_be_allowed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    spoil_rows(monkeypatch, (6, 7, 8), spoil_second_row)
    line = error_line(cli("train", world.config, f"--workdir={workdir}"), status=3, after_other_lines=True)
    assert "step 6: loss=nan" in line and "step 5 is saved" in line and "3 in a row" in line
    assert "batches at data cursor 10, 12" in line and "row 15:" in line and "train.skip.max_in_a_row=3" in line
    again = error_line(cli("train", world.config, f"--workdir={workdir}"), status=3, after_other_lines=True)
    assert again == line, "nothing has changed"
    outcome = done("train", world.config, f"--workdir={workdir}", "--config.train.skip.max_in_a_row=4")
    assert "3 in a row, 3 in all" in outcome.err and steps(workdir)[-1] == NUM_STEPS
    few = cli("train", world.config, f"--workdir={tmp_path / 'few'}", "--config.train.skip.max_total=2")
    assert "2 in all (train.skip.max_total=2)" in error_line(few, status=3, after_other_lines=True)


def test_a_model_that_starts_broken_is_refused_at_its_first_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program = loop.make_program

    def make_broken_program(config: Config) -> Program:
        program = make_program(config)
        return dataclasses.replace(program, init=lambda: broken(program.init()))

    def broken(state: TrainState) -> TrainState:
        params: Any = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), state["params"])
        return {**state, "params": params}

    monkeypatch.setattr(loop, "make_program", make_broken_program)
    command = ("train", world.config, f"--workdir={tmp_path / 'run'}", "--config.train.skip.max_in_a_row=1")
    line = error_line(cli(*command), status=3, after_other_lines=True)
    assert "step 1: loss=nan" in line and "step 0 is saved" in line
    assert "row 0:" in line and "row 1:" in line  # nothing says which one it was
    assert steps(tmp_path / "run") == [0]
    assert not (tmp_path / "run" / METRICS_FILE).read_text()


# --- trouble with the disk -----------------------------------------------------------------------------------------


def test_full_disk_ends_the_run_with_one_line_and_leaves_the_last_checkpoint(
    world: World, straight: Path, tmp_path: Path, start_paused: Callable[..., PausedRun]
) -> None:
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("limits of another process can be set on Linux only")
    workdir = tmp_path / "run"
    paused = start_paused(7, world, workdir)
    until(lambda: steps(workdir) == [4])  # saved in the background
    # Several arrays may share a file or not, as their writes happen to end, but no array is divided: the limit is half
    # of the largest one's share (numbers that compress by 4 % only), so that every layout of a checkpoint exceeds it.
    largest_array = max(array.nbytes for array in saved(straight, 8).values())
    limit = largest_array // 2
    logs = max(path.stat().st_size for path in straight.rglob("*events*"))
    assert logs < limit, "the limit would stop the metrics, not the checkpoint"
    # Writes beyond the limit fail with EFBIG, as they do with ENOSPC when a disk is full (Python ignores SIGXFSZ).
    resource.prlimit(paused.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    status, _, err = paused.go_on()
    assert (status, "Traceback" in err) == (2, False), err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "checkpoint step 8 could not be written" in line and "step 4 is complete and can be restored" in line
    assert steps(workdir) == [4]
    assert_same_state(workdir, straight, 4)
    done("train", world.config, f"--workdir={workdir}")
    assert_same_run(workdir, straight)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "4", "8"]  # nothing half done


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_damaged_newest_checkpoint_is_refused_where_it_is_asked_for_and_left_behind_in_training(
    world: World, straight: Path, copy_of: CopyOf
) -> None:
    workdir = copy_of(4, 8)
    file = largest_file(workdir / "checkpoints" / "8" / "params")
    os.truncate(file, file.stat().st_size // 2)
    generate = ("generate", "--prompt=a", "--max_new_tokens=2", f"--workdir={workdir}")
    with unchanged(workdir):
        line = error_line(cli(*generate))
        assert "checkpoint step 8" in line and "damaged or incomplete" in line
        assert "step 4 is complete: use --step=4, or intttrain train goes on from there" in line
        done(*generate, "--step=4")
    outcome = done("train", world.config, f"--workdir={workdir}")
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("warning:"))
    assert "checkpoint step 8 is damaged or incomplete (" in line
    assert line.endswith("and was renamed to 8.damaged; going on from step 4")
    assert "resumed at step 4 of 10" in outcome.err
    assert_same_run(workdir, straight)
    assert_same_state(workdir, straight, 8)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "4", "8", "8.damaged"]


# --- what is written -----------------------------------------------------------------------------------------------


def test_metrics_of_every_step(straight: Path, dense: Path) -> None:
    records = read_metrics(straight / METRICS_FILE)
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    always = {"step", "loss", "grad_norm", "learning_rate", "tokens"}
    ttt = {"ttt/delta_0", "ttt/state_0", "ttt/eta"}
    assert set(records[0]) == always | ttt  # the first step compiles: no rate yet
    assert all(set(record) == always | ttt | {"tokens_per_second", "eta_seconds"} for record in records[1:])
    assert all(0 < record["tokens"] <= BATCH_ROWS * 64 for record in records)
    assert all(record["ttt/eta"] == pytest.approx(0.3) for record in records)
    assert records[0]["ttt/delta_0"] == records[0]["ttt/state_0"] == 0  # the target starts at zero
    assert all(record["ttt/state_0"] >= record["ttt/delta_0"] > 0 for record in records[1:])
    assert records[-1]["loss"] < records[0]["loss"]
    assert not any(name.startswith("ttt/") for record in read_metrics(dense / METRICS_FILE) for name in record)
    assert list((straight / "tensorboard").glob("*events*"))


def test_a_state_that_outgrows_its_weight_is_reported_once(wild: tuple[Path, str]) -> None:
    workdir, err = wild
    large = [
        record for record in read_metrics(workdir / METRICS_FILE) if record["ttt/state_0"] > step_log.STATE_WARNING
    ]
    assert len(large) > 1, "no second step that could have warned again"
    warnings = [line for line in err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert f"step {large[0]['step']}:" in warnings[0] and "model.ttt.eta" in warnings[0]


def test_healthy_run_does_not_warn(world: World, copy_of: CopyOf) -> None:
    assert "warning" not in done("train", world.config, f"--workdir={copy_of(8)}").err
