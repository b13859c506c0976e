"""Lines for people on standard output and standard error, where nobody may be listening any more."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

from intttrain.logs.progress import Stream


class _Pipe(io.FileIO):
    """Takes what nobody reads any more: the command goes on, writes its files and ends with a status of its own."""

    is_abandoned = False

    def write(self, data: Any, /) -> int:
        """Writes to the file descriptor, if there is still somebody at its other end."""
        try:
            return super().write(data)
        except BrokenPipeError:
            self.is_abandoned = True
            return memoryview(data).nbytes


def outlive_reader(stream: TextIO | None) -> TextIO | None:
    """Returns a stream to the same file descriptor that never raises ``BrokenPipeError``, at its end neither.

    For a reader that leaves, as in ``intttrain config --config=... | head``. A stream without a file descriptor
    (closed, or of a test) comes back as it is.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


def _is_abandoned(stream: Stream) -> bool:
    raw = stream.buffer.raw if isinstance(stream, io.TextIOWrapper) and hasattr(stream.buffer, "raw") else None
    return isinstance(raw, _Pipe) and raw.is_abandoned


def say(line: str) -> None:
    """Prints a line to standard error; if it cannot be written, that ends nothing."""
    with contextlib.suppress(OSError, ValueError):
        print_line(line, sys.stderr)


def print_line(line: str, stream: Stream | None) -> None:
    """Prints a line at once; without a stream (a program that was started with it closed) it prints nothing.

    Raises:
      OSError: the line cannot be written, or nobody reads the stream any more.
      ValueError: the stream is closed.
    """
    if stream is None:
        return
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:  # of another program's stream
        _drop(stream)
        raise
    if _is_abandoned(stream):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _drop(stream: Stream | None) -> None:
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
            _drop(stream)
