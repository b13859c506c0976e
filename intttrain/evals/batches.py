"""Documents in batches of one size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def full_batches(documents: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the numbers of the documents of each batch, and before them how many of those are new.

    All batches have ``rows`` rows, so they share a compiled program; the last one is filled up by repeating its own.
    """
    for start in range(0, documents, rows):
        chosen = np.arange(start, min(start + rows, documents))
        yield len(chosen), np.resize(chosen, rows)
