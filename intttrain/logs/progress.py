"""Step timing, rates, time left, and how durations and counts are written for people.

Pure Python; the clock is an argument so that tests need no waiting.
"""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

Clock = Callable[[], float]  # seconds, monotonic
Number = int | float


@runtime_checkable
class Stream(Protocol):
    """The part of a text file that printing needs."""

    def write(self, text: str, /) -> object:
        """Appends text."""

    def flush(self) -> object:
        """Shows what was written."""


class LineStream:
    """A stream that hands what ``print`` writes to ``report``, without the line ends."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    def write(self, text: str, /) -> None:
        """Passes one line on."""
        if text.strip():
            self._report(text)

    def flush(self) -> None:
        """Nothing is held back."""


class StepTimer:
    """Seconds per step as a moving average that leaves compilation out.

    Call ``tick(step)`` whenever the result of ``step`` is known on the host. The first tick only sets the origin, so
    whatever came before it (compilation, the first step) never enters an average; the average spans the last
    ``window`` intervals between ticks, so a slow phase is forgotten.
    """

    def __init__(self, *, window: int = 20, clock: Clock = time.monotonic) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self._clock = clock
        self._excluded_s = 0.0
        self._ticks: collections.deque[tuple[int, float]] = collections.deque(maxlen=window + 1)

    def tick(self, step: int) -> None:
        """Records that ``step`` is complete; steps must increase, gaps are fine. Raises ``ValueError`` otherwise."""
        if self._ticks and step <= self._ticks[-1][0]:
            raise ValueError(f"tick({step}) after tick({self._ticks[-1][0]}): steps must increase")
        self._ticks.append((step, self._clock() - self._excluded_s))

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside this block (evaluation, a blocking save) is not counted as training."""
        started = self._clock()
        try:
            yield
        finally:
            self._excluded_s += self._clock() - started

    def seconds_per_step(self) -> float | None:
        """Returns the moving average, or ``None`` before the second tick."""
        if len(self._ticks) < 2:
            return None
        (first_step, first_s), (last_step, last_s) = self._ticks[0], self._ticks[-1]
        return (last_s - first_s) / (last_step - first_step)

    def rate(self, units_per_step: Number) -> float | None:
        """Returns units (for example tokens) per second, or ``None`` while unknown."""
        seconds = self.seconds_per_step()
        return units_per_step / seconds if seconds else None

    def eta_seconds(self, num_steps: int) -> float | None:
        """Returns the seconds left until ``num_steps`` steps are complete, or ``None`` while unknown."""
        seconds = self.seconds_per_step()
        return None if seconds is None else max(0, num_steps - self._ticks[-1][0]) * seconds


class Progress:
    """One line every few seconds about work of known or unknown length (preparing data, evaluating, exporting).

    Lines go to ``stream`` (standard error by default), which keeps standard output for results.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int | None = None,
        every_seconds: float = 5.0,
        stream: Stream | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._label, self._total, self._every_seconds = label, total, every_seconds
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started_s = self._shown_s = clock()
        self._done = 0

    def advance(self, count: int = 1) -> None:
        """Counts finished units and prints a line when ``every_seconds`` have passed since the last one."""
        self._done += count
        now = self._clock()
        if now - self._shown_s >= self._every_seconds:
            self._shown_s = now
            print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """Returns for example ``tokenize 120/1690 (7%)  40/s  ETA 39s``."""
        elapsed_s = self._clock() - self._started_s
        rate = self._done / elapsed_s if elapsed_s > 0 else 0.0
        if self._total is None:
            return f"{self._label} {self._done}  {human_count(rate)}/s  {human_duration(elapsed_s)}"
        share = 100 * self._done // self._total if self._total else 100
        left = human_duration((self._total - self._done) / rate) if rate else "?"
        return f"{self._label} {self._done}/{self._total} ({share}%)  {human_count(rate)}/s  ETA {left}"


def human_duration(seconds: Number) -> str:
    """Returns two units at most: ``0.4s``, ``39s``, ``3m12s``, ``1h02m``, ``2d03h``; ``?`` when not a number."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def human_count(value: Number) -> str:
    """Returns three digits and a decimal prefix: ``812``, ``41.2k``, ``3.05M``; ``?`` when not a number."""
    if not math.isfinite(value):
        return "?"
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            digits = 0 if prefix == "" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
            return f"{value:.{digits}f}{prefix}"
        value /= 1000
    return f"{value:.3g}T"
