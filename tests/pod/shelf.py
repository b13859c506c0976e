"""A key-value store of three processes without any, for tests of what they tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Shelf:
    """The store of three processes, seen by process ``index``."""

    def __init__(self, index: int = 0, documents: dict[tuple[str, int], dict[str, Any]] | None = None) -> None:
        self.index, self.count = index, 3
        self.documents = {} if documents is None else documents

    def put(self, folder: str, document: Mapping[str, Any]) -> None:
        self.documents[folder, self.index] = dict(document)

    def get(self, folder: str, index: int, timeout_s: float) -> dict[str, Any]:
        if (folder, index) not in self.documents:
            raise TimeoutError
        return self.documents[folder, index]

    def all(self, folder: str) -> dict[int, dict[str, Any]]:
        return {index: document for (name, index), document in self.documents.items() if name == folder}
