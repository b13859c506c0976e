"""One integer addresses every row: resuming and resharding never repeat or lose one."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import shutil

import numpy as np
import pytest

from intttrain.config import DataConfig, MixtureItem
from intttrain.config.errors import UserError
from intttrain.data import (
    PackedRows,
    describe_rows,
    make_batches,
    make_row_dataset,
    mixture_fingerprint,
    stack_rows,
)
from tests.data.plain import one_line


@pytest.fixture
def config(make_store):
    """Two stores of 11 and 5 rows, with weights 1 and 3; ids tell the stores apart."""
    first, second = make_store([5] * 15 + [13], "a"), make_store([10] * 4, "b", first=1000)
    return mixture([(first, 1.0), (second, 3.0)])


def mixture(stores, **changes):
    items = tuple(MixtureItem(path=str(store.path), weight=weight) for store, weight in stores)
    return DataConfig(**{"train": items, "heldout": None, "seq_len": 8, "seed": 0, **changes})


def take(dataset, steps, **changes):
    settings = {"batch_rows": 4, "cursor": 0, "local_rows": range(4), "prefetch_rows": 3, **changes}
    batches = make_batches(dataset, **settings)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    return taken


def tokens(batches):
    return np.concatenate([batch.tokens_BT for batch in batches])


def test_batches_are_the_rows_in_order(config):
    dataset = make_row_dataset(config, 2000)
    batches = take(dataset, 5)
    assert batches[0].tokens_BT.shape == (4, 8)
    expected = stack_rows([dataset[n] for n in range(20)])
    for name in ("tokens_BT", "labels_BT", "loss_weights_BT", "segment_ids_BT", "positions_BT"):
        got = np.concatenate([getattr(batch, name) for batch in batches])
        np.testing.assert_array_equal(got, getattr(expected, name))
        assert got.dtype == getattr(expected, name).dtype


def test_parts_of_rows_are_those_of_whole_rows(config):
    whole, parts = (take(make_row_dataset(config, 2000, ranges), 5) for ranges in (None, ((6, 8), (0, 3))))
    for row, part in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(part.tokens_BT, row.tokens_BT[:, [6, 7, 0, 1, 2]])
        np.testing.assert_array_equal(part.positions_BT, row.positions_BT[:, [6, 7, 0, 1, 2]])


def test_rows_do_not_depend_on_when_or_where_they_are_read(config, tmp_path):
    dataset = make_row_dataset(config, 2000)
    forwards = [dataset[n].tokens_BT for n in range(60)]
    backwards = [dataset[n].tokens_BT for n in reversed(range(60))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    shutil.move(tmp_path / "a", tmp_path / "moved")
    items = (MixtureItem(path=str(tmp_path / "moved"), weight=1.0), config.train[1])
    moved = DataConfig(train=items, heldout=None, seq_len=8, seed=0)
    np.testing.assert_array_equal(forwards, [make_row_dataset(moved, 2000)[n].tokens_BT for n in range(60)])


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_stop_and_resume(config, stop):
    dataset = make_row_dataset(config, 2000)
    never_stopped = tokens(take(dataset, 10))
    resumed = [*take(dataset, stop), *take(make_row_dataset(config, 2000), 10 - stop, cursor=4 * stop)]
    np.testing.assert_array_equal(never_stopped, tokens(resumed))


def test_other_batch_size_and_process_count(config):
    """Rows 0-11 by one process in batches of 4, 12-23 by three in batches of 6, 24-31 by two in batches of 8.

    The second of those two holds rows that are not neighbours, as on a torus.
    """
    dataset = make_row_dataset(config, 2000)
    parts = [tokens(take(dataset, 3))]
    held = {6: [(0, 1), (2, 3), (4, 5)], 8: [(1, 2, 5, 6), (0, 3, 4, 7)]}
    for batch_rows, cursor, steps in ((6, 12, 2), (8, 24, 1)):
        whole = np.zeros((steps, batch_rows, 8), np.int32)
        for rows in held[batch_rows]:
            for step, batch in enumerate(take(dataset, steps, batch_rows=batch_rows, local_rows=rows, cursor=cursor)):
                whole[step, list(rows)] = batch.tokens_BT
        parts += list(whole)
    np.testing.assert_array_equal(np.concatenate(parts), [dataset[n].tokens_BT for n in range(32)])


@pytest.mark.parametrize("seq_len", [4, 8])
def test_rows_of_a_block_are_cut_from_what_longer_rows_hold(config, seq_len):
    """Any length reads the same text in the same order."""
    blocks = make_row_dataset(config, 2000)
    rows = make_row_dataset(dataclasses.replace(config, seq_len=seq_len), 2000, None, block_tokens=8)
    short = np.concatenate([rows[n].tokens_BT for n in range(24 * 8 // seq_len)])
    np.testing.assert_array_equal(short.reshape(24, 8), [blocks[n].tokens_BT for n in range(24)])
    weights = sum(rows[n].loss_weights_BT.sum() for n in range(24 * 8 // seq_len))
    assert weights == sum(blocks[n].loss_weights_BT.sum() for n in range(24)), "every label once"
    if seq_len == 8:
        assert all((rows[n].positions_BT == blocks[n].positions_BT).all() for n in range(24))


def test_a_block_may_end_in_rows_of_padding(make_store):
    store = make_store([5, 6])
    one = mixture([(store, 1.0)], seq_len=4)
    rows = [make_row_dataset(one, 2000, None, block_tokens=16)[n] for n in range(8)]
    assert [int((row.segment_ids_BT > 0).sum()) for row in rows] == [4, 4, 3, 0] * 2
    assert (rows[3].tokens_BT == store.end_of_document).all()
    assert [line.partition(": ")[2] for line in describe_rows(one, [3, 7], block_tokens=16)] == ["padding"] * 2


def test_every_epoch_has_every_row_once_in_a_new_order(make_store):
    store = make_store([5] * 15 + [13])
    dataset = make_row_dataset(mixture([(store, 1.0)]), 2000)
    num_rows = len(PackedRows(store, 8, 1, 0))
    assert num_rows == 11
    epochs = [[tuple(dataset[e * num_rows + i].tokens_BT) for i in range(num_rows)] for e in range(3)]
    assert len(set(epochs[0])) == num_rows
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_do_not_repeat_each_other_one_epoch_later(make_store):
    store = make_store([5] * 15 + [13])
    orders = set()
    for seed in range(4):
        plan = describe_rows(mixture([(store, 1.0)], seed=seed), range(33))
        orders |= {tuple(line.split(": ")[1].split(",")[0] for line in plan[e : e + 11]) for e in (0, 11, 22)}
    assert len(orders) == 12


def test_weights_are_shares_of_rows(config):
    dataset = make_row_dataset(config, 2000)
    from_second = [bool((dataset[n].tokens_BT >= 1000).any()) for n in range(400)]
    assert sum(from_second) == 300
    assert 65 <= sum(from_second[:100]) <= 85  # interleaved, not one after the other


def test_one_row_and_huge_indices(make_store):
    dataset = make_row_dataset(mixture([(make_store([3]), 1.0)]), 2000)
    (batch,) = take(dataset, 1, cursor=10**12)
    assert (batch.tokens_BT == dataset[0].tokens_BT).all()


def test_row_order_is_pinned(config):
    """Grain shuffles and mixes; an upgrade that does so differently would silently break every resumed run."""
    places = [line.split("/")[-1].split(" of")[0] for line in describe_rows(config, range(12))]
    assert places == [
        "a row 5",
        "b row 2",
        "b row 1",
        "b row 4",
        "a row 8",
        "b row 0",
        "b row 3",
        "b row 3",
        "a row 6",
        "b row 4",
        "b row 0",
        "b row 1",
    ]


def test_describe_rows(config):
    lines = describe_rows(config, [3, 0])
    assert lines[0].startswith("row 3: ") and lines[1].startswith("row 0: ")
    counted = collections.Counter(line.split(" row ")[1] for line in describe_rows(config, range(3)))
    assert max(counted.values()) == 1
    assert "'doc" in lines[0]


def test_fingerprint(make_store, tmp_path):
    first, second = make_store([5] * 3, "a"), make_store([10] * 4, "b", first=1000)
    base = mixture_fingerprint(mixture([(first, 1.0), (second, 3.0)]))
    assert len(base) == 16
    assert base == mixture_fingerprint(mixture([(first, 2.0), (second, 6.0)]))
    assert base == mixture_fingerprint(mixture([(first, 1.0), (second, 3.0)], prefetch_rows=1, heldout=str(first.path)))
    shutil.copytree(first.path, tmp_path / "copy")
    copied = DataConfig(
        train=(MixtureItem(path=str(tmp_path / "copy")), MixtureItem(path=str(second.path), weight=3.0)),
        heldout=None, seq_len=8,
    )  # fmt: skip
    assert base == mixture_fingerprint(copied)
    others = [
        mixture([(first, 1.0), (second, 2.0)]),
        mixture([(second, 3.0), (first, 1.0)]),
        mixture([(first, 1.0)]),
        mixture([(first, 1.0), (second, 3.0)], seed=1),
        mixture([(first, 1.0), (second, 3.0)], seq_len=16),
        mixture([(first, 1.0), (second, 3.0)], align_documents=2),
    ]
    assert len({base, *map(mixture_fingerprint, others)}) == 7


def test_errors(make_store):
    store, foreign = make_store([5, 9], "a"), make_store([5], "b", fingerprint="foreign")
    with pytest.raises(UserError) as error:
        make_row_dataset(mixture([]), 2000)
    assert "data.train is empty" in one_line(error)
    with pytest.raises(UserError, match="another tokenizer"):
        make_row_dataset(mixture([(store, 1.0), (foreign, 1.0)]), 2000)
    with pytest.raises(UserError, match="another tokenizer"):
        make_row_dataset(mixture([(store, 1.0)], heldout=str(foreign.path)), 2000)
    with pytest.raises(UserError, match="token id 111 but model.vocab_size=111"):
        make_row_dataset(mixture([(store, 1.0)]), 111)
    make_row_dataset(mixture([(store, 1.0)]), 112)
    dataset = make_row_dataset(mixture([(store, 1.0)]), 2000)
    for wrong in ({"cursor": -1}, {"local_rows": ()}, {"local_rows": (4,)}):
        with pytest.raises(ValueError):
            take(dataset, 1, **wrong)


def test_a_failing_read_reaches_the_caller(config, monkeypatch):
    dataset = make_row_dataset(config, 2000)
    monkeypatch.setattr(PackedRows, "read", lambda self, row, ranges: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        take(dataset, 1)
