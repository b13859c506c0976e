"""Output directories that appear whole or not at all.

Everything is written into a hidden sibling of the target, on the same file system, and becomes the target in one
rename. A process that is killed without any chance to clean up leaves at most that hidden sibling, which no reader
looks at and ``remove_leftovers`` removes.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from intttrain.config.errors import UserError
from intttrain.storage.partial import partial_folder


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
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            fresh = stack.enter_context(partial_folder(target))
        except OSError as error:
            raise UserError(f"output {target} cannot be created ({error.strerror}); choose a writable path") from None
        try:
            yield fresh
            _rename(fresh, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"output {target}: the disk is full; free space or choose another path") from None
            raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:  # from the deepest upwards; one that is used by now stays
        with contextlib.suppress(OSError):
            folder.rmdir()


def _rename(fresh: Path, target: Path) -> None:
    """Moves ``fresh`` onto ``target``, which may be an empty directory; the second look closes most races."""
    check_target_free(target)
    try:
        fresh.rename(target)
    except OSError as error:
        raise UserError(f"output {target} cannot be put in place ({error.strerror}); choose another path") from None
