"""Output directories that appear whole or not at all.

Everything is written into a hidden sibling of the target, on the same file system, and becomes the target in one
rename. A process that is killed without any chance to clean up leaves at most that hidden sibling, which no reader
looks at.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from intttrain.core.errors import UserError


def check_target_free(target: Path) -> None:
    """Checks that ``target`` does not exist or is an empty directory.

    Raises:
      UserError: it is a file or a directory with something in it.
    """
    if target.is_dir():
        entries = sorted(entry.name for entry in target.iterdir())
        if entries:
            raise UserError(
                f"output {target} already holds {len(entries)} entries ({entries[0]}, ...); "
                "existing output is never overwritten; choose another path or remove it first"
            )
    elif target.exists() or target.is_symlink():
        raise UserError(f"output {target} exists and is not a directory; choose another path")


@contextlib.contextmanager
def publish_directory(target: Path) -> Iterator[Path]:
    """Yields a fresh directory that becomes ``target`` when the block ends without an exception.

    Any exception, an interrupt included, removes the fresh directory and every parent that was made for it.

    Raises:
      UserError: the target is occupied, or cannot be created or renamed (no permission, parent is a file, ...).
    """
    target = Path(target).absolute()
    check_target_free(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    fresh = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output {target} cannot be created ({error.strerror}); choose a writable path") from None
    try:
        yield fresh
        _rename(fresh, target)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        for parent in missing:  # from the deepest upwards; one that someone else uses by now stays
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"output {target}: the disk is full; free space or choose another path") from None
        raise


def _rename(fresh: Path, target: Path) -> None:
    """Moves ``fresh`` onto ``target``, which may be an empty directory; the second look closes most races."""
    check_target_free(target)
    try:
        fresh.rename(target)
    except OSError as error:
        raise UserError(f"output {target} cannot be put in place ({error.strerror}); choose another path") from None
