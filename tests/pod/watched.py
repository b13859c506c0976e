"""Steps that are one collective each, under a watchdog: what training looks like to it.

    python watched.py SECONDS STEP

SECONDS is the limit; process 1 fails by itself after STEP, if that is not 0.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from jax.experimental import multihost_utils

from intttrain.config.errors import UserError
from intttrain.pod.coordination import open_key_value_store
from intttrain.pod.distributed import process_index, start_distributed
from intttrain.pod.watchdog import Timing, Watchdog


def main() -> None:
    limit_s, last = map(int, sys.argv[1:])
    start_distributed()
    with Watchdog(limit_s, open_key_value_store(), timing=Timing(beat_s=0.3, settle_s=3.0)) as watchdog:
        for step in range(1, 1_000_000):
            multihost_utils.process_allgather(np.int32(step))
            watchdog.beat(step)
            print("finished", step, flush=True)
            if step == last and process_index() == 1:
                raise UserError("the disk of this host is full")
            time.sleep(0.05)


if __name__ == "__main__":
    main()
