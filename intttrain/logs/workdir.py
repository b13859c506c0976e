"""Where a run is kept: a folder, or one in a bucket, ``gs://BUCKET/RUN``.

What is there is read in place, and checkpoints are written in place. All other files of a run grow line by line or
appear one by one, which objects of a bucket cannot: they are written into a local folder, and copied.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from intttrain.config.errors import PassingError, UserError, passes, reason_of
from intttrain.storage.files import Place

PUSH_EVERY_S = 60.0


def make_place(text: str, flag: str = "--workdir") -> Place:
    """Returns the folder that ``flag`` names; for one in a bucket the libraries are made ready.

    Raises:
      UserError: a URL of another kind, a library that is not installed, a bucket that is not there or not for us.
      PassingError: the bucket did not answer, though gcsfs asked for a while.
    """
    if "://" not in text:
        return Path(text)
    if not re.fullmatch(r"gs://[^/]+/+[^/].*", text):
        raise UserError(
            f"{flag}={text} is neither a folder nor gs://BUCKET/FOLDER; mount any other storage on every host and "
            "name the folder"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{flag}={text} needs the package gcsfs; pip install 'intttrain[gcs]'")
    # TensorFlow, where it is installed, would otherwise be loaded to read buckets.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Listings are never forgotten otherwise: a program would not see what another one writes.
    importlib.import_module("fsspec.config").conf.setdefault("gcs", {})["use_listings_cache"] = False
    for logger in ("gcsfs", "google.auth"):  # failures are raised too, and printed in one line
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    with _in_one_line(f"{flag}={text} cannot be read"):
        _file_system().info(text.split("/")[2])  # the bucket: without an answer a file would only seem to be absent
    return epath.Path(text.rstrip("/"))


class Workdir(contextlib.AbstractContextManager["Workdir"]):
    """The small files of a run, for the program that writes them.

    Leaving it copies what is new; a failure keeps the local folder and names it. Meanwhile a thread does so every
    ``PUSH_EVERY_S``; the program goes on when that fails, and is told once per outage. A local place is its own folder,
    and nothing is copied.

    Args:
      place: of the run.
      pulled: files and folders in it that are copied into ``folder`` before anything else.
      report: receives the warning.

    Attributes:
      place: of the run.
      folder: local; where to write, and to find what was pulled.

    Raises:
      UserError: the bucket cannot be read at the start or written at the end; ``PassingError`` if that passes.
    """

    def __init__(self, place: Place, pulled: Sequence[str], report: Callable[[str], None]) -> None:
        self.place, self._pulled, self._report = place, pulled, report
        self._is_local = isinstance(place, Path)
        self.folder = place if self._is_local else Path(tempfile.mkdtemp(prefix="intttrain-"))
        self._copied: dict[Path, tuple[int, int]] = {}  # time and size of files that the place has
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._push_regularly, name="push_workdir", daemon=True)

    def __enter__(self) -> Workdir:
        if not self._is_local:
            with _in_one_line(f"{self.place} cannot be read"):
                for name in self._pulled:
                    self._pull(name)
            self._thread.start()
        return self

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        if self._is_local:
            return
        self._ended = True
        self._wake.set()
        self._thread.join()
        try:
            with _in_one_line(f"files of {self.place} could not be copied there and are kept in {self.folder}"):
                self._push()
        except UserError as error:
            if exc is None:
                raise
            self._report(f"warning: {error}")  # the failure that ended the block is the one to raise
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def push_soon(self) -> None:
        """Has the thread copy what is new without waiting for its time."""
        self._wake.set()

    def name(self, path: Path) -> Place:
        """Returns what to call a file in ``folder`` when talking to people."""
        return self.place / path.relative_to(self.folder)

    def _push_regularly(self) -> None:
        warned = False
        while True:
            self._wake.wait(PUSH_EVERY_S)
            self._wake.clear()
            if self._ended:
                return
            try:
                self._push()
            except Exception as error:  # anything from the network to the credentials; the push at the end tells
                if not warned:
                    self._report(f"warning: {self.place} cannot be written ({reason_of(error)}); trying again")
                warned = True
            else:
                if warned:
                    self._report(f"{self.place} can be written again; all files were copied")
                warned = False

    def _push(self) -> None:
        """Copies files that are new or changed; those with hidden names are not finished."""
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = file.relative_to(self.folder)
            if any(part.startswith(".") for part in name.parts):
                continue
            try:
                state = _state(file)
                if self._copied.get(name) != state:
                    _file_system().put_file(str(file), str(self.place / name))
                    self._copied[name] = state
            except FileNotFoundError:
                if file.exists():  # else it was removed meanwhile
                    raise

    def _pull(self, name: str) -> None:
        root = str(self.place).removeprefix("gs://")
        for found in _file_system().find(f"{root}/{name}"):
            name_there = Path(found.removeprefix(f"{root}/"))
            file = self.folder / name_there
            file.parent.mkdir(parents=True, exist_ok=True)
            _file_system().get_file(found, str(file))
            self._copied[name_there] = _state(file)


def _file_system() -> Any:
    return importlib.import_module("fsspec").filesystem("gcs")


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of four libraries, without a common class
        if passes(error):  # gcsfs has tried again for half a minute
            raise PassingError(f"{what}: {reason_of(error)}; no answer, start the same command again") from error
        raise UserError(
            f"{what}: {reason_of(error)}; check the name, the network, and the credentials of this host "
            "('gcloud auth application-default login' on your own machine)"
        ) from error
