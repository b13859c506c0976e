"""Lines for people on standard output and standard error, where nobody may be listening any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys

from intttrain.core.progress import Stream


def say(line: str) -> None:
    """Prints a line to standard error; if it cannot be written, that ends nothing."""
    with contextlib.suppress(OSError, ValueError):
        print_line(line, sys.stderr)


def print_line(line: str, stream: Stream | None) -> None:
    """Prints a line at once; without a stream (a program that was started with it closed) it prints nothing.

    Raises:
      OSError: the line cannot be written. If nobody reads the stream any more, later lines go nowhere, unseen.
      ValueError: the stream is closed.
    """
    if stream is None:
        return
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        drop(stream)
        raise


def drop(stream: Stream | None) -> None:
    """Sends what a stream still holds, and whatever follows, to nowhere.

    Python tries once more to write it when the program ends. If that fails it complains, and ends with status 120.
    """
    if not isinstance(stream, io.TextIOWrapper):  # not a stream of the system
        return
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def finish_streams() -> None:
    """Shows what standard output and standard error hold; what they cannot take is dropped, not the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            drop(stream)
