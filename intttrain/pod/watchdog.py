"""Ends every process of a run when one of them is lost or hangs, each with one line that says what happened.

Without it the others would wait in a collective for ever: a collective needs all processes, and has no time limit.

    what happens                                 who notices
    a process raises an error                    that process; process 0 tells the others, which wait in a collective
    a process is killed                          process 0, which misses its beats; the others, whose collectives fail
    a device hangs                               every process by itself, when no step finishes within the limit
    process 0 is killed                          JAX's client, which aborts the others; each prints a last line
    process 0 does not answer                    the others, whose beats get no answer

A beat is a small document (host, step, phase, count) that each process writes every two seconds into the key-value
store that process 0 keeps. From beats and failures process 0 reaches a verdict for all (``verdict.py``), so that all of
them print the same reason and end with the same status.

Each process has two threads. ``_talk`` writes beats and asks for the verdict; it may have to wait for the network. That
is why ``_watch``, which looks at the clocks and can end the process, is another thread and waits for nobody.

Time in which a process did not run at all (Ctrl-Z, a closed lid, a virtual machine that moves to another host) is not
counted against it nor, on process 0, against the others; a warning says how long it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import NoReturn

from intttrain.config.errors import RESTART_STATUS, UserError, explain_exit
from intttrain.logs.streams import finish_streams, say
from intttrain.pod.coordination import KeyValueStore, coordinator_address
from intttrain.pod.distributed import heartbeat_timeout_seconds
from intttrain.pod.preflight import describe_processes
from intttrain.pod.verdict import AGAIN, FINISHED, TRAINING, Judge, Verdict

LONG_PHASE = 6  # the limit of everything that is no step (starting, compiling, saving, evaluating), in limits of a step

_PROBE_SECONDS = 2  # for a connection to process 0, to see whether it is there
_TOLD_S = 5.0  # a process that did not run for longer than this says so


@dataclasses.dataclass(frozen=True)
class Timing:
    """Intervals and limits, in seconds.

    Attributes:
      beat_s: interval between two beats.
      look_s: interval between two looks at the clocks, and at the store while a run ends.
      settle_s: time from the first failure to the verdict. What one process did to the others shows within it, and the
        beats of a process that is gone have stopped.
      silence_s: time without a beat after which a process is lost. Shorter than JAX's own heartbeat time-out, at which
        JAX aborts all processes.
      linger_s: longest time that process 0 stays when the run ends; the store, in which the others read why, goes with
        it.
    """

    beat_s: float = 2.0
    look_s: float = 0.25
    settle_s: float = 10.0
    silence_s: float = dataclasses.field(default_factory=lambda: 0.8 * heartbeat_timeout_seconds())
    linger_s: float = 15.0


class RunningTime:
    """A clock, in seconds, that stands still while this process does not run; to be called several times a second.

    Args:
      most_s: longest interval between two calls that is believed. The rest of a longer one is time in which this
        process did not run, for its threads call more often than that.

    Attributes:
      stood_still_s: how long the process did not run, in all.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s, self._lock, self._last = most_s, threading.Lock(), monotonic()
        self.stood_still_s = 0.0

    def __call__(self) -> float:
        """Returns the seconds in which this process ran, from an arbitrary start."""
        with self._lock:
            now = monotonic()
            self.stood_still_s += max(0.0, now - self._last - self._most_s)
            self._last = now
            return now - self.stood_still_s


@dataclasses.dataclass(frozen=True)
class _Progress:
    """The last complete step, what the process does now (``TRAINING`` or for example "saving"), and since when."""

    step: int
    phase: str
    since: float


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """Watches the block of a ``with`` statement, which all processes of a run enter and leave together.

    The program reports progress by ``beat`` and ``enter``. An error that leaves the block, or ``guard``, is a failure
    of this process, of which the others hear. The block is left when all processes have come to its end.
    """

    def __init__(
        self, limit_s: int | None, store: KeyValueStore | None, *, timing: Timing | None = None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:  # fmt: skip
        """Starts nothing yet.

        Args:
          limit_s: longest time for one step; ``LONG_PHASE`` times as much for everything else. ``None`` sets no limit.
          store: a key-value store that nothing else uses; ``None`` for a process that is alone.
          timing: shorter intervals for tests.
          leave: ends the process at once with a status. It cannot be ``sys.exit``: that runs JAX's exit handler, which
            waits for all processes, the lost one included.
        """
        self._limit_s, self._store, self._leave = limit_s, store, leave
        self._timing = timing or Timing()
        self._host = socket.gethostname()
        self._first_host = "unknown" if store is None or store.index else self._host  # of process 0
        self._clock = RunningTime(4 * self._timing.look_s)
        self._told_still_s = 0.0
        self._progress = _Progress(0, "starting", self._clock())
        self._judge: Judge | None = None
        if store is not None and store.index == 0:
            times = {"settle_s": self._timing.settle_s, "silence_s": self._timing.silence_s}
            self._judge = Judge(store, **times, clock=self._clock)
        self._failure: dict[str, str | int] | None = None
        self._verdict: Verdict | None = None
        self._decided, self._wake, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._answered, self._beats = self._clock(), 0
        self._ending = threading.Lock()
        self._cleanup = contextlib.ExitStack()

    # --- called by the program ---------------------------------------------------------------------------------------

    def beat(self, step: int) -> None:
        """Notes that ``step`` is complete and the next one begins."""
        self._progress = _Progress(step, TRAINING, self._clock())

    def enter(self, phase: str) -> None:
        """Notes that something begins that may take longer than a step; the next ``beat`` ends it."""
        self._progress = _Progress(self._progress.step, phase, self._clock())

    def end(self, error: UserError) -> NoReturn:
        """Ends all processes at once, with the line and status of an error that process 0 met in any of its threads.

        Nothing is saved or closed.
        """
        if self._store is not None:
            self._verdict = Verdict(False, [], [self._store.index], str(error), error.status)
            with contextlib.suppress(RuntimeError):
                self._store.put("verdict", dataclasses.asdict(self._verdict))
        self._end(str(error), error.status)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Reports an exception of the block at once, before it leaves the ``with`` statements around the block.

        Closing those, a checkpointer for one, may wait for the other processes, which do not know of the failure yet.
        """
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def __enter__(self) -> Watchdog:
        for name, work in (("beats", self._talk), ("watchdog", self._watch)):
            if self._store is not None or work == self._watch:
                thread = threading.Thread(target=work, name=name, daemon=True)
                thread.start()
                self._cleanup.callback(thread.join, self._timing.beat_s)
        if self._store is not None and self._store.index and coordinator_address() is not None:
            self._cleanup.enter_context(before_abort(self._say_who_aborted))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)
        self.enter(FINISHED)
        self._wake.set()
        if error is None and self._store is not None:
            self._wait_for_others(self._store)
        self._stopped.set()
        self._wake.set()
        self._cleanup.close()

    def _wait_for_others(self, store: KeyValueStore) -> None:
        """Waits until all processes have finished.

        JAX lets a process that exits wait for the others, and aborts all of them when they are more than 300 s apart.
        Here nobody exits before all can. The two threads go on meanwhile, so a process that fails or is lost now ends
        the others as at any other time.
        """
        while self._verdict is None:
            with contextlib.suppress(RuntimeError, TimeoutError):
                if store.index != 0:
                    store.get("all finished", 0, self._timing.beat_s)
                    return
                if len(_finished(store)) == store.count:
                    store.put("all finished", {})
                    return
            sleep(self._timing.look_s)
        self._stopped.wait()  # there is a verdict, and the thread that watches ends the process

    # --- the two threads ---------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Writes beats and asks for the verdict until the block ends; the last beat has the phase ``FINISHED``."""
        while True:
            last = self._stopped.is_set()
            with contextlib.suppress(RuntimeError, TimeoutError):  # process 0 is gone or slow; ``look`` counts how long
                self._exchange()
                self._answered = self._clock()
            if last:
                return
            self._wake.wait(self._timing.beat_s if self._failure is None else self._timing.look_s)
            self._wake.clear()

    def _exchange(self) -> None:
        """Writes what this process has to say, decides if it is process 0, and reads the verdict if there is one."""
        assert self._store is not None
        self._beats += 1
        now = self._progress
        self._store.put("beat", {"host": self._host, "step": now.step, "phase": now.phase, "count": self._beats})
        if self._failure is not None:
            self._store.put("failure", self._failure)
        if self._judge is not None and self._verdict is None and (decided := self._judge.decide()) is not None:
            self._store.put("verdict", dataclasses.asdict(decided))
        if self._first_host == "unknown":
            self._first_host = self._store.get("beat", 0, self._timing.beat_s)["host"]
        if found := self._store.all("verdict"):
            self._verdict = Verdict(**found[0])
            self._decided.set()

    def _watch(self) -> None:
        """Looks at the clocks until the block ends."""
        while not self._stopped.wait(self._timing.look_s):
            self.look()

    def look(self) -> None:
        """Ends the process if it hangs, if there is a verdict, or if process 0 is silent; called all the time."""
        time_s, now = self._clock(), self._progress
        limit_s = self._limit(now.phase)
        quiet_s = time_s - self._answered
        self._tell_of_standing_still()
        if limit_s is not None and time_s - now.since > limit_s:
            self._end_hanging(f"nothing finished for {limit_s} s while {now.phase} after step {now.step}")
        elif self._failure is not None:
            return  # the main thread waits in ``_fail`` for the verdict and ends the process
        elif self._verdict is not None:
            self._end(f"{self._verdict.line}{self._stood_still()}", self._verdict.status)
        elif self._store is not None and quiet_s > self._timing.silence_s:
            line = f"{self._first()} has not answered for {quiet_s:.0f} s{self._stood_still()}; {AGAIN}"
            self._end(line, RESTART_STATUS)

    def _tell_of_standing_still(self) -> None:
        """Warns after each time in which the process did not run."""
        still_s, self._told_still_s = self._clock.stood_still_s - self._told_still_s, self._clock.stood_still_s
        if still_s > _TOLD_S:
            others = ", if the others still wait" if self._store is not None else ""
            say(f"warning: this process stood still for {still_s:.0f} s, or its machine did; it goes on{others}")

    def _stood_still(self) -> str:
        """Returns a remark that this process did not run for a while, for which the others may have given it up."""
        self._clock()  # this call may be the one that notices
        still_s = self._clock.stood_still_s
        return f" (this process itself stood still for {still_s:.0f} s)" if still_s > _TOLD_S else ""

    def _limit(self, phase: str) -> int | None:
        """Returns the longest time that a phase may take."""
        if self._limit_s is None or phase == FINISHED:  # who has finished waits for others, which have limits
            return None
        return self._limit_s if phase == TRAINING else LONG_PHASE * self._limit_s

    # --- ends --------------------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        """Reports an exception and acts on the verdict: returns if every process failed by itself, else ends this one.

        When all fail alike, for example on a wrong setting, each may end as it would alone. Otherwise the line that
        this process prints is its own error if it is the cause, and the verdict if its error is what a lost process did
        to it.
        """
        if self._store is None or self._failure is not None:
            return
        explained = explain_exit(error)
        line = explained[0] if explained else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self.enter("stopping")
        verdict = self._wait_for_verdict("error", line, explained[1] if explained else 1)
        if verdict.together:
            return
        if not verdict.lost and self._store.index in verdict.failed:
            if explained is None:
                traceback.print_exception(error)
            self._end(*(explained or (line, 1)))
        self._end(f"{verdict.line} (here: {line}){self._stood_still()}", verdict.status)

    def _end_hanging(self, line: str) -> None:
        """Prints where every thread of this process is, then ends it as a failure of which the others hear."""
        index = self._store.index if self._store is not None else 0
        who = describe_processes([index], {index: self._host})
        say(f"watchdog: {who}: {line}; all threads:")
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if self._store is None:
            self._end(f"{line}; {AGAIN}", RESTART_STATUS)
        else:
            self._end(self._wait_for_verdict("hang", line, RESTART_STATUS).line, RESTART_STATUS)

    def _first(self) -> str:
        """Returns how messages call process 0, with its host ("unknown" until a beat of it was read)."""
        return describe_processes([0], {0: self._first_host})

    def _wait_for_verdict(self, kind: str, line: str, status: int) -> Verdict:
        """Publishes a failure (``kind`` "error" or "hang") and returns the verdict.

        Without an answer in twice the time that a verdict takes, process 0 is the one that is lost.
        """
        step = self._progress.step
        self._failure = {"host": self._host, "step": step, "kind": kind, "line": line, "status": status}
        self._wake.set()
        self._decided.wait(2 * self._timing.settle_s)
        return self._verdict or Verdict(False, [0], [], f"{self._first()} does not answer; {AGAIN}", RESTART_STATUS)

    def _end(self, line: str, status: int) -> NoReturn:
        """Prints the line and ends the process; process 0 stays until the others have read the verdict and ended."""
        with self._ending:
            say(f"error: {line}")
            if self._store is not None:
                farewell = threading.Thread(target=self._part, args=(self._store,), daemon=True)
                farewell.start()
                farewell.join(self._timing.linger_s if self._store.index == 0 else self._timing.beat_s)
            finish_streams()
            self._leave(status)
        raise SystemExit(status)  # reached only where tests replace ``leave``

    def _part(self, store: KeyValueStore) -> None:
        """Says that this process ends; process 0 then waits for the same of all others that are not lost."""
        with contextlib.suppress(RuntimeError):
            store.put("ended", {})
            while store.index == 0:
                gone = _finished(store) | {*store.all("ended"), *(self._verdict.lost if self._verdict else ())}
                if len(gone) == store.count:
                    return
                sleep(self._timing.look_s)

    def _say_who_aborted(self) -> None:
        """Ends the process with one line if process 0 is gone; any other abort takes its course.

        The sign of it is that nothing listens at the address of process 0.
        """
        host, _, port = (coordinator_address() or "").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
        except OSError:
            lost = f"{self._first()}, which coordinates, was lost after step {self._progress.step}"
            say(f"error: {lost}{self._stood_still()}; {AGAIN}")
            self._leave(RESTART_STATUS)


def _finished(store: KeyValueStore) -> set[int]:
    """Returns the numbers of the processes whose last beat says that they have finished."""
    return {index for index, beat in store.all("beat").items() if beat["phase"] == FINISHED}


@contextlib.contextmanager
def before_abort(action: Callable[[], None]) -> Iterator[None]:
    """Calls ``action`` when something in the block aborts the process, in the thread that aborts.

    JAX's client, in C++, calls ``abort()`` when process 0 is gone. Unless the action ends the process, the abort goes
    on afterwards.

    The handler is set through the C library: Python would run one of its own in the main thread, after the C code
    returns, and ``abort()`` does not return.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
    previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)
