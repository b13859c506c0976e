"""The `intttrain` program, in which one of the processes gets SIGTERM when it takes its first batch.

python -m tests.app.terminated PROCESS COMMAND --flag=value ...
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

from intttrain.app import loop
from intttrain.app.cli import run
from intttrain.data import Batch
from intttrain.pod.distributed import process_index


def main() -> None:
    process, *arguments = sys.argv[1:]
    make_batches = loop.make_batches

    def make_interrupted_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for count, batch in enumerate(make_batches(*args, **kwargs), start=1):
            if count == 1 and process_index() == int(process):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    loop.make_batches = make_interrupted_batches
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
