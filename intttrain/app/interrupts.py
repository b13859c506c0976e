"""Signals that ask a run to save and end."""

from __future__ import annotations

import contextlib
import signal
import types

from intttrain.core.agreement import largest
from intttrain.core.distributed import process_count


class Interrupts(contextlib.AbstractContextManager["Interrupts"]):
    """Notes SIGTERM and Ctrl-C instead of dying, so that the loop can save first; a second one kills.

    Args:
      ask_every: steps after which several processes ask each other; one alone looks after each.
    """

    def __init__(self, ask_every: int) -> None:
        self.received: int | None = None  # by any process
        self._noted: int | None = None  # by this one; may come while the others are being asked
        self._ask_every = ask_every if process_count() > 1 else 1

    def stop(self, step: int) -> bool:
        """Returns whether a process was interrupted; all get the same answer, at multiples of ``ask_every``."""
        if step % self._ask_every == 0:
            self.received = largest(self._noted or 0) or None
            return self.received is not None
        return False

    def __enter__(self) -> Interrupts:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if self._noted is not None:
            raise KeyboardInterrupt
        self._noted = number
