"""The key-value store that process 0 keeps for all. Needs no device and no collective.

It is that of JAX's coordination service, which JAX reaches by a private name; this is the only place that does.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jax._src.distributed import global_state

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
