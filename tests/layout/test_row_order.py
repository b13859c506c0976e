"""In which order the tokens of a row are stored."""

from __future__ import annotations

import dataclasses

import pytest

from intttrain.config import default_config, resolve
from intttrain.config.errors import UserError
from intttrain.layout.row_order import check_row_order, context_way, halo_tokens, is_balanced, stored_ranges


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


MODEL = resolve(default_config()).model  # 4 heads, chunks of 128


@pytest.mark.parametrize(
    ("changes", "context", "tensor", "way"),
    [
        ({}, 1, 4, "all_to_all"),
        ({}, 4, 1, "all_to_all"),
        ({}, 4, 2, "all_gather"),
        ({}, 8, 1, "all_gather"),
        ({"sliding_window": 257}, 8, 1, "halo"),
        ({"sliding_window": 258}, 8, 1, "all_gather"),
        ({"sliding_window": 130, "context_attention": "all_to_all"}, 4, 1, "all_to_all"),
    ],
)
def test_auto_takes_what_travels_least(changes, context, tensor, way):
    model = dataclasses.replace(MODEL, **changes)
    assert context_way(model, 2048, context, tensor) == way
    assert is_balanced(model, 2048, context, tensor) == (way == "all_gather")
    assert not is_balanced(model, 1024, 8, tensor)  # one chunk a shard cannot be two pieces


@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        (
            {"context_attention": "all_to_all"},
            8,
            r"does not divide model.num_heads=4; use 'all_gather', or .*context=1 or 2 or 4",
        ),
        ({"context_attention": "halo"}, 4, r"a window of at most data.seq_len=1024 / mesh.context=4 = 256 .*=None"),
        ({"context_attention": "halo", "sliding_window": 300}, 4, r"= 256 tokens, but model.sliding_window=300"),
        ({}, 3, r"data.seq_len=1024 cannot be cut into mesh.context=3 pieces; use mesh.context=2 or 4"),
        ({}, 16, r"gives 64 tokens a device, not a whole number of chunks of model.ttt.chunk_tokens=128"),
    ],
)
def test_rows_that_cannot_be_cut_are_refused(changes, context, message):
    with pytest.raises(UserError, match=message):
        check_row_order(dataclasses.replace(MODEL, **changes), "data.seq_len", 1024, context, 1)


@pytest.mark.parametrize(("window", "shard", "halo"), [(1, 64, 0), (2, 64, 64), (65, 64, 64), (4096, 8192, 4096)])
def test_a_halo_is_whole_blocks(window, shard, halo):
    assert halo_tokens(window, shard) == halo
