"""Trying again, for a bounded time, what fails for a reason that passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from intttrain.config.errors import WaitedError, passes, reason_of

T = TypeVar("T")

WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0)  # before each further attempt


def retried(
    action: Callable[[], T], what: str, report: Callable[[str], None], *, waits_s: Sequence[float] | None = None
) -> T:
    """Returns what ``action`` returns, at the latest of its attempts.

    Args:
      action: may be called several times.
      what: fails, for the line of each failure: "a row cannot be read".
      report: receives that line.
      waits_s: by default ``WAITS_S``.

    Raises:
      Exception: of the last attempt, or the first one that does not pass by itself (``passes``) or was waited for.
    """
    for wait_s in WAITS_S if waits_s is None else waits_s:
        try:
            return action()
        except Exception as error:
            if isinstance(error, WaitedError) or not passes(error):
                raise
            report(f"warning: {what} ({reason_of(error)}); trying again in {wait_s:g} s")
        time.sleep(wait_s)
    return action()
