"""Standard output and standard error whose reader may leave, as in ``intttrain config --config=... | head``."""

from __future__ import annotations

import io
from typing import Any, TextIO


class _Pipe(io.FileIO):
    """Takes what nobody reads any more: the command goes on, writes its files and ends with a status of its own."""

    def write(self, data: Any) -> int:
        """Writes to the file descriptor, if there is still somebody at its other end."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def outlive_reader(stream: TextIO | None) -> TextIO | None:
    """Returns a stream to the same file descriptor that never raises ``BrokenPipeError``, at its end neither.

    A stream without one (closed, or a test's) comes back as it is.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip
