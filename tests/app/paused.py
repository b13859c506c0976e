"""The `intttrain` program, standing still before one batch until a line arrives on standard input.

    python paused.py NUMBER COMMAND --flag=value ...

A test that sends a signal or takes the disk away then knows where the run is, without any clock.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from intttrain.app import loop
from intttrain.app.cli import run
from intttrain.data import Batch

WAITING = "waiting for a line"


def main() -> None:
    number, *arguments = sys.argv[1:]
    make_batches = loop.make_batches

    def make_paused_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for count, batch in enumerate(make_batches(*args, **kwargs), start=1):
            if count == int(number):
                print(WAITING, flush=True)
                sys.stdin.readline()
            yield batch

    loop.make_batches = make_paused_batches
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
