"""Who is lost, who decides it, and that nobody waits forever: the rules with a clock by hand, then real processes."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intttrain.config.errors import RESTART_STATUS, UserError
from intttrain.pod import watchdog as module
from intttrain.pod.verdict import FINISHED, TRAINING, Judge, Verdict
from intttrain.pod.watchdog import LONG_PHASE, Timing, Watchdog
from tests.pod.shelf import Shelf
from tests.processes import processes
from tests.train.checkpoint_cases import run_python

HOST = socket.gethostname()
WATCHED = str(Path(__file__).parent / "watched.py")


class Run:
    """Three processes on hosts a, b, c, and the judge of process 0, who looks once a second."""

    def __init__(self) -> None:
        self.shelf, self.now, self.count = Shelf(), 0.0, 0
        self.judge = Judge(self.shelf, settle_s=10.0, silence_s=80.0, clock=lambda: self.now)

    def beat(self, *indices: int, step: int = 7, phase: str = TRAINING) -> None:
        self.count += 1
        for index in indices:
            document = {"host": "abc"[index], "step": step, "phase": phase, "count": self.count}
            self.shelf.documents["beat", index] = document

    def fail(self, index: int, line: str = "connection closed", *, kind: str = "error", status: int = 1) -> None:
        document = {"host": "abc"[index], "step": 7, "kind": kind, "line": line, "status": status}
        self.shelf.documents["failure", index] = document

    def look(self, seconds: int, *alive: int) -> Verdict | None:
        """Lets some processes go on beating, and returns the first verdict."""
        for _ in range(seconds):
            self.now += 1
            self.beat(*alive)
            if (verdict := self.judge.decide()) is not None:
                return verdict
        return None


@pytest.fixture
def run() -> Run:
    run = Run()
    run.beat(0, 1, 2)
    assert run.look(3, 0, 1, 2) is None
    return run


def test_who_stops_beating_when_another_fails_is_lost(run: Run) -> None:
    run.fail(0)
    assert run.look(9, 0, 2) is None
    verdict = run.look(3, 0, 2)
    assert verdict is not None
    assert (verdict.together, verdict.lost, verdict.failed) == (False, [1], [0])
    assert verdict.line.startswith("process 1 (host b) was lost after step 7; start the same command")


def test_an_error_of_a_thread_of_process_0_ends_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    shelf, left = Shelf(), list[int]()
    shelf.put("beat", {"host": "a", "step": 7, "phase": TRAINING, "count": 1})
    for index in (1, 2):
        Shelf(index, shelf.documents).put("ended", {})  # nobody stays for them
    first, other = (Watchdog(None, Shelf(index, shelf.documents), leave=left.append) for index in (0, 1))
    with pytest.raises(SystemExit):
        first.end(UserError("taken over"))
    other._exchange()
    with pytest.raises(SystemExit):
        other.look()
    assert left == [2, 2] and capsys.readouterr().err == "error: taken over\n" * 2


def test_one_that_beats_again_is_not_lost(run: Run) -> None:
    """Held up for a while, by garbage collection or a compiler that keeps Python waiting."""
    run.fail(0)
    assert run.look(8, 0, 2) is None
    verdict = run.look(5, 0, 1, 2)
    assert verdict is not None and verdict.lost == []
    assert verdict.line.startswith("process 0 (host a) failed after step 7: connection closed; start")


def test_one_that_has_finished_or_never_began(run: Run) -> None:
    del run.shelf.documents["beat", 2]
    run.beat(1, phase=FINISHED)
    run.fail(0)
    verdict = run.look(12, 0)
    assert verdict is not None and verdict.lost == [2]
    assert verdict.line.startswith("process 2 (host unknown) was lost")


def test_several_lost(run: Run) -> None:
    run.fail(0)
    verdict = run.look(12, 0)
    assert verdict is not None
    assert verdict.line.startswith("processes 1 (host b), 2 (host c) were lost after step 7; ")


def test_what_the_user_can_fix_is_not_tried_again_by_the_others(run: Run) -> None:
    run.fail(0, "connection closed")
    run.fail(1, "the disk is full", status=2)
    verdict = run.look(12, 0, 1, 2)
    assert verdict is not None
    assert (verdict.lost, verdict.failed, verdict.status) == ([], [0, 1], 2)
    assert verdict.line == "process 1 (host b) failed after step 7: the disk is full"


def test_a_process_that_is_lost_as_well_may_be_why(run: Run) -> None:
    run.fail(1, "the disk is full", status=2)
    verdict = run.look(12, 0, 1)
    assert verdict is not None and verdict.lost == [2] and verdict.status == RESTART_STATUS


def test_all_fail_together_without_waiting(run: Run) -> None:
    for index in range(3):
        run.fail(index)
    verdict = run.look(1, 0, 1, 2)
    assert verdict is not None and verdict.together and verdict.lost == []


@pytest.mark.parametrize("phase", [TRAINING, "compiling", "saving"])
def test_silence_is_noticed_without_a_failure(phase: str, run: Run) -> None:
    run.beat(2, phase=phase)
    assert run.look(79, 0, 1) is None
    verdict = run.look(3, 0, 1)
    assert verdict is not None and verdict.lost == [2]


def test_silence_of_one_that_has_finished_is_not(run: Run) -> None:
    run.beat(2, phase=FINISHED)
    assert run.look(500, 0, 1) is None


def test_a_hang_says_where_everybody_is(run: Run) -> None:
    for index in range(3):
        run.fail(index, "nothing finished for 600 s while training after step 7", kind="hang")
    run.beat(2, step=6)
    verdict = run.judge.decide()
    assert verdict is not None and verdict.together
    assert verdict.line.startswith(
        "nothing finished for 600 s while training after step 7; process 2 (host c) training after step 6, processes "
        "0 (host a), 1 (host b) training after step 7; start"
    )


# --- one process ---------------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0


def run_for(clock: Clock, seconds: float, dog: Watchdog) -> None:
    """Lets time pass in which the process runs, and looks as its thread does."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += 0.25
        dog.look()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", lambda: clock.now)
    yield clock


def test_a_step_has_the_limit_and_everything_else_longer(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    dog = Watchdog(60, None, leave=left.append)
    run_for(clock, 60 * LONG_PHASE - 1, dog)  # starting and compiling
    dog.beat(1)
    run_for(clock, 59, dog)
    dog.enter("saving")
    run_for(clock, 60 * LONG_PHASE - 1, dog)
    dog.beat(2)
    dog.enter(FINISHED)  # and waiting for others, who have limits of their own
    run_for(clock, 1e4, dog)
    dog.beat(3)
    assert capfd.readouterr().err == "" and left == []
    with pytest.raises(SystemExit):
        run_for(clock, 61, dog)
    assert left == [RESTART_STATUS]
    text = capfd.readouterr().err
    assert f"watchdog: process 0 (host {HOST}): nothing finished for 60 s while training after step 3" in text
    assert "test_a_step_has_the_limit" in text, "the stack"
    assert text.splitlines()[-1].startswith("error: nothing finished for 60 s while training after step 3; start")


def test_no_limit(clock: Clock) -> None:
    dog = Watchdog(None, None, leave=lambda status: pytest.fail(f"left with {status}"))
    dog.beat(1)
    run_for(clock, 1e4, dog)


def test_time_in_which_the_process_stood_still_does_not_count(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    dog = Watchdog(60, None, leave=left.append)
    dog.beat(1)
    run_for(clock, 30, dog)
    clock.now += 5000
    run_for(clock, 25, dog)
    assert left == []
    line = "warning: this process stood still for 4999 s, or its machine did; it goes on"
    assert capfd.readouterr().err.splitlines() == [line], "once"
    with pytest.raises(SystemExit):  # and hangs after all
        run_for(clock, 10, dog)


def test_process_0_that_does_not_answer(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    dog = Watchdog(None, Shelf(1), timing=Timing(silence_s=80.0, linger_s=0.0), leave=left.append)
    clock.now += 5000
    run_for(clock, 78, dog)
    assert left == []
    with pytest.raises(SystemExit):
        run_for(clock, 3, dog)
    assert left == [RESTART_STATUS]
    text = capfd.readouterr().err
    assert "error: process 0 (host unknown) has not answered for 80 s (this process itself stood still for 49" in text


def test_the_judge_does_not_take_its_own_pause_for_a_silence_of_the_others(clock: Clock) -> None:
    shelf = Shelf(0)
    for index in (1, 2):
        shelf.documents["beat", index] = {"host": "b", "step": 1, "phase": TRAINING, "count": 1}
    dog = Watchdog(None, shelf, timing=Timing(silence_s=80.0), leave=lambda status: pytest.fail(f"left with {status}"))
    dog._exchange()
    clock.now += 5000
    dog._exchange()
    assert not shelf.all("verdict")


@pytest.mark.parametrize("last", [0, 2])
def test_nobody_leaves_before_all_have_finished(last: int) -> None:
    """Whoever comes last: JAX aborts all processes when one of them shuts down long before another."""
    documents: dict[tuple[str, int], dict[str, Any]] = {}
    begun, done, left = threading.Barrier(4), threading.Event(), list[int]()

    def work(index: int) -> None:
        with Watchdog(None, Shelf(index, documents), timing=Timing(beat_s=0.01, look_s=0.01)) as dog:
            dog.beat(5)
            begun.wait()
            if index == last:
                done.wait()
        left.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    begun.wait()
    while sum(documents.get(("beat", index), {}).get("phase") == FINISHED for index in range(3)) < 2:
        time.sleep(0.01)
    time.sleep(0.1)
    left_early = list(left)
    done.set()
    for thread in threads:
        thread.join()
    assert left_early == [] and sorted(left) == [0, 1, 2]
    assert [documents["beat", index]["step"] for index in range(3)] == [5, 5, 5]


@pytest.mark.parametrize("guarded", [True, False])
def test_an_exception_of_all_processes_comes_through(guarded: bool) -> None:
    shelf = Shelf(0)
    for index in (1, 2):
        document = {"host": "b", "step": 0, "kind": "error", "line": "too large", "status": 2}
        shelf.documents["failure", index] = document
    with (
        pytest.raises(UserError, match="too large"),
        Watchdog(None, shelf, timing=Timing(beat_s=0.01, look_s=0.01)) as dog,
    ):
        if guarded:
            with dog.guard():
                raise UserError("too large")
        raise UserError("too large")


STOPPED = """
    import os, signal, subprocess, sys, time
    from intttrain.pod.watchdog import Timing, Watchdog

    with Watchdog(3, None, timing=Timing(look_s=0.05)) as dog:
        dog.beat(1)
        subprocess.Popen(["sh", "-c", f"sleep 7; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)
        dog.beat(2)
    print("saved")
"""


def test_a_process_that_was_stopped_for_longer_than_the_limit_goes_on() -> None:
    result = run_python(STOPPED)
    assert (result.returncode, result.stdout) == (0, "saved\n"), result.stderr
    assert result.stderr.startswith("warning: this process stood still for "), result.stderr


# --- processes -----------------------------------------------------------------------------------------------------


def test_killed(tmp_path: Path) -> None:
    with processes(tmp_path, [(WATCHED, "600", "0")] * 2) as run:
        run.wait_until(lambda: "finished 5\n" in run.output(0))
        run.all[1].send_signal(signal.SIGKILL)
        assert run.status(0) == RESTART_STATUS
        assert run.error_line(0).startswith(f"error: process 1 (host {HOST}) was lost after step ")
        assert "Traceback" not in run.output(0)


def test_process_0_killed(tmp_path: Path) -> None:
    with processes(tmp_path, [(WATCHED, "600", "0")] * 3) as run:
        run.wait_until(lambda: all("finished 5\n" in run.output(index) for index in range(3)))
        run.all[0].send_signal(signal.SIGKILL)
        for index in (1, 2):
            assert run.status(index) == RESTART_STATUS
            assert run.error_line(index).startswith(
                f"error: process 0 (host {HOST}), which coordinates, was lost after step "
            )


@pytest.mark.parametrize("stopped", [0, 1])
def test_standing_still(stopped: int, tmp_path: Path) -> None:
    with processes(tmp_path, [(WATCHED, "10", "0")] * 2) as run:
        run.wait_until(lambda: all("finished 5\n" in run.output(index) for index in range(2)))
        run.all[stopped].send_signal(signal.SIGSTOP)
        other = 1 - stopped
        assert run.status(other) == RESTART_STATUS
        line = run.error_line(other)
        what = "does not answer" if stopped == 0 else "was lost after step"
        assert line.startswith(f"error: process {stopped} (host {HOST}) {what}")
        text = run.output(other)
        assert f"watchdog: process {other} (host {HOST}): nothing finished for 10 s while training" in text
        assert 'watched.py", line' in text, "the stack of the main thread"
        run.all[stopped].send_signal(signal.SIGCONT)
        assert run.status(stopped) in (RESTART_STATUS, -signal.SIGABRT)
        assert "stood still for " in run.error_line(stopped), "why the others gave it up"


def test_failing_alone(tmp_path: Path) -> None:
    """The others wait in a collective and would not learn of it."""
    with processes(tmp_path, [(WATCHED, "600", "5")] * 2) as run:
        assert [run.status(0), run.status(1)] == [2, 2], "a launcher that looks at one of them does not start again"
        assert run.error_line(1) == "error: the disk of this host is full"
        line = run.error_line(0)
    assert line.startswith(f"error: process 1 (host {HOST}) failed after step 5: the disk of this host is full")
