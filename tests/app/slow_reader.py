"""The `intttrain` program, taking SECONDS more to read each batch: what a host with a bad disk is to the others.

python -m tests.app.slow_reader SECONDS COMMAND --flag=value ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from intttrain.app import loop
from intttrain.app.cli import run
from intttrain.data import Batch


def main() -> None:
    seconds, arguments = float(sys.argv[1]), sys.argv[2:]
    make_batches = loop.make_batches

    def make_slow_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for batch in make_batches(*args, **kwargs):
            time.sleep(seconds)
            yield batch

    loop.make_batches = make_slow_batches
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
