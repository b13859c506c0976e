"""The key-value store that process 0 keeps for all. Needs no device and no collective.

It is that of JAX's coordination service, which JAX reaches by a private name; this is the only place that does.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jax._src.distributed import global_state

from intttrain.config.errors import PassingError, passes
from intttrain.pod.distributed import process_count, process_index

_sessions = itertools.count()


@runtime_checkable  # tests check types at calls
class KeyValueStore(Protocol):
    """Documents by folder and number of the process that wrote them; no two parts of the program share a folder.

    Attributes:
      index: number of this process.
      count: number of processes.
    """

    index: int
    count: int

    def put(self, folder: str, document: Mapping[str, Any]) -> None:
        """Writes this process's document, over an earlier one."""

    def get(self, folder: str, index: int, timeout_s: float) -> dict[str, Any]:
        """Waits for a document of process ``index``. Raises ``TimeoutError``."""

    def all(self, folder: str) -> dict[int, dict[str, Any]]:
        """Returns the documents that are there."""


class _CoordinationService:
    def __init__(self) -> None:
        self.index, self.count = global_state.process_id, global_state.num_processes
        self._client: Any = global_state.client
        # Processes open the same stores in the same order; what an earlier one held is not seen.
        self._root = f"intttrain/{next(_sessions)}"

    def put(self, folder: str, document: Mapping[str, Any]) -> None:
        key = f"{self._root}/{folder}/{self.index}"
        self._client.key_value_set(key, json.dumps(document), allow_overwrite=True)

    def get(self, folder: str, index: int, timeout_s: float) -> dict[str, Any]:
        try:
            text = self._client.blocking_key_value_get(f"{self._root}/{folder}/{index}", int(1000 * timeout_s))
        except RuntimeError as error:  # jax.errors.JaxRuntimeError
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(f"process {index} wrote no {folder} in {timeout_s} s") from None
        return dict(json.loads(text))

    def all(self, folder: str) -> dict[int, dict[str, Any]]:
        found = self._client.key_value_dir_get(f"{self._root}/{folder}/")
        return {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}


def open_key_value_store() -> KeyValueStore | None:
    """Returns a new, empty store, ``None`` for a process that is alone; all processes open the same ones in order."""
    return _CoordinationService() if global_state.client is not None and global_state.num_processes > 1 else None


def coordinator_address() -> str | None:
    """Returns ``host:port`` of process 0, ``None`` for a process that was not connected."""
    return global_state.coordinator_address


PASSES, STAYS = "p", "s"  # before the line of a failure

_barriers = itertools.count()  # all processes make theirs in the same order


class FailingBarrier:
    """Lets processes go on when all of them have come, or raises on all of them when one comes because it failed.

    A process that comes while an exception is on its way out of its thread has failed. Orbax's own barriers have names
    for their places: a process whose part of a save fails waits at another place than the others, ten minutes long.
    Here the n-th call of one process meets the n-th of the others, wherever they are.
    """

    def __init__(self) -> None:
        self._name = f"intttrain/barrier/{next(_barriers)}"
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
