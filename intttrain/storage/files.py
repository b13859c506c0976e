"""Files that appear whole or not at all."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from etils import epath

from intttrain.storage.partial import partial_file, remove_leftovers

Place: TypeAlias = Path | epath.Path  # local, or in a bucket


def write_text(path: Place, text: str) -> None:
    """Writes ``text`` so that ``path`` holds all of it or what it held before; makes the folder."""
    if not isinstance(path, Path):  # an object of a bucket, which appears whole
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path, _say_nothing)  # of a few lines
    with partial_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def _say_nothing(_: str) -> None: ...


def create_text(path: Place, text: str) -> None:
    """Writes ``text`` into a file that did not exist: of several that try to make it only one does; makes the folder.

    Raises:
      FileExistsError: it is there.
    """
    if not isinstance(path, Path):
        importlib.import_module("fsspec").filesystem("gcs").pipe_file(str(path), text.encode(), mode="create")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with path.open("x", encoding="utf-8") as file:
                file.write(text)


def create_json(path: Place, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as ``create_text`` does. Raises ``ValueError`` for numbers that JSON does not have."""
    create_text(path, _to_text(content))


def write_json(path: Place, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as ``write_text`` does. Raises ``ValueError`` for numbers that JSON does not have."""
    write_text(path, _to_text(content))


def _to_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def append_line(path: Path, line: str) -> None:
    """Appends a whole line, or nothing that a reader would see.

    The file is opened by name for each line: one that was renamed, removed or went stale does not stay in use. What an
    earlier failure or a kill left of a line is cut off first.
    """
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end and _byte_before(file, end) != b"\n":
            while end and _byte_before(file, end) != b"\n":
                end -= 1
            file.truncate(end)
        file.write(line.encode() + b"\n")


def _byte_before(file: BinaryIO, end: int) -> bytes:
    file.seek(end - 1)
    return file.read(1)
