"""Plain text from disk: which files a ``TextSource`` names and what they contain. One file is one document."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

from intttrain.config import TextSource
from intttrain.config.errors import UserError
from intttrain.config.registry import SOURCES


@dataclasses.dataclass
class FileCounts:
    """What was left out while reading.

    Attributes:
      binary: files inside directories that are not UTF-8 text.
      stopped_at_max_bytes: True if ``max_bytes`` ended the reading.
    """

    binary: int = 0
    stopped_at_max_bytes: bool = False


@dataclasses.dataclass(frozen=True)
class _File:
    name: str  # path below the directory that was searched, or the file's own name
    path: Path
    explicit: bool  # named by itself in source.paths


def read_text_files(source: TextSource, counts: FileCounts) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every file, directories in the order given and files sorted by name below each.

    ``patterns`` match a file's name or its path below its directory, ``exclude`` the path (``*`` also matches "/");
    neither applies to a file that is named by itself. A document that would lift the total above ``max_bytes`` ends
    the reading. Text is passed on unchanged: no newline translation, no normalisation.

    Raises:
      UserError: a path does not exist, nothing matches, a file that is named by itself is not text, a file cannot
        be read, or the first document is larger than ``max_bytes``.
    """
    total = 0
    for file in list(_find_files(source)):  # all names first: a missing path is reported before any work
        data = _read(file)
        text = _as_text(data)
        if text is None:
            if file.explicit:
                raise UserError(
                    f"prepare.source.paths: {file.path} is not UTF-8 text; convert it, or name its directory to "
                    "have such files skipped"
                )
            counts.binary += 1
            continue
        total += len(data)
        if source.max_bytes is not None and total > source.max_bytes:
            if total == len(data):
                raise UserError(
                    f"prepare.source.max_bytes={source.max_bytes} is less than the first document {file.path} "
                    f"({len(data)} bytes); use {len(data)} or more"
                )
            counts.stopped_at_max_bytes = True
            return
        yield file.name, text


SOURCES.add("text", lambda source, counts, report: read_text_files(source, counts), TextSource)


def _find_files(source: TextSource) -> list[_File]:
    if not source.paths:
        raise UserError("prepare.source.paths is empty; name at least one file or directory")
    files: list[_File] = []
    for name in source.paths:
        path = Path(name)
        if path.is_file():
            files.append(_File(path.name, path, explicit=True))
        elif path.is_dir():
            files.extend(_search(path, source))
        else:
            raise UserError(f"prepare.source.paths: {name} does not exist{_nearest_parent(path)}")
    if not files:
        raise UserError(
            f"prepare.source: no file below {', '.join(source.paths)} matches patterns={list(source.patterns)} "
            f"without exclude={list(source.exclude)}; use for example patterns=('*',)"
        )
    return files


def _search(root: Path, source: TextSource) -> list[_File]:
    found = []
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            below = path.relative_to(root).as_posix()
            wanted = any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(below, p) for p in source.patterns)
            if wanted and path.is_file() and not any(fnmatch.fnmatchcase(below, p) for p in source.exclude):
                found.append(_File(below, path, explicit=False))
    return sorted(found, key=lambda file: file.name)


def _nearest_parent(path: Path) -> str:
    parent = next((p for p in path.absolute().parents if p.is_dir()), None)
    return f"; the nearest directory that exists is {parent}" if parent else ""


def _read(file: _File) -> bytes:
    try:
        return file.path.read_bytes()
    except OSError as error:
        raise UserError(f"prepare.source.paths: {file.path} cannot be read ({error.strerror})") from None


def _as_text(data: bytes) -> str | None:
    """Returns the text, or None for binary content (a NUL byte, or not UTF-8)."""
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
