"""A barrier for threads in the background, at which processes also learn that one of them has failed."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Any

from jax._src.distributed import global_state

from intttrain.core.distributed import process_count, process_index
from intttrain.core.errors import PassingError, passes

PASSES, STAYS = "p", "s"  # before the line of a failure

_names = itertools.count()  # of the barriers of this process; all processes make theirs in the same order


class FailingBarrier:
    """Lets processes go on when all of them have come, or raises on all of them when one comes because it failed.

    A process that comes while an exception is on its way out of its thread has failed. Orbax's own barriers have names
    for their places: a process whose part of a save fails waits at another place than the others, ten minutes long.
    Here the n-th call of one process meets the n-th of the others, wherever they are.
    """

    def __init__(self) -> None:
        self._name = f"intttrain/barrier/{next(_names)}"
        self._number = 0
        self._told = False  # whether all know of the exception that is on its way out

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the others; ``key`` says where, for nobody.

        Raises:
          RuntimeError: one of them failed.
          PassingError: one of them failed, for a reason that passes.
        """
        if process_count() == 1:
            return
        # Somebody who handles an exception may well save, in the main thread.
        error = None if threading.current_thread() is threading.main_thread() else sys.exception()
        if error is None:
            self._told = False
        elif self._told:
            return
        client: Any = global_state.client
        here = f"{self._name}/{self._number}"
        self._number += 1
        if error is not None:
            kind = PASSES if passes(error) else STAYS
            client.key_value_set(f"{here}/failed/{process_index()}", f"{kind}process {process_index()}: {error}")
        client.wait_at_barrier(here, timeout_ms)
        failures = client.key_value_dir_get(f"{here}/failed")
        self._told = bool(failures)
        if failures and error is None:
            kind, line = failures[0][1][0], failures[0][1][1:]
            raise (PassingError if kind == PASSES else RuntimeError)(line)
