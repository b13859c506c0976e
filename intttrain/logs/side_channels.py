"""What a run says beside its checkpoints (console, files, TensorBoard, services) never ends it.

A destination that fails is reported once per outage. Its records wait meanwhile, and are written in their order when it
works again.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from intttrain.config.errors import passes, reason_of
from intttrain.logs.progress import Clock, Number

KEPT_RECORDS = 10_000  # about 10 MB
LAST_WAITS_S = (0.5, 1.0, 2.0, 4.0)  # for records that still wait at the end of the run

# An attempt that took long, because a network timed out, is not repeated for so many times as long.
_PAUSE = 10


@runtime_checkable
class Writer(Protocol):
    """A destination of metrics."""

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Records ``scalars`` as the state after ``step`` completed steps; an exception says that it did not."""

    def close(self) -> None:
        """Releases the destination; harmless when repeated."""


class SideChannel:
    """A writer that fails without ending anything.

    Args:
      name: of the destination, for people.
      writer: the destination.
      report: receives a line when an outage begins and when it ends.
      kept: how many records wait during an outage; the oldest are lost first.
      clock: seconds.
    """

    def __init__(
        self, name: str, writer: Writer, report: Callable[[str], None], *, kept: int = KEPT_RECORDS,
        clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        self._name, self._writer, self._report, self._kept, self._clock = name, writer, report, kept, clock
        self._waiting: collections.deque[tuple[int, Mapping[str, Number]]] = collections.deque()
        self._failure: Exception | None = None  # of the outage
        self._lost = 0  # records in it
        self._not_before = -float("inf")

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Writes what waits and this record, or has it wait."""
        self._waiting.append((step, scalars))
        if self._clock() >= self._not_before:
            self._attempt()
        self._forget(self._kept)

    def close(self) -> None:
        """Tries a last time to write what waits, and releases the destination."""
        for wait_s in (*LAST_WAITS_S, None):
            self._attempt()
            if not self._waiting or self._failure is None or not passes(self._failure) or wait_s is None:
                break
            time.sleep(wait_s)
        self._forget(0)
        if self._failure is not None:
            self._report(f"warning: {self._name} lacks {self._lost} records ({reason_of(self._failure)})")
            self._lost = 0
        with ending_nothing(f"{self._name} could not be closed", self._report):
            self._writer.close()

    def _attempt(self) -> None:
        if not self._waiting:
            return
        began_s = self._clock()
        try:
            while self._waiting:
                self._writer.write(*self._waiting[0])
                self._waiting.popleft()
        except Exception as error:
            self._not_before = self._clock() + _PAUSE * (self._clock() - began_s)
            if self._failure is None:
                self._report(
                    f"warning: {self._name} cannot be written ({reason_of(error)}); the run goes on, and up to "
                    f"{self._kept} records wait until it can"
                )
            self._failure = error
        else:
            if self._failure is not None:
                missing = f"{self._lost} records are missing" if self._lost else "no record is missing"
                self._report(f"{self._name} can be written again; {missing}")
            self._failure, self._lost = None, 0

    def _forget(self, kept: int) -> None:
        while len(self._waiting) > kept:
            self._waiting.popleft()
            self._lost += 1


@contextlib.contextmanager
def ending_nothing(what: str, report: Callable[[str], None]) -> Iterator[None]:
    """Reports an exception of the block instead of raising it, as "warning: ``what`` (the reason)"."""
    try:
        yield
    except Exception as error:
        report(f"warning: {what} ({reason_of(error)}); the run goes on")
