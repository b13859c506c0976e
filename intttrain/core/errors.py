"""The one exception type that reaches a user as a single line instead of a stack trace."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

RESTART_STATUS = 4  # at which a launcher starts again
FINAL_STATUSES = (2, 3)  # at which a launcher does not start again


class UserError(Exception):
    """Something the user can fix: bad configuration, bad input data, an occupied output path.

    The message is one line and says what is wrong, where, both values, the rule, and the nearest valid choice.
    The command line prints it after ``error:`` and exits with ``status``.
    """

    status = 2


class PassingError(UserError):
    """Something that nobody has to fix: a network, a storage service or a device that is not there for the moment.

    It was tried again for a while. Nothing is wrong with the command: starting it again later may help.
    """

    status = RESTART_STATUS


class MissingProcessError(PassingError):
    """Another process of the run is not there."""


def explain_exit(error: BaseException) -> tuple[str, int] | None:
    """Returns what a person reads and the exit status, ``None`` for a bug: a stack trace and 1."""
    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}", 2
    return ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest choice, or the sorted choices when none is close."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(names)}"


def nearest_divisors(total: int, wanted: int, count: int = 3) -> list[int]:
    """Returns up to ``count`` divisors of ``total`` closest to ``wanted`` (by ratio), in increasing order."""
    small = [d for d in range(1, int(total**0.5) + 1) if total % d == 0]
    divisors = set(small) | {total // d for d in small}
    ranked = sorted(divisors, key=lambda d: max(d, wanted) / min(d, wanted))
    return sorted(ranked[:count])
