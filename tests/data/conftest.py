"""Stores that tests are made of: documents with recognisable ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from intttrain.data import StoreWriter, TokenStore
from tests.data.plain import PlainTokenizer


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """Returns a function that writes a store with documents of the given lengths (end id included).

    Ids count upwards from ``first`` over the whole store, so every token names its place.
    """

    def make(lengths: Sequence[int], name: str = "store", first: int = 100, fingerprint: str = "plain") -> TokenStore:
        tokenizer = PlainTokenizer(first + sum(lengths), fingerprint)
        place = first
        with StoreWriter(tmp_path / name, tokenizer=tokenizer, source="test") as writer:
            for i, length in enumerate(lengths):
                writer.add(np.arange(place, place + length - 1), f"doc{i}")
                place += length - 1
        return TokenStore.open(tmp_path / name)

    return make
