"""The `intttrain` program, writing down how much of every row it took from the token stores.

    python -m tests.app.counting FOLDER COMMAND --flag=value ...

FOLDER/PROCESS.json receives one list a row read: the ranges asked for, and the places of the tokens taken.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from intttrain.app.cli import run
from intttrain.data import packing
from intttrain.pod.distributed import process_index


def main() -> None:
    folder, *arguments = sys.argv[1:]
    read_row, counts = packing._read_row, []

    class CountedStore:
        """A store whose ``tokens_N`` remembers the places it was asked for."""

        def __init__(self, store: Any) -> None:
            self._store, self.places = store, set[int]()
            self.end_of_document, self.tokens_N = store.end_of_document, self

        def __getitem__(self, places: np.ndarray) -> np.ndarray:
            self.places.update(places.tolist())
            return self._store.tokens_N[places]

    def counted(store: Any, pieces: Any, tokens: int) -> Any:
        remembering = CountedStore(store)
        row = read_row(remembering, pieces, tokens)
        counts.append([tokens, len(remembering.places)])
        return row

    packing._read_row = counted
    status = run(arguments)
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / f"{process_index()}.json").write_text(json.dumps(counts))
    sys.exit(status)


if __name__ == "__main__":
    main()
