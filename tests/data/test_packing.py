"""Packing against a token-by-token reading of the rule."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.data import Batch, PackedRows, TokenStore, blank_row, stack_rows
from intttrain.data.permutation import derive_seed, mix64, permutation

PAD = None
CASES = {
    "mixed": [1, 5, 3, 17, 2, 8, 1, 30],
    "one token": [1],
    "one document": [23],
    "ends on a row edge": [16],
    "ends on row and chunk edges": [8, 8, 4, 4, 8],
    "single tokens only": [1] * 19,
    "longer than many rows": [2, 100, 3],
}


def slow_rows(store: TokenStore, seq_len: int, align: int, seed: int) -> list[dict[str, list[float]]]:
    """The definition: walk over the stream one token at a time."""
    stream: list[tuple[int, int] | None] = []  # (document, place in it)
    for document in permutation(len(store), seed):
        stream += [PAD] * (-len(stream) % align)
        stream += [(int(document), place) for place in range(len(store.document(int(document))))]
    stream += [PAD] * (-len(stream) % seq_len)
    rows = []
    for start in range(0, len(stream), seq_len):
        row: dict[str, list[float]] = {"tokens": [], "labels": [], "weights": [], "segments": [], "positions": []}
        seen: list[int] = []
        visible = 0
        for entry in stream[start : start + seq_len]:
            if entry is PAD:
                values = (store.end_of_document, 0, 0, 0, 0)
            else:
                document, place = entry
                if document not in seen:
                    seen.append(document)
                    visible = 0
                ids = store.document(document)
                last = place + 1 == len(ids)
                values = (int(ids[place]), 0 if last else int(ids[place + 1]), int(not last), len(seen), visible)
                visible += 1
            for column, value in zip(row.values(), values, strict=True):
                column.append(value)
        rows.append(row)
    return rows


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("seq_len", "align"), [(8, 1), (8, 4), (8, 8), (16, 2), (1, 1), (64, 16)])
def test_rows_follow_the_definition(make_store, lengths, seq_len, align):
    store = make_store(lengths)
    for seed in (0, 5):
        packed = PackedRows(store, seq_len, align, seed)
        expected = slow_rows(store, seq_len, align, seed)
        assert len(packed) == len(expected)
        for row, want in enumerate(expected):
            got = packed[row]
            np.testing.assert_array_equal(got.tokens_BT, want["tokens"])
            np.testing.assert_array_equal(got.labels_BT, want["labels"])
            np.testing.assert_array_equal(got.loss_weights_BT, want["weights"])
            np.testing.assert_array_equal(got.segment_ids_BT, want["segments"])
            np.testing.assert_array_equal(got.positions_BT, want["positions"])


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("align", [1, 4])
def test_parts_of_a_row_are_its_columns(make_store, lengths, align):
    """Every pair of ranges with edges inside and on the edges of documents, neighbours and in any order."""
    packed = PackedRows(make_store(lengths), 16, align, 3)
    cuts = [(0, 16), (0, 4), (4, 8), (12, 16), (3, 9), (9, 10), (15, 16)]
    chosen = [(0, 4), (12, 16), (4, 8), (8, 12)], *([cut] for cut in cuts), *map(list, itertools.permutations(cuts, 2))
    for row, whole in enumerate(packed):
        for ranges in chosen:
            part = packed.read(row, tuple(ranges))
            columns = np.concatenate([np.arange(start, stop) for start, stop in ranges])
            for field in dataclasses.fields(Batch):
                got, want = getattr(part, field.name), getattr(whole, field.name)[columns]
                np.testing.assert_array_equal(got, want, err_msg=f"{field.name} of row {row}, {ranges}")
                assert got.dtype == want.dtype


@pytest.mark.parametrize("align", [1, 4])
def test_every_token_and_every_label_exactly_once(make_store, align):
    store = make_store(CASES["mixed"])
    packed = PackedRows(store, 8, align, 3)
    rows = stack_rows(list(packed))
    tokens = rows.tokens_BT[rows.segment_ids_BT > 0]
    assert sorted(tokens) == sorted(store.tokens_N)
    labels = rows.labels_BT[rows.loss_weights_BT > 0]
    wanted = itertools.chain.from_iterable(store.document(i)[1:] for i in range(len(store)))
    assert sorted(labels) == sorted(wanted)
    assert rows.loss_weights_BT.sum() == packed.loss_tokens == len(labels)


def test_row_types(make_store):
    row = PackedRows(make_store([3, 4]), 8, 1, 0)[0]
    assert [a.dtype for a in (row.tokens_BT, row.labels_BT, row.segment_ids_BT, row.positions_BT)] == [np.int32] * 4
    assert row.loss_weights_BT.dtype == np.float32
    assert row.tokens_BT.shape == (8,)


def test_a_label_crosses_the_row_edge(make_store):
    store = make_store([11])
    first, second = PackedRows(store, 8, 1, 0)
    assert first.labels_BT[-1] == store.document(0)[8] == second.tokens_BT[0]
    assert first.loss_weights_BT[-1] == 1
    assert second.positions_BT[0] == 0
    assert second.segment_ids_BT.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert second.tokens_BT.tolist()[2:] == [store.end_of_document] * 6


def test_documents_start_at_multiples_of_the_alignment(make_store):
    store = make_store(CASES["mixed"])
    rows = stack_rows(list(PackedRows(store, 16, 4, 1)))
    before = np.pad(rows.segment_ids_BT, ((0, 0), (1, 0)))[:, :-1]
    starts = np.argwhere((rows.segment_ids_BT != before) & (rows.segment_ids_BT > 0))
    assert len(starts) >= len(store)
    assert (starts[:, 1] % 4 == 0).all()


def test_the_seed_decides_the_order_and_nothing_else_does(make_store):
    store = make_store(CASES["mixed"])
    first, again, other = (list(PackedRows(store, 8, 1, seed)) for seed in (1, 1, 2))
    assert all((a.tokens_BT == b.tokens_BT).all() for a, b in zip(first, again, strict=True))
    assert any((a.tokens_BT != b.tokens_BT).any() for a, b in zip(first, other, strict=True))


def test_documents_of_a_row(make_store):
    store = make_store([4, 4, 4, 4])
    packed = PackedRows(store, 8, 4, 0)
    assert packed.documents(0).tolist() == permutation(4, 0)[:2].tolist()
    assert packed.documents(1).tolist() == permutation(4, 0)[2:].tolist()


def test_rows_outside_are_refused(make_store):
    packed = PackedRows(make_store([4]), 8, 1, 0)
    for row in (-1, 1):
        with pytest.raises(IndexError):
            packed[row]


def test_alignment_must_divide_the_row(make_store):
    with pytest.raises(UserError, match=r"data.align_documents=3 does not divide data.seq_len=8"):
        PackedRows(make_store([4]), 8, 3, 0)


def test_blank_row_is_padding():
    row = blank_row(4, 9)
    assert row.tokens_BT.tolist() == [9] * 4
    assert not row.segment_ids_BT.any() and not row.loss_weights_BT.any()


def test_permutation_is_a_permutation_and_pinned():
    for count in (0, 1, 2, 100):
        assert sorted(permutation(count, 3)) == list(range(count))
    # A run that resumes after an upgrade has to see the same order; a change here breaks every old checkpoint.
    assert permutation(10, 0).tolist() == [1, 4, 5, 7, 6, 9, 0, 3, 2, 8]
    assert int(mix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF  # first output of SplitMix64 from seed 0
    assert permutation(10, 1).tolist() != permutation(10, 0).tolist()
    assert len({derive_seed(seed, stream) for seed in range(20) for stream in range(20)}) == 400
    assert all(0 <= derive_seed(seed, 1) < 2**32 for seed in (0, 2**31, 2**63, 2**70))
