"""Errors of Orbax in one line: what they mean, and none of the stack traces that it prints beside."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

from intttrain.config.errors import UserError

# Status codes of TensorStore for files that are absent, too short or senseless. Others (PERMISSION_DENIED,
# UNAVAILABLE, ...) say nothing about the files.
_DAMAGE_CODES = ("NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "DATA_LOSS", "INVALID_ARGUMENT")


class DamagedError(UserError):
    """Files of a checkpoint are missing, shortened or changed; ``reason`` says which, without advice."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_damage(error: BaseException) -> bool:
    """Returns whether what was read is wrong, rather than that it could not be read this time."""
    cause = _cause(error)
    if isinstance(cause, OSError):
        return isinstance(cause, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    if code := re.match(r"([A-Z_]+): ", str(cause)):  # TensorStore's errors are all ValueError
        return code[1] in _DAMAGE_CODES
    return isinstance(cause, ValueError | LookupError | TypeError | AttributeError)


def one_line(error: BaseException) -> str:
    """Returns one line of bounded length."""
    cause = _cause(error)
    line = (str(cause).strip() or type(cause).__name__).splitlines()[0].partition(" [tensorstore_spec=")[0]
    return line if len(line) <= 200 else "..." + line[-200:]


def _cause(error: BaseException) -> BaseException:
    """Returns the innermost error: TensorStore and Orbax put the actual cause there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def silence_orbax() -> None:
    """Keeps Orbax from printing stack traces of failures that this module raises as one line.

    It logs every failed operation up to four times with its trace, and the reads that were under way when the first
    one failed complain, from their own threads, that nobody waits for them any more.
    """
    for logger in (logging.getLogger("absl"), logging.getLogger("asyncio")):
        if _is_not_from_orbax not in logger.filters:
            logger.addFilter(_is_not_from_orbax)
    if not isinstance(sys.unraisablehook, _UnraisableFilter):
        sys.unraisablehook = _UnraisableFilter(sys.unraisablehook)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL or not (
        f"{os.sep}orbax{os.sep}" in record.pathname or "orbax" in record.getMessage()
    )


class _UnraisableFilter:
    """Passes on what Python cannot raise, except the aftermath of a failed Orbax read."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, unraisable: Any) -> None:
        abandoned_read = str(unraisable.exc_value) == "Event loop is closed"
        code = unraisable.object.cr_code if isinstance(unraisable.object, types.CoroutineType) else None
        if not abandoned_read and not (code and f"{os.sep}orbax{os.sep}" in code.co_filename):
            self._previous(unraisable)


@contextlib.contextmanager
def without_stray_warnings() -> Iterator[None]:
    """A failed Orbax read leaves coroutines that were never awaited; they are collected here, unseen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        try:
            yield
        except Exception:
            gc.collect()
            raise
