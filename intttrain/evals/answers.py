"""Answers of a model on disk, one JSON object per line, so that an evaluation that was stopped goes on where it was.

The first line holds what the answers depend on; a file of anything else is refused. A last line that was cut off by a
kill is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from intttrain.config.errors import UserError
from intttrain.pod.agreement import on_first_process
from intttrain.storage.partial import is_locked_elsewhere

Settings = Mapping[str, str | int | float | bool | None]
_HEADER = "settings"
_BEGIN = f'{{"{_HEADER}": '.encode()


class AnswerFile:
    """The answers of ``path``; only one process may have it open."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Reads what is there, or begins a file.

        Raises:
          UserError: the file holds answers of other settings or no answers, cannot be written, or another process does.
        """
        self._path = path
        self._answers: dict[str, tuple[str, str]] = {}  # key -> digest of the prompt, answer
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115  stays open
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            if is_locked_elsewhere(self._file.fileno()):
                raise UserError(
                    f"another process is writing answers to {path}; wait for its end, or evaluate another checkpoint"
                )
            complete = self._read(dict(settings))
            self._file.truncate(complete)
            if complete == 0:
                self._write({_HEADER: dict(settings)})
        except BaseException:
            self.close()
            raise

    def find(self, key: str, prompt: str) -> str | None:
        """Returns the answer to ``prompt`` that stands under ``key``, ``None`` if there is none.

        Raises:
          UserError: the answer there is one to another prompt.
        """
        if key not in self._answers:
            return None
        digest, text = self._answers[key]
        if digest != _digest(prompt):
            raise UserError(
                f"{self._path}: the answer {key} was given to another prompt; the samples have changed, so name "
                "another file or remove that one"
            )
        return text

    def add(self, key: str, prompt: str, text: str) -> None:
        """Writes an answer to disk. Raises ``UserError`` if it cannot be written."""
        self._answers[key] = (_digest(prompt), text)
        self._write({"key": key, "prompt": _digest(prompt), "text": text})

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the writing."""
        with contextlib.suppress(OSError):  # what could not be written was reported by ``add``
            self._file.close()

    def _read(self, settings: dict[str, Any]) -> int:
        """Takes in what is there and returns the bytes of the complete lines."""
        self._file.seek(0)
        complete = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                if number == 1 and not _BEGIN.startswith(line[: len(_BEGIN)]):
                    raise self._foreign(number)
                break
            complete += len(line)
            try:
                record = json.loads(line)
                if number == 1:
                    self._check(record[_HEADER], settings)
                else:
                    self._answers[record["key"]] = (record["prompt"], record["text"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{self._path} line {number} is no answer; name another file or remove this one"
                ) from None
        return complete

    def _check(self, found: dict[str, Any], settings: dict[str, Any]) -> None:
        for name in sorted(found.keys() | settings.keys()):
            if found.get(name) != settings.get(name):
                raise UserError(
                    f"the answers in {self._path} were given with {name}={found.get(name)!r}, now it is "
                    f"{settings.get(name)!r}; name another file or remove that one"
                )

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _foreign(self, number: int) -> UserError:
        return UserError(f"{self._path} line {number} is no answer; name another file or remove this one")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"answers cannot be written to {self._path} ({error.strerror}); choose another path")


@contextlib.contextmanager
def open_answers(path: Path, settings: Settings) -> Iterator[AnswerFile | None]:
    """Yields the file on process 0, ``None`` on the others; all of them raise what opening it raises."""
    files: list[AnswerFile] = []
    on_first_process(lambda: files.append(AnswerFile(path, settings)))
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file)
        yield files[0] if files else None


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
