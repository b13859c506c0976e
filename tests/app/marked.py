"""The `intttrain` program, saying where it is, and slowly where it is asked to: so that a signal finds it there.

    python -m tests.app.marked SLOW_S COMMAND --flag=value ...

Prints "MARK step" when a batch is taken, "MARK save" when a checkpoint begins to be saved, "MARK restore" and "MARK
restored" around the restoring of one. Reading one and giving a finished one its name each take SLOW_S seconds longer.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

from intttrain.app import loop
from intttrain.app.cli import run
from intttrain.data import Batch
from intttrain.train import Checkpoints


def mark(what: str) -> None:
    print("MARK", what, flush=True)


def main() -> None:
    slow_s, arguments = float(sys.argv[1]), sys.argv[2:]
    make_batches, restore, save, rename = loop.make_batches, Checkpoints.restore, ocp.CheckpointManager.save, os.rename

    def marked_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for batch in make_batches(*args, **kwargs):
            mark("step")
            yield batch

    def marked_save(*args: Any, **kwargs: Any) -> bool:
        mark("save")
        return save(*args, **kwargs)

    def marked_restore(*args: Any, **kwargs: Any) -> Any:
        mark("restore")
        time.sleep(slow_s / 2)
        result = restore(*args, **kwargs)
        time.sleep(slow_s / 2)
        mark("restored")
        return result

    def slow_rename(*args: Any, **kwargs: Any) -> None:
        time.sleep(slow_s)
        rename(*args, **kwargs)

    loop.make_batches, Checkpoints.restore = marked_batches, marked_restore  # type: ignore[method-assign]
    ocp.CheckpointManager.save = marked_save  # type: ignore[method-assign]
    os.rename = os.replace = slow_rename  # type: ignore[assignment]
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
