"""A start without training: takes a workdir, and does what it is told by lines on standard input until they end.

    python -m tests.logs.holder WORKDIR BEAT_S KERNEL

KERNEL replaces what this host calls its kernel, so that starts seem to be on several hosts; "here" leaves it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from intttrain.config.errors import UserError
from intttrain.logs import lease
from intttrain.storage import processes


def stop(error: UserError) -> NoReturn:
    print(f"error: {error}", flush=True)
    os._exit(error.status)


def main() -> None:
    workdir, beat_s, kernel = sys.argv[1:]
    lease.BEAT_S = float(beat_s)
    if kernel != "here":
        processes._kernel = lambda: kernel
    try:
        with lease.Lease(Path(workdir), lambda line: print(line, flush=True), stop) as held:
            held.claim()
            print("claimed", flush=True)
            for line in sys.stdin:
                {"check": held.check, "ending": held.say_ending}[line.strip()]()
                print("done", flush=True)
    except UserError as error:
        stop(error)


if __name__ == "__main__":
    main()
