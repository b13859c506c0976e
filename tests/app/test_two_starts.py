"""Two starts in one workdir: one is refused, or follows the other, at whatever moment it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from intttrain.app.runs import Identity, claim_workdir
from intttrain.config.errors import RESTART_STATUS, UserError
from intttrain.logs import lease
from intttrain.logs.lease import Lease
from intttrain.logs.workdir import make_place
from intttrain.storage import processes
from tests import processes as several
from tests.app.fake_gcs import served
from tests.app.held import MOMENTS
from tests.app.small import NUM_STEPS, REPO, World, assert_same_run, assert_same_state, cli, error_line, metrics, steps
from tests.app.test_bucket import download
from tests.logs.test_lease import forge


class Held:
    """A training process that stands still at ``MOMENTS``."""

    def __init__(self, world: World, workdir: str, log: Path, beat_s: float) -> None:
        cache = str(jax.config.jax_compilation_cache_dir)
        command = [sys.executable, "-m", "tests.app.held", str(beat_s), "train", world.config, f"--workdir={workdir}"]
        self._log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache},
            )  # fmt: skip

    def wait_until(self, moment: str) -> None:
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) != f"HELD {moment}\n":
            assert line and not line.startswith("HELD"), self._log.read_text()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Returns status and standard error."""
        self.process.communicate(timeout=300)
        return self.process.returncode, self._log.read_text()


@contextlib.contextmanager
def held_run(world: World, workdir: str | Path, log: Path, beat_s: float) -> Iterator[Held]:
    run = Held(world, str(workdir), log, beat_s)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.communicate()


def lease_text(workdir: str | Path) -> str:
    (file,) = (path for path in (make_place(str(workdir)) / lease.FOLDER).iterdir() if path.suffix == ".json")
    return str(file.read_text())


def check_refused_at_all_moments(world: World, workdir: str | Path, log: Path) -> None:
    with held_run(world, workdir, log, beat_s=0.5) as run:
        for moment in MOMENTS:
            run.wait_until(moment)
            while moment == "end" and '"ending": true' not in lease_text(workdir):
                time.sleep(0.05)  # until it has said so
            outcome = cli("train", world.config, f"--workdir={workdir}")
            if moment == "end":  # which one who is patient waits for
                assert "does not come to its end" in error_line(outcome, RESTART_STATUS)
            else:
                line = error_line(outcome)
                assert f"--workdir={workdir} is in use by process {run.process.pid} on host" in line, moment
            run.go_on()
        status, output = run.end()
        assert status == 0 and "warning" not in output, output


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "ENDING_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_second_start_is_refused_in_a_folder(world: World, straight: Path, tmp_path: Path) -> None:
    check_refused_at_all_moments(world, tmp_path / "run", tmp_path / "log")
    assert_same_run(tmp_path / "run", straight)
    assert steps(tmp_path / "run") == [4, 8, NUM_STEPS]


@pytest.mark.usefixtures("impatient")
def test_a_second_start_is_refused_in_a_bucket(world: World, straight: Path, tmp_path: Path) -> None:
    pytest.importorskip("gcsfs")
    with served() as gcs:
        check_refused_at_all_moments(world, gcs.run, tmp_path / "log")
        run = download(gcs, tmp_path / "run")
    assert_same_state(run, straight, NUM_STEPS)
    assert metrics(run) == metrics(straight)


def test_one_that_was_killed_before_it_had_a_configuration_is_followed(tmp_path: Path) -> None:
    identity, lines = Identity({"seed": 0}, "rows", {"kind": "bytes"}), list[str]()
    forge(tmp_path, who=processes.describe_self() | {"began": 5})
    (tmp_path / ".config.json.partial-1a2b3c4d-0a1b2c3d").write_text('{"flat')
    with Lease(tmp_path, lines.append, print) as held:
        claim_workdir(tmp_path, identity, held)
    assert (tmp_path / "config.json").exists() and len(lines) == 1 and "going on in its place" in lines[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty"), Lease(tmp_path / "other", print, print) as held:
        claim_workdir(tmp_path / "other", identity, held)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_one_that_was_suspended_in_a_save_and_followed_writes_nothing_more(
    world: World, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    with held_run(world, workdir, tmp_path / "log", beat_s=0.3) as run:
        for moment in MOMENTS[:3]:
            run.wait_until(moment)
            run.go_on()
        run.wait_until("save")
        run.process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(processes, "_kernel", lambda: "another host")
        outcome = cli("train", world.config, f"--workdir={workdir}")
        assert outcome.status == 0 and outcome.err.count("going on in its place") == 1, outcome
        run.process.send_signal(signal.SIGCONT)
        run.go_on()
        status, output = run.end()
    assert status == 2 and f"error: --workdir={workdir} was taken over by process {os.getpid()} on host" in output
    assert_same_run(workdir, straight)
    assert steps(workdir) == [4, 8, NUM_STEPS]  # files that were under way may lie beside them, unfinished


def test_all_processes_of_a_second_start_are_refused(world: World, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    command = ["-m", "intttrain", "train", world.config, f"--workdir={workdir}"]
    with Lease(workdir, print, print) as held:
        held.claim()
        with several.processes(tmp_path, [command, command]) as second:
            assert [second.status(index) for index in range(2)] == [2, 2]
            for index in range(2):
                assert f"is in use by process {os.getpid()}" in second.error_line(index)
    assert sorted(path.name for path in workdir.iterdir()) == ["lease"], "nothing of a run"
