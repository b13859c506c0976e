"""One start at a time in a workdir; where processes matter they are real ones (`tests/logs/holder.py`)."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from intttrain.config.errors import UserError, WaitedError
from intttrain.logs import lease
from intttrain.logs.lease import FOLDER, SEEN_BEATS, Lease
from intttrain.logs.workdir import make_place
from intttrain.storage import processes
from intttrain.storage.files import Place
from tests.app.fake_gcs import served
from tests.processes import REPO

BEAT_S = 0.3  # a process of a busy machine may not run for a second
Hold = Callable[..., "Holder"]


class Holder:
    """A process that takes a workdir, or tries to."""

    def __init__(self, workdir: Path, kernel: str) -> None:
        command = [sys.executable, "-m", "tests.logs.holder", str(workdir), str(BEAT_S), kernel]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=REPO, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def tell(self, word: str) -> str:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; its last line says why
            self.process.stdin.write(f"{word}\n")
        return self.line()

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """``hold()`` starts a process that takes ``tmp_path``; its arguments say what it seems to be."""
    holders: list[Holder] = []

    def start(kernel: str = "here", *, claims: bool = True) -> Holder:
        holders.append(Holder(tmp_path, kernel))
        assert not claims or holders[-1].line() == "claimed"
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        for stream in (holder.process.stdin, holder.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "folder":
        yield tmp_path / "run"
        return
    pytest.importorskip("gcsfs")
    with served() as gcs:
        yield make_place(gcs.run)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", BEAT_S)


def files(workdir: Place) -> list[str]:
    return sorted(path.name for path in (workdir / FOLDER).iterdir()) if (workdir / FOLDER).exists() else []


def forge(workdir: Place, **changed: object) -> None:
    """Leaves what a start of another host leaves that was killed."""
    who = {"host": "elsewhere", "process": 1, "kernel": "another", "began": 5}
    start = {"id": "a", "who": who, "since": "2026-01-01 00:00:00 UTC", "beat_s": BEAT_S, **changed}
    (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    (workdir / FOLDER / "7.json").write_text(json.dumps(start))


def raise_error(error: UserError) -> None:
    raise error


def test_a_second_start_is_refused_and_the_first_not_disturbed(hold: Hold, tmp_path: Path) -> None:
    first = hold()
    second = hold(claims=False)
    line = second.line()
    assert second.process.wait(60) == 2 and line.startswith(f"error: --workdir={tmp_path} is in use by process"), line
    assert f"process {first.process.pid} on host" in line and f"kill {first.process.pid}" in line
    assert first.tell("check") == "done" and files(tmp_path) == ["1.json"]
    first.leave()
    assert hold().tell("check") == "done" and files(tmp_path) == ["2.json"]  # and nothing was said about the first


def test_a_killed_start_is_followed_at_once_even_when_nobody_counted_it_out(hold: Hold, tmp_path: Path) -> None:
    first = hold()
    first.process.kill()
    while Path(f"/proc/{first.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    second = hold(claims=False)
    line = second.line()
    assert f"process {first.process.pid} on host" in line and "is gone without an end; going on in its place" in line
    assert second.line() == "claimed" and files(tmp_path) == ["2.json"]


def test_the_number_of_a_process_that_came_later_means_nothing(tmp_path: Path) -> None:
    forge(tmp_path, who={**processes.describe_self(), "began": 5})
    lines: list[str] = []
    with Lease(tmp_path, lines.append, raise_error) as held:
        held.claim()
    assert len(lines) == 1 and "is gone without an end" in lines[0]


def test_one_that_beats_elsewhere_is_refused_and_a_silent_one_followed(hold: Hold, tmp_path: Path) -> None:
    first = hold("host-a")
    second = hold("host-b", claims=False)
    assert "waiting up to" in second.line() and "is in use by process" in second.line()
    assert second.process.wait(60) == 2

    first.process.send_signal(signal.SIGSTOP)
    third = hold("host-b", claims=False)
    lines = [third.line(), third.line(), third.line()]
    assert "waiting up to" in lines[0] and "was silent for" in lines[1] and lines[2] == "claimed", lines
    first.process.send_signal(signal.SIGCONT)
    line = first.line()
    assert line.startswith(f"error: --workdir={tmp_path} was taken over by process {third.process.pid} on host"), line
    assert first.process.wait(60) == 2
    assert third.tell("check") == "done" and files(tmp_path) == ["2.json"]


def test_one_that_was_suspended_for_a_whole_other_start_ends_too(hold: Hold, tmp_path: Path) -> None:
    first = hold("host-a")
    first.process.send_signal(signal.SIGSTOP)
    second = hold("host-b", claims=False)
    while second.line() != "claimed":
        pass
    second.leave()
    first.process.send_signal(signal.SIGCONT)
    assert f"was taken over by process {second.process.pid}" in first.line() and first.process.wait(60) == 2


def test_a_claim_that_a_failure_cut_off_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(tmp_path, print, raise_error) as held:
        numbers, failures = held._numbers, [OSError(errno.ESTALE, "Stale file handle")]

        def fail_once() -> set[int]:
            if numbers() and failures:
                raise failures.pop()
            return numbers()

        monkeypatch.setattr(held, "_numbers", fail_once)
        with pytest.raises(OSError, match="Stale"):
            held.claim()
        held.claim()
        held.claim()  # has it already
        assert files(tmp_path) == ["1.json"]
        held.check()


@pytest.mark.parametrize("kernel", ["here", "host-b"])
def test_one_that_is_about_to_end_is_waited_for(hold: Hold, kernel: str) -> None:
    first = hold()
    assert first.tell("ending") == "done"
    first_file = "not yet"
    while '"ending": true' not in first_file:
        first_file = next(iter((Path(first.process.args[3]) / FOLDER).glob("*.json"))).read_text()
    second = hold(kernel, claims=False)
    assert "waiting for the end of process" in second.line()
    first.leave()
    assert second.line() == "claimed"


def test_waiting_for_an_end_has_an_end(tmp_path: Path) -> None:
    now = 0.0
    watch = lease._Watch(tmp_path, print, clock=lambda: now)
    for beat in range(3):
        now = beat * lease.ENDING_S / 2
        forge(tmp_path, beats=beat, ending=True)
        text = (tmp_path / FOLDER / "7.json").read_text()
        if beat < 2:
            assert not watch.may_take(7, text)
    with pytest.raises(WaitedError, match="does not come to its end in 900 s"):
        watch.may_take(7, text)


def test_a_beat_alone_is_no_life_and_a_start_that_says_nothing_is_waited_for(tmp_path: Path) -> None:
    now, lines = 0.0, list[str]()
    watch = lease._Watch(tmp_path, lines.append, clock=lambda: now)
    assert not watch.may_take(3, "") and not watch.may_take(3, "{")
    now = 0.9 * lease.SILENT_BEATS * BEAT_S
    assert not watch.may_take(3, "{")
    now = 1.1 * lease.SILENT_BEATS * BEAT_S
    assert watch.may_take(3, "{") and len(lines) == 2
    assert SEEN_BEATS > 1


@pytest.mark.parametrize("before", ["nothing", "killed", "ended"])
def test_one_of_several_at_the_same_moment(place: Place, before: str) -> None:
    if before != "nothing":
        forge(place, ended=before == "ended", who={**processes.describe_self(), "began": 5})
    outcomes: list[str] = []
    ready, done = threading.Barrier(3), threading.Barrier(3)

    def start() -> None:
        with Lease(place, lambda _: None, raise_error) as held:
            ready.wait(60)
            try:
                held.claim()
                held.check()
                outcomes.append("claimed")
            except UserError as error:
                outcomes.append(str(error))
            done.wait(60)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("claimed") == 1 and len(outcomes) == 3, outcomes
    assert all("is in use by process" in outcome for outcome in outcomes if outcome != "claimed")
    assert files(place) == [{"nothing": "1.json", "killed": "8.json", "ended": "8.json"}[before]]
    assert json.loads((place / FOLDER / files(place)[0]).read_text())["ended"]


def test_a_silent_start_of_another_host_is_followed(place: Place) -> None:
    forge(place)
    lines: list[str] = []
    with Lease(place, lines.append, raise_error) as held:
        held.claim()
        assert [line.split(": ", 1)[1][:7] for line in lines] == ["waiting", "process"], lines
        held.check()
        assert files(place) == ["8.json"]


def test_files_that_are_gone_or_of_a_later_start_end_the_start(place: Place) -> None:
    for spoil in (lambda: (place / FOLDER / "8.json").unlink(), lambda: (place / FOLDER / "20.json").write_text("{}")):
        forge(place, ended=True)
        with pytest.raises(UserError, match="writes nothing more"), Lease(place, print, lambda _: None) as held:
            held.claim()
            spoil()
            held.check()
        for name in files(place):
            (place / FOLDER / name).unlink()


def test_beats_that_cannot_be_written_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    tried = threading.Semaphore(0)

    def fail(*_: object) -> None:
        tried.release()
        raise OSError(errno.ESTALE, "Stale file handle")

    with Lease(tmp_path, lines.append, raise_error) as held:
        held.claim()
        monkeypatch.setattr(lease, "write_text", fail)
        for _ in range(3):
            assert tried.acquire(timeout=60)
        held.check()
    assert len(lines) == 1 and "Stale file handle" in lines[0] and "training goes on" in lines[0], lines
