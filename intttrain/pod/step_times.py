"""How long the steps of every process take, and how much of that is its own: what finds the slow host of many.

All processes end a step at the same time, because each waits for the others. The slow one is the one that does not
wait: it spends the time itself, on reading rows, or because something else keeps its host busy. A slow device makes
every host wait alike; that needs a trace (``train.profile_steps``).
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import math
import socket
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from intttrain.logs.progress import Clock, human_duration
from intttrain.pod.coordination import KeyValueStore
from intttrain.pod.preflight import describe_processes

STEP_TIMES_FILE = "step_times.json"
WINDOW = 20  # steps that a process is judged by
BUCKETS = 20  # of a factor of ten: each is 12 % wide

_FOLDER = "step_times"
# A process holds up the others if it hardly ever waits while half of them wait for half of the time.
_BUSY, _IDLE = 0.9, 0.5


class StepTimes:
    """The steps of this process, and what the other ones publish about theirs.

    Args:
      store: of these times alone; ``None`` for a process that is alone.
      clock: seconds.
    """

    def __init__(self, store: KeyValueStore | None, *, clock: Clock = time.monotonic) -> None:
        self._store, self._clock, self._host = store, clock, socket.gethostname()
        self._began: float | None = None
        self._waited_s = 0.0
        self._window: collections.deque[tuple[float, float]] = collections.deque(maxlen=WINDOW)
        self._counts = {"step": collections.Counter[int](), "own": collections.Counter[int]()}
        self._warned: set[int] = set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for devices, and so for the other processes; everything else is this process's own time."""
        began = self._clock()
        try:
            yield
        finally:
            self._waited_s += self._clock() - began

    def restart(self) -> None:
        """What happened since the last step belongs to no step (a compilation, a save)."""
        self._began, self._waited_s = None, 0.0

    def tick(self) -> None:
        """Says that a step is complete; the first one after ``restart`` only sets the origin."""
        now = self._clock()
        if self._began is not None:
            step_s = now - self._began
            own_s = max(0.0, step_s - self._waited_s)
            self._window.append((step_s, own_s))
            self._counts["step"][_bucket(step_s)] += 1
            self._counts["own"][_bucket(own_s)] += 1
        self._began, self._waited_s = now, 0.0

    def publish(self) -> tuple[dict[str, float], str]:
        """Tells process 0 about the steps since the start, and returns what it knows about all processes.

        Returns:
          Metrics and a warning, ``""`` without one. Both are empty on other processes, and for one that is alone. The
          numbers of other processes may be those of their last call.
        """
        if self._store is None or not self._window:
            return {}, ""
        with contextlib.suppress(RuntimeError):  # process 0 is gone: the watchdog says so
            self._store.put(_FOLDER, self._document())
        return self._compare() if self._store.index == 0 else ({}, "")

    def summary(self) -> dict[str, Any]:
        """Returns the histograms of all processes, by number, as they were last published; this one's are new."""
        documents = {0: self._document()} if self._store is None else self._store.all(_FOLDER)
        return {
            str(index): {"host": document["host"]} | {name: _describe(document[name]) for name in self._counts}
            for index, document in sorted(documents.items())
        }

    def _document(self) -> dict[str, Any]:
        steps, owns = zip(*self._window, strict=True) if self._window else ((0.0,), (0.0,))
        medians = {"step_s": statistics.median(steps), "own_s": statistics.median(owns), "steps": len(self._window)}
        counts = {name: {str(bucket): n for bucket, n in sorted(c.items())} for name, c in self._counts.items()}
        return {"host": self._host} | medians | counts

    def _compare(self) -> tuple[dict[str, float], str]:
        assert self._store is not None
        found = self._store.all(_FOLDER)
        slowest = max(found, key=lambda index: (found[index]["own_s"], -index))
        median_s = statistics.median_low(document["own_s"] for document in found.values())
        numbers = {"own_seconds": found[slowest]["own_s"], "own_seconds_median": median_s, "slowest": slowest}
        return {f"hosts/{name}": value for name, value in numbers.items()}, self._warning(slowest, found, median_s)

    def _warning(self, slowest: int, found: Mapping[int, Mapping[str, Any]], median_s: float) -> str:
        worst = found[slowest]
        step_s = worst["step_s"]
        if (
            slowest in self._warned or worst["steps"] < WINDOW
            or worst["own_s"] < _BUSY * step_s or median_s > _IDLE * step_s
        ):  # fmt: skip
            return ""
        self._warned.add(slowest)
        who = describe_processes([slowest], {slowest: worst["host"]})
        return (
            f"warning: {who} holds up the others: {_ms(worst['own_s'])} of its steps of {_ms(step_s)} are its own, "
            f"{_ms(median_s)} in the median process; look at what its host reads and runs"
        )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else human_duration(seconds)


def _bucket(seconds: float) -> int:
    """Returns the number of the bucket; bucket 0 begins at one second."""
    return math.floor(BUCKETS * math.log10(max(seconds, 1e-6)))


def _begin(bucket: int) -> float:
    return float(f"{10 ** (bucket / BUCKETS):.3g}")


def _describe(counts: Mapping[str, int]) -> dict[str, Any]:
    """Returns quantiles, as the lower ends of their buckets, and the counts by lower end, all in seconds."""
    numbers = {int(bucket): n for bucket, n in counts.items()}
    buckets = sorted(numbers)
    until = list(itertools.accumulate(numbers[bucket] for bucket in buckets))  # steps in a bucket and all before it
    at = {"median": 0.5, "p99": 0.99, "max": 1.0}
    quantiles = {
        name: _begin(buckets[bisect.bisect_right(until, min(until[-1] - 1, int(q * until[-1])))])
        for name, q in at.items() if buckets
    }  # fmt: skip
    return quantiles | {"steps_by_seconds": {f"{_begin(bucket):g}": numbers[bucket] for bucket in buckets}}
