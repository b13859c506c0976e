"""In which order the tokens of a row are stored."""

from __future__ import annotations

import pytest

from intttrain.core.row_order import stored_ranges


def test_contiguous_is_the_row_itself() -> None:
    assert stored_ranges(12, 3, balanced=False) == ((0, 4), (4, 8), (8, 12))
    assert stored_ranges(12, 1, balanced=False) == ((0, 12),)


def test_balanced_pairs_an_early_with_a_late_piece() -> None:
    assert stored_ranges(16, 2, balanced=True) == ((0, 4), (12, 16), (4, 8), (8, 12))
    assert stored_ranges(8, 1, balanced=True) == ((0, 4), (4, 8))
    tokens = [token for start, stop in stored_ranges(48, 4, balanced=True) for token in range(start, stop)]
    assert sorted(tokens) == list(range(48))
    # A token attends to itself and those before it: every shard has the same to do.
    assert len({sum(tokens[shard : shard + 12]) for shard in range(0, 48, 12)}) == 1


def test_a_row_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len=12 is not a multiple of 8 pieces"):
        stored_ranges(12, 4, balanced=True)
