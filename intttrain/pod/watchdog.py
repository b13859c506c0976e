"""Ends a process whose run lost another one, or stands still, with one line that says why, instead of waiting forever.

    what happens                                 who notices
    a process fails by itself                    it says so; the others, waiting in a collective, are told by process 0
    a process is killed                          collectives of the others fail, or process 0 misses its beats
    a process does not get on (a device hangs)   every process for itself, when nothing finishes within the limit
    process 0 is killed                          JAX's client, which aborts the others; they say a last word
    process 0 does not answer                    the others, whose beats get no answer

Each process has two threads. One writes beats into the key-value store of process 0 and asks for its verdict; it may
have to wait for the network. The other one looks at clocks and waits for nobody.

Time in which the process itself did not run (Ctrl-Z, a closed lid, a virtual machine that moves to another host) counts
neither for it nor, on process 0, for the others; it is told when the process runs again.
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

LONG_PHASE = 6  # times the limit: starting, compiling, saving, evaluating

_PROBE_SECONDS = 2
_TOLD_S = 5.0  # a process that stood still for longer says so


@dataclasses.dataclass(frozen=True)
class Timing:
    """In seconds.

    Attributes:
      beat_s: between two beats.
      look_s: between two looks at the clocks, and at the store while a run ends.
      settle_s: from a failure to the verdict, for others to fail too and for beats to stop.
      silence_s: without beats until a process is lost; JAX's heartbeats abort all of them later.
      linger_s: that process 0, which keeps the store, stays for the others at most.
    """

    beat_s: float = 2.0
    look_s: float = 0.25
    settle_s: float = 10.0
    silence_s: float = dataclasses.field(default_factory=lambda: 0.8 * heartbeat_timeout_seconds())
    linger_s: float = 15.0


class RunningTime:
    """A clock, in seconds, that stands still while this process does; called several times a second.

    Args:
      most_s: between two calls; whatever is beyond was no time of this process.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s, self._lock, self._last = most_s, threading.Lock(), monotonic()
        self.stood_still_s = 0.0

    def __call__(self) -> float:
        """Returns the time."""
        with self._lock:
            now = monotonic()
            self.stood_still_s += max(0.0, now - self._last - self._most_s)
            self._last = now
            return now - self.stood_still_s


@dataclasses.dataclass(frozen=True)
class _Progress:
    step: int
    phase: str
    since: float


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """Watches the block; all processes of a run enter and leave it together."""

    def __init__(
        self, limit_s: int | None, store: KeyValueStore | None, *, timing: Timing | None = None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:  # fmt: skip
        """Starts nothing yet.

        Args:
          limit_s: for one step; ``LONG_PHASE`` times as much for everything else. ``None`` sets no limit.
          store: of this block alone; ``None`` for a process that is alone.
          timing: for tests.
          leave: ends the process with a status. Not ``sys.exit``, at which JAX waits for all processes.
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

    # --- what the program says ---------------------------------------------------------------------------------------

    def beat(self, step: int) -> None:
        """Says that ``step`` is complete."""
        self._progress = _Progress(step, TRAINING, self._clock())

    def enter(self, phase: str) -> None:
        """Says that something begins that may take longer than a step; the next ``beat`` ends it."""
        self._progress = _Progress(self._progress.step, phase, self._clock())

    def end(self, error: UserError) -> NoReturn:
        """Ends all processes with the line and status of an error of process 0, from any of its threads.

        It does so at once: nothing is saved or closed.
        """
        if self._store is not None:
            self._verdict = Verdict(False, [], [self._store.index], str(error), error.status)
            with contextlib.suppress(RuntimeError):
                self._store.put("verdict", dataclasses.asdict(self._verdict))
        self._end(str(error), error.status)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Treats an exception of the block before anything around it waits for other processes while it is closed."""
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
        """Returns when all have finished: JAX aborts every process when one comes to its end 300 s after another.

        Meanwhile the threads go on, so a process that fails or is lost now ends the others as at any other time.
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
        self._stopped.wait()  # for the other thread, which ends the process

    # --- the two threads ---------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Writes beats and asks for the verdict until the block ends; the last beat says so."""
        while True:
            last = self._stopped.is_set()
            with contextlib.suppress(RuntimeError, TimeoutError):  # process 0 is gone or slow: see _watch
                self._exchange()
                self._answered = self._clock()
            if last:
                return
            self._wake.wait(self._timing.beat_s if self._failure is None else self._timing.look_s)
            self._wake.clear()

    def _exchange(self) -> None:
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
        while not self._stopped.wait(self._timing.look_s):
            self.look()

    def look(self) -> None:
        """Ends the process if there is a reason to; what a thread does several times a second."""
        time_s, now = self._clock(), self._progress
        limit_s = self._limit(now.phase)
        quiet_s = time_s - self._answered
        self._tell_of_standing_still()
        if limit_s is not None and time_s - now.since > limit_s:
            self._end_hanging(f"nothing finished for {limit_s} s while {now.phase} after step {now.step}")
        elif self._failure is not None:
            return  # the main thread is about to end the process
        elif self._verdict is not None:
            self._end(f"{self._verdict.line}{self._stood_still()}", self._verdict.status)
        elif self._store is not None and quiet_s > self._timing.silence_s:
            line = f"{self._first()} has not answered for {quiet_s:.0f} s{self._stood_still()}; {AGAIN}"
            self._end(line, RESTART_STATUS)

    def _tell_of_standing_still(self) -> None:
        """Says once for each time that the process did not run."""
        still_s, self._told_still_s = self._clock.stood_still_s - self._told_still_s, self._clock.stood_still_s
        if still_s > _TOLD_S:
            others = ", if the others still wait" if self._store is not None else ""
            say(f"warning: this process stood still for {still_s:.0f} s, or its machine did; it goes on{others}")

    def _stood_still(self) -> str:
        """Returns why the others may have given this process up."""
        self._clock()  # which may be the first to notice
        still_s = self._clock.stood_still_s
        return f" (this process itself stood still for {still_s:.0f} s)" if still_s > _TOLD_S else ""

    def _limit(self, phase: str) -> int | None:
        if self._limit_s is None or phase == FINISHED:  # and waiting for the others, who have limits of their own
            return None
        return self._limit_s if phase == TRAINING else LONG_PHASE * self._limit_s

    # --- ends --------------------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        """Returns if the exception is that of all processes, which then end normally; else ends this one."""
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
        index = self._store.index if self._store is not None else 0
        who = describe_processes([index], {index: self._host})
        say(f"watchdog: {who}: {line}; all threads:")
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if self._store is None:
            self._end(f"{line}; {AGAIN}", RESTART_STATUS)
        else:
            self._end(self._wait_for_verdict("hang", line, RESTART_STATUS).line, RESTART_STATUS)

    def _first(self) -> str:
        return describe_processes([0], {0: self._first_host})

    def _wait_for_verdict(self, kind: str, line: str, status: int) -> Verdict:
        step = self._progress.step
        self._failure = {"host": self._host, "step": step, "kind": kind, "line": line, "status": status}
        self._wake.set()
        self._decided.wait(2 * self._timing.settle_s)
        return self._verdict or Verdict(False, [0], [], f"{self._first()} does not answer; {AGAIN}", RESTART_STATUS)

    def _end(self, line: str, status: int) -> NoReturn:
        """Prints the line and ends the process; process 0 stays until the others have done so."""
        with self._ending:
            say(f"error: {line}")
            if self._store is not None:
                farewell = threading.Thread(target=self._part, args=(self._store,), daemon=True)
                farewell.start()
                farewell.join(self._timing.linger_s if self._store.index == 0 else self._timing.beat_s)
            finish_streams()
            self._leave(status)
        raise SystemExit(status)  # where tests replace `leave`

    def _part(self, store: KeyValueStore) -> None:
        with contextlib.suppress(RuntimeError):
            store.put("ended", {})
            while store.index == 0:
                gone = _finished(store) | {*store.all("ended"), *(self._verdict.lost if self._verdict else ())}
                if len(gone) == store.count:
                    return
                sleep(self._timing.look_s)

    def _say_who_aborted(self) -> None:
        """Ends with one line if it is process 0 that is gone; anything else remains an abort."""
        host, _, port = (coordinator_address() or "").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
        except OSError:
            lost = f"{self._first()}, which coordinates, was lost after step {self._progress.step}"
            say(f"error: {lost}{self._stood_still()}; {AGAIN}")
            self._leave(RESTART_STATUS)


def _finished(store: KeyValueStore) -> set[int]:
    return {index for index, beat in store.all("beat").items() if beat["phase"] == FINISHED}


@contextlib.contextmanager
def before_abort(action: Callable[[], None]) -> Iterator[None]:
    """Calls ``action`` before ``abort()``, with which JAX's client ends a process when process 0 is gone.

    It runs in the thread that aborts; the process then ends as it would have, unless the action ends it.

    Python's own handlers run in the main thread, later: too late for this signal, hence the one of the C library.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
    previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)
