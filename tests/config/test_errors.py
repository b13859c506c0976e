"""Which failures pass by themselves, and with which status a command ends."""

from __future__ import annotations

import errno
import os
import socket
import ssl

import pytest

from intttrain.config.errors import PassingError, UserError, explain_exit, passes, user_error
from intttrain.storage import retries
from intttrain.storage.retries import retried


class Answer(Exception):
    """As libraries of HTTP raise: gcsfs has `code`, aiohttp `status`, requests a `response`."""

    def __init__(self, **attributes: object) -> None:
        super().__init__("no")
        self.__dict__.update(attributes)


def chained(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.EBUSY, "Device or resource busy"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError("timed out"), True),
        (socket.gaierror(-2, "Name or service not known"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (OSError("Forbidden: gs://bucket"), False),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), False),
        (Answer(code="503"), True),
        (Answer(status=429), True),
        (Answer(response=Answer(status_code=500)), True),
        (Answer(code=401), False),
        (Answer(code=404), False),
        (Answer(retryable=True), True),
        (ValueError("UNAVAILABLE: connection reset"), True),
        (ValueError("DEADLINE_EXCEEDED: no answer"), True),
        (ValueError("UNKNOWN: Error writing file [OS error 116: ESTALE Stale file handle]"), True),
        (ValueError("RESOURCE_EXHAUSTED: Error writing [OS error 28: ENOSPC No space left on device]"), False),
        (ValueError("NOT_FOUND: Error opening"), False),
        (chained(RuntimeError("Orbax says something general"), OSError(errno.ESTALE, "Stale")), True),
        (chained(RuntimeError("Orbax says something general"), OSError(errno.ENOSPC, "full")), False),
        (chained(UserError("somebody decided"), OSError(errno.ESTALE, "Stale")), False),
        (PassingError("somebody decided"), True),
        (ZeroDivisionError("a bug"), False),
    ],
)
def test_what_passes(error: Exception, passing: bool) -> None:
    assert passes(error) == passing
    explained = explain_exit(error)
    if passing:
        assert explained is not None and explained[1] == 4
    else:
        assert explained is None or explained[1] == 2
    assert user_error("x", error).status == (4 if passing else 2)


def test_what_the_libraries_raise() -> None:
    aiohttp, requests = pytest.importorskip("aiohttp"), pytest.importorskip("requests")
    google, gcsfs = pytest.importorskip("google.auth.exceptions"), pytest.importorskip("gcsfs.retry")
    assert passes(requests.exceptions.ConnectionError("no route")) and passes(requests.exceptions.ReadTimeout())
    assert passes(aiohttp.ServerDisconnectedError()) and passes(aiohttp.ClientPayloadError("cut off"))
    assert passes(google.TransportError("no metadata server")) and not passes(google.DefaultCredentialsError("none"))
    assert passes(gcsfs.HttpError({"code": 503, "message": "later"}))
    assert not passes(gcsfs.HttpError({"code": 401, "message": "anonymous"}))


def test_an_error_that_passes_is_explained_in_one_line() -> None:
    error = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/data/tokens.bin")
    assert explain_exit(error) == (f"{os.strerror(errno.ESTALE)}: /data/tokens.bin", 4)
    assert explain_exit(Answer(code=503)) == ("no", 4)


def test_trying_again_is_bounded_and_only_for_what_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    lines: list[str] = []
    failures = [OSError(errno.ESTALE, "Stale file handle"), TimeoutError()]

    def action() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    assert retried(action, "it cannot be read", lines.append) == "done"
    assert lines == [
        "warning: it cannot be read (Stale file handle); trying again in 1 s",
        "warning: it cannot be read (TimeoutError); trying again in 2 s",
    ]
    failures[:] = [OSError(errno.ESTALE, "Stale file handle")] * 100
    with pytest.raises(OSError, match="Stale"):
        retried(action, "it cannot be read", lines.append)
    assert len(failures) == 100 - 6 and sum(waits[2:]) == 30
    failures[:] = [OSError(errno.ENOSPC, "full")]
    waits.clear()
    with pytest.raises(OSError, match="full"):
        retried(action, "it cannot be read", lines.append)
    assert not waits
