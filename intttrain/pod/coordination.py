"""Lets processes exchange small documents and wait for each other through the key-value store that process 0 keeps.

Unlike a collective this needs no device, so it works while devices are busy, hang, or are not there yet.

The store is that of JAX's coordination service. JAX has no public name for it: ``global_state`` is private, and no
other module of the package touches a private name of JAX (``tests/test_architecture.py`` checks it).
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

_sessions = itertools.count()  # of stores; all processes open theirs in the same order, so the n-th is the same for all


@runtime_checkable  # tests check types at calls
class KeyValueStore(Protocol):
    """A place for small documents that all processes of a run can read.

    A document is found by its folder and the number of the process that wrote it. No two parts of the program share a
    folder.

    Every method raises ``RuntimeError`` when process 0, which keeps the store, is gone, and may wait a while for a
    network before it does.

    Attributes:
      index: number of this process.
      count: number of processes.
    """

    index: int
    count: int

    def put(self, folder: str, document: Mapping[str, Any]) -> None:
        """Writes this process's document into ``folder``, over its earlier one."""

    def get(self, folder: str, index: int, timeout_s: float) -> dict[str, Any]:
        """Returns the document of process ``index``, once it is there; raises ``TimeoutError`` after ``timeout_s``."""

    def all(self, folder: str) -> dict[int, dict[str, Any]]:
        """Returns the documents of a folder that are there now, by number of the process; ``{}`` if there is none."""


class _CoordinationService:
    """The store of JAX's coordination service."""

    def __init__(self) -> None:
        self.index, self.count = global_state.process_id, global_state.num_processes
        self._client: Any = global_state.client
        # A new folder for each store, so that nobody reads what an earlier one of this run left.
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
    """Returns a new, empty store, ``None`` for a process that is alone.

    All processes must open the same stores in the same order: that is how the n-th of one is the n-th of all.
    """
    return _CoordinationService() if global_state.client is not None and global_state.num_processes > 1 else None


def coordinator_address() -> str | None:
    """Returns ``host:port`` of process 0, ``None`` for a process that was not connected."""
    return global_state.coordinator_address


# First letter of a published failure: whether its reason passes by itself (``config/errors.py::passes``) or stays.
PASSES, STAYS = "p", "s"

_barriers = itertools.count()  # all processes make theirs in the same order, as with stores


class FailingBarrier:
    """A barrier for Orbax that raises on all processes when one of them comes to it because it failed.

    Saving a checkpoint, Orbax lets processes wait for each other in several places, and gives each place a name. A
    process whose part of the save fails waits at another place than the others, and so all of them wait for ten
    minutes. Here names do not count: the n-th call of one process meets the n-th call of the others, wherever each of
    them is.

    How a call knows that its process failed: Orbax calls it while the exception is being handled, and
    ``sys.exception()`` tells which one that is. The failing process publishes it before it waits, so the others find it
    when the wait is over.
    """

    def __init__(self) -> None:
        self._name = f"intttrain/barrier/{next(_barriers)}"
        self._number = 0
        self._told = False  # whether the others know of the exception that is being handled here

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes have come.

        A process that failed comes once more, to tell. Its later calls, while it handles the same exception, return at
        once: the others have raised and come no more.

        Args:
          key: Orbax's name of the place; not used.
          timeout_ms: longest time to wait.

        Raises:
          RuntimeError: another process failed, or not all came within ``timeout_ms``.
          PassingError: another process failed, for a reason that passes by itself.
        """
        if process_count() == 1:
            return
        # Orbax saves in threads of its own. In the main thread an exception means nothing: a handler of one, such as
        # that of an interrupt, may well save.
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
        failures = client.key_value_dir_get(f"{here}/failed")  # pairs of key and text
        # Where this call raises, Orbax comes again while it handles that, as where the process itself failed.
        self._told = bool(failures)
        if failures and error is None:
            kind, line = failures[0][1][0], failures[0][1][1:]
            raise (PassingError if kind == PASSES else RuntimeError)(line)
