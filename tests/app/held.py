"""The `intttrain` program, standing still at five moments of a run until a line arrives on standard input.

    python -m tests.app.held BEAT_S COMMAND --flag=value ...

Prints "HELD MOMENT" at each: "start" (before config.json), "compile", "step", "save" (with its files unfinished) and
"end". BEAT_S is how often it says that it lives.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

from intttrain.app import loop, runs
from intttrain.app.cli import run
from intttrain.data import Batch
from intttrain.logs import lease
from intttrain.pod.watchdog import Watchdog

MOMENTS = ("start", "compile", "step", "save", "end")
held: set[str] = set()


def hold(moment: str) -> None:
    if moment not in held:
        held.add(moment)
        print("HELD", moment, flush=True)
        sys.stdin.readline()


def before(moment: str, function: Any, *, condition: Any = lambda *_: True) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if condition(*args):
            hold(moment)
        return function(*args, **kwargs)

    return wrapper


def main() -> None:
    beat_s, *arguments = sys.argv[1:]
    lease.BEAT_S = float(beat_s)
    make_batches, save, rename, may_rename = loop.make_batches, ocp.CheckpointManager.save, os.rename, threading.Event()

    def held_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for count, batch in enumerate(make_batches(*args, **kwargs), start=1):
            if count == 3:
                hold("step")
            yield batch

    def held_save(*args: Any, **kwargs: Any) -> bool:
        result = save(*args, **kwargs)
        hold("save")
        may_rename.set()
        return result

    def late_rename(source: Any, target: Any, **kwargs: Any) -> None:
        if "checkpoints" in str(source):
            may_rename.wait()
        rename(source, target, **kwargs)

    runs.write_json = before("start", runs.write_json)
    Watchdog.enter = before("compile", Watchdog.enter, condition=lambda _, phase: phase == "compiling")  # type: ignore[method-assign]
    loop.make_batches, loop.summarise_goodput = held_batches, before("end", loop.summarise_goodput)
    ocp.CheckpointManager.save = held_save  # type: ignore[method-assign]
    os.rename = late_rename
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
