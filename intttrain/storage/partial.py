"""What is not finished yet: a hidden sibling of its target, of one writer alone, that tells whether the writer lives.

    .NAME.partial-BOOT-RANDOM    BOOT: the first digits of what this start of the kernel is called

The writer holds a lock on it, which is gone with the process, however that ended and in whatever container it ran. A
lock counts only for the kernel that has given it, since some network file systems do not tell other hosts of it:
what another host made, or a file system without locks holds, is left to people.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from intttrain.storage.processes import boot

_BOOT_DIGITS = 8


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Makes a folder beside ``target``, with its parents; what still has its name after the block is removed."""

    def make(path: Path) -> int | None:
        path.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):  # one who removes leftovers was faster
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        return None

    path, descriptor = _make_locked(target, make)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


@contextlib.contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """Makes an empty file beside ``target``; what still has its name after the block is removed."""
    path, descriptor = _make_locked(target, lambda path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def remove_leftovers(target: Path, report: Callable[[str], None]) -> None:
    """Removes what writers of ``target`` left that were killed; what may belong to a living one stays. Says so."""
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.partial-*")):
        if not path.name.startswith(f".{target.name}.partial-{_boot()}-"):
            report(f"note: {path} was left on another host, before a restart or by an older release; delete it")
            continue
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            report(_remove_leftover(path))


def is_locked_elsewhere(descriptor: int) -> bool:
    """Locks an open file for as long as it is open; tells whether it could not, because another process has."""
    return _lock(descriptor) is False


def _remove_leftover(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        locked = _lock(descriptor)
        if locked is None:
            return f"note: {path} is unfinished, and its file system cannot tell whether somebody still writes it"
        if not locked:
            return f"note: another process is writing {path}"
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return f"note: {path}, left unfinished by a process that was killed, {_gone_or_not(path)}"
    finally:
        os.close(descriptor)


def _gone_or_not(path: Path) -> str:
    return "cannot be removed; delete it" if path.exists() else "was removed"


def _make_locked(target: Path, make: Callable[[Path], int | None]) -> tuple[Path, int]:
    """Makes something under a free name and returns it with its lock, an open file."""
    while True:
        path = target.with_name(f".{target.name}.partial-{_boot()}-{secrets.token_hex(4)}")
        if (descriptor := make(path)) is not None:
            if _lock(descriptor) is not False and path.exists():
                return path, descriptor
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Tells whether this process has the lock now, ``None`` where there are none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None
    return True


def _boot() -> str:
    return boot()[:_BOOT_DIGITS] or "unknown"
