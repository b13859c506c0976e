"""Runs beside which something fails: files, standard output, storage that does not answer for a while."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from intttrain.app import loop
from intttrain.app.runs import ID_FILE, read_run_id
from intttrain.config.errors import PassingError, UserError
from intttrain.logs import side_channels
from intttrain.logs.metrics import METRICS_FILE
from intttrain.storage import retries
from tests.app.small import NUM_STEPS, REPO, World, assert_same_run, cli, done, error_line, metrics, steps

STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between attempts."""
    monkeypatch.setattr(retries, "WAITS_S", (0.0,) * 3)
    monkeypatch.setattr(side_channels, "LAST_WAITS_S", ())


@pytest.fixture
def failing_open(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``failing_open(name, error, counts)`` has the n-th opening of a file for writing fail, for n in ``counts``."""

    def fail(name: str, error: OSError, counts: range) -> None:
        opened, seen = Path.open, [0]

        def open_or_fail(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if self.name == name and mode != "r":
                seen[0] += 1
                if seen[0] in counts:
                    raise error
            return opened(self, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", open_or_fail)

    return fail


@pytest.mark.parametrize("count", [1, 4, 1000])
def test_metrics_that_cannot_be_written_end_nothing(
    count: int, world: World, straight: Path, tmp_path: Path, failing_open: Callable[..., None]
) -> None:
    workdir = tmp_path / "run"
    failing_open(METRICS_FILE, STALE, range(6, 6 + count))  # the first time is the start
    err = done("train", world.config, f"--workdir={workdir}").err
    assert err.count("warning: metrics.jsonl cannot be written (Stale file handle)") == 1, err
    assert steps(workdir)[-1] == NUM_STEPS
    if count < 1000:
        assert_same_run(workdir, straight)
        assert "metrics.jsonl can be written again; no record is missing" in err
    else:
        assert [record["step"] for record in metrics(workdir)] == [1, 2, 3, 4]
        assert "warning: metrics.jsonl lacks 6 records (Stale file handle)" in err


def test_a_workdir_whose_metrics_cannot_be_written_at_the_start_is_refused(
    world: World, tmp_path: Path, failing_open: Callable[..., None]
) -> None:
    failing_open(METRICS_FILE, FULL, range(1, 1000))
    line = error_line(cli("train", world.config, f"--workdir={tmp_path / 'run'}"), after_other_lines=True)
    assert "cannot write metrics to" in line and "No space left on device" in line


def test_step_times_that_cannot_be_written_end_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(loop, "write_json", refuse)
    err = done("train", world.config, f"--workdir={tmp_path / 'run'}").err
    assert "warning: step_times.json cannot be written (No space left on device); the run goes on" in err
    assert steps(tmp_path / "run")[-1] == NUM_STEPS


@pytest.mark.parametrize(
    "redirection",
    [
        "| head -1",
        *(pytest.param(other, marks=pytest.mark.slow) for other in (">&- 2>&-", "2>&1 | head -1", "> /dev/full")),
    ],
)
def test_standard_output_that_nobody_takes_ends_nothing(redirection: str, world: World, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    flags = f"{world.config} --workdir={workdir} --config.train.num_steps=6"
    command = f"set -o pipefail; '{sys.executable}' -m intttrain train {flags} {redirection}"
    cache = str(jax.config.jax_compilation_cache_dir)
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False, cwd=REPO,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert steps(workdir)[-1] == 6 and len(metrics(workdir)) == 6
    assert "Exception ignored" not in result.stderr and "Traceback" not in result.stderr
    told = "warning: lines of steps cannot be shown (" in result.stderr
    assert told == (redirection in ("| head -1", "> /dev/full")), result.stderr


class Failing:
    """Fails the calls of a method whose numbers are in ``counts``, before it does anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, counts: range) -> None:
        self.count, original = 0, getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count in counts:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


def test_a_save_in_the_background_that_fails_for_a_reason_that_passes_is_made_again(
    world: World, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, os, "rename", STALE, range(1, 2))
    err = done("train", world.config, f"--workdir={tmp_path / 'run'}").err
    assert "checkpoint step 4 could not be written to" in err and "Stale file handle" in err
    assert "; saving step " in err or "step 8 cannot be saved" in err, "noticed at a step, or when the next save waits"
    assert 4 not in steps(tmp_path / "run") and len(steps(tmp_path / "run")) >= 2
    assert_same_run(tmp_path / "run", straight)


def test_a_last_save_is_tried_again(
    world: World, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, os, "rename", STALE, range(1, 3))
    command = ("train", world.config, f"--workdir={tmp_path / 'run'}", "--config.train.checkpoint.every_steps=100")
    err = done(*command).err
    assert err.count("warning: step 10 cannot be saved (") == 2, err
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(("error", "status"), [(STALE, 4), (FULL, 2)])
def test_a_save_that_stays_impossible_ends_with_the_status_of_its_reason(
    error: OSError, status: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, os, "rename", error, range(1, 1000))
    line = error_line(cli("train", world.config, f"--workdir={tmp_path / 'run'}"), status, after_other_lines=True)
    assert "could not be written to" in line and str(error.strerror) in line
    assert ("Free space" in line) == (status == 2)


@pytest.mark.parametrize("count", [1, 1000])
def test_rows_that_cannot_be_read_for_a_while(
    count: int, world: World, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the store is read anew; a run that cannot read on saves first."""
    make_batches, seen = loop.make_batches, [0]

    def make_failing_batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in make_batches(*args, **kwargs):
            seen[0] += 1
            if seen[0] in range(6, 6 + count):
                raise STALE
            yield batch

    monkeypatch.setattr(loop, "make_batches", make_failing_batches)
    workdir = tmp_path / "run"
    command = ("train", world.config, f"--workdir={workdir}")
    if count == 1:
        assert "warning: rows cannot be read (Stale file handle); trying again" in done(*command).err
    else:
        line = error_line(cli(*command), 4, after_other_lines=True)
        assert "Stale file handle" in line and steps(workdir) == [4, 5], "saved before it ended"
        monkeypatch.setattr(loop, "make_batches", make_batches)
        assert "resumed at step 5" in done(*command).err
    assert_same_run(workdir, straight)


def test_a_run_that_cannot_restore_for_a_while(
    world: World, straight: Path, copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = copy_of(4)
    error = PassingError("checkpoint step 4 cannot be read")
    Failing(monkeypatch, loop.Checkpoints, "restore_latest", error, range(1, 3))
    assert "resumed at step 4" in done("train", world.config, f"--workdir={workdir}").err
    assert_same_run(workdir, straight)


def test_the_id_of_a_run_is_made_once_and_moves_with_it(world: World, tmp_path: Path) -> None:
    command = ("train", world.config, "--stop_at_step=1")
    for name in ("one", "two"):
        done(*command, f"--workdir={tmp_path / name}")
    first = read_run_id(tmp_path / "one")
    assert first != read_run_id(tmp_path / "two")
    shutil.move(tmp_path / "one", tmp_path / "moved")
    done(*command, f"--workdir={tmp_path / 'moved'}")
    assert read_run_id(tmp_path / "moved") == first
    (tmp_path / "moved" / ID_FILE).unlink()  # a run that is older than the file
    done(*command, f"--workdir={tmp_path / 'moved'}")
    assert read_run_id(tmp_path / "moved") != first
    (tmp_path / "moved" / ID_FILE).write_text("my run\n")
    line = error_line(cli(*command, f"--workdir={tmp_path / 'moved'}"))
    assert "run_id holds 'my run'" in line and "16 hexadecimal digits" in line
    with pytest.raises(UserError):
        read_run_id(tmp_path / "moved")
