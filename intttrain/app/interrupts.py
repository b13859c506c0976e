"""Signals that ask a run to save and end."""

from __future__ import annotations

import contextlib
import signal
import types
from collections.abc import Callable

from intttrain.pod.agreement import ask_largest
from intttrain.pod.distributed import process_count


class Interrupts(contextlib.AbstractContextManager["Interrupts"]):
    """Notes SIGTERM and Ctrl-C instead of dying, so that the loop can save first; a second one kills."""

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self._on_signal = on_signal
        self.received: int | None = None  # by any process
        self._noted: int | None = None  # by this one
        self._asked: Callable[[], int] | None = None

    def stop(self) -> bool:
        """Returns whether a process was interrupted, to all processes the same; to be called before every step.

        Several processes hear what they asked each other at the call before: like the numbers of a step, the answer
        comes from the devices one step late, and nobody waits for it.
        """
        if process_count() == 1:
            self.received = self._noted
        else:
            self.received = (self._asked() or None) if self._asked is not None else None
            self._asked = ask_largest(self._noted or 0)
        return self.received is not None

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
        self._on_signal()
