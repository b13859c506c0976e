"""The exceptions that reach a user as a single line instead of a stack trace, and which failures pass by themselves."""

from __future__ import annotations

import difflib
import errno
import re
import socket
import ssl
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


class WaitedError(PassingError):
    """Something that was waited for as long as is worth it: only another start may help, not another attempt."""


class MissingProcessError(WaitedError):
    """Another process of the run is not there."""


# What storage on a network, a network and a device that is in use say, or a server far away: "try again". EIO is among
# them because soft NFS mounts and mounted buckets call a lost connection so; a disk that is broken stays broken, and
# launchers give up after a few starts.
_PASSING_ERRNOS = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT,
        errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE, errno.ESHUTDOWN,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
    }
)  # fmt: skip
_PASSING_HTTP = frozenset({408, 429, *range(500, 600)})
# As TensorStore and gRPC begin their messages.
_PASSING_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
# Of libraries that are not imported here, with the classes below them.
_PASSING_CLASSES = frozenset(
    {
        "aiohttp.client_exceptions.ClientConnectionError",
        "aiohttp.client_exceptions.ClientPayloadError",
        "gcsfs.retry.ChecksumError",
        "google.auth.exceptions.TransportError",
        "requests.exceptions.ChunkedEncodingError",
        "requests.exceptions.ConnectionError",
        "requests.exceptions.Timeout",
        "wandb.errors.errors.CommError",
    }
)
_LASTING_CLASSES = frozenset(
    {"aiohttp.client_exceptions.ClientConnectorCertificateError", "wandb.errors.errors.AuthenticationError"}
)


def passes(error: BaseException) -> bool:
    """Returns whether a failure passes by itself: a network, a service, a stale file handle, a device in use.

    Everything else needs a person: a full disk, no permission, wrong credentials, no such bucket. Only this function
    tells the two apart. Of exceptions that were raised ``from`` each other, the first that says something counts.
    """
    if isinstance(error, UserError):  # somebody has decided
        return isinstance(error, PassingError)
    names = {f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__}
    if isinstance(error, ssl.SSLCertVerificationError) or names & _LASTING_CLASSES:
        return False
    if (status := _http_status(error)) is not None:
        return status in _PASSING_HTTP
    says_so = getattr(error, "retryable", False) is True  # of google-auth
    if says_so or isinstance(error, TimeoutError | socket.gaierror) or names & _PASSING_CLASSES:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING_ERRNOS
    if number := re.search(r"\[OS error (\d+): ", str(error)):  # of TensorStore, which raises ValueError
        return int(number[1]) in _PASSING_ERRNOS
    if re.match(f"({'|'.join(_PASSING_CODES)}): ", str(error)):
        return True
    return error.__cause__ is not None and passes(error.__cause__)


def _http_status(error: BaseException) -> int | None:
    """Returns the status of an answer that a library of HTTP raised."""
    response = getattr(error, "response", None)
    for value in (getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None)):
        if re.fullmatch("[45][0-9][0-9]", str(value)):
            return int(str(value))
    return None


def reason_of(error: BaseException) -> str:
    """Returns what an exception of any library says, in one line of at most 200 characters (ours are one line)."""
    if isinstance(error, UserError):
        return str(error)
    plain = error.strerror if type(error).__module__ == "builtins" and isinstance(error, OSError) else None
    return " ".join((plain or str(error).strip() or type(error).__name__).split())[:200]


def user_error(message: str, cause: BaseException) -> UserError:
    """Returns the exception for a failure that is explained in one line: with the status that ``cause`` deserves."""
    return PassingError(message) if passes(cause) else UserError(message)


def explain_exit(error: BaseException) -> tuple[str, int] | None:
    """Returns what a person reads and the exit status, ``None`` for a bug: a stack trace and 1."""
    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    status = RESTART_STATUS if passes(error) else 2
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}", status
    return (reason_of(error), status) if status == RESTART_STATUS else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest choice, or the sorted choices when none is close."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(names)}" if names else "; there is nothing to choose from"


def nearest_divisors(total: int, wanted: int, count: int = 3) -> list[int]:
    """Returns up to ``count`` divisors of ``total`` closest to ``wanted`` (by ratio), in increasing order."""
    small = [d for d in range(1, int(total**0.5) + 1) if total % d == 0]
    divisors = set(small) | {total // d for d in small}
    ranked = sorted(divisors, key=lambda d: max(d, wanted) / min(d, wanted))
    return sorted(ranked[:count])
