"""N-gram baselines against dictionaries, on the tokens that the model is scored on."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.data import blank_row
from intttrain.evals import count_ngrams, evaluate_ngrams
from intttrain.evals.positions import ngram
from tests.evals.cases import EVAL, make_rows, make_store

TRAIN = [2, 1, 40, 7, 60, 3, 25]


def brute_force(store, rows, vocab_size):
    """Per-document sums of nats by bucket, from dictionaries of pairs."""
    pairs, after, before = collections.Counter(), collections.Counter(), collections.Counter()
    for index in range(len(store)):
        ids = [int(x) for x in store.document(index)]
        for a, b in itertools.pairwise(ids):
            pairs[a, b] += 1
            after[b] += 1
            before[a] += 1
    total = sum(after.values())

    def unigram(b):
        return (after[b] + 1) / (total + vocab_size)

    def bigram(a, b):
        distinct = len({second for first, second in pairs if first == a})
        return (pairs[a, b] + distinct * unigram(b)) / (before[a] + distinct) if before[a] else unigram(b)

    sums = np.zeros((2, len(rows), 3))
    for n, row in enumerate(rows):
        for t in np.flatnonzero(row.loss_weights_BT):
            a, b, p = int(row.tokens_BT[t]), int(row.labels_BT[t]), 0 if t < 5 else 1 if t < 16 else 2
            sums[0, n, p] -= np.log(unigram(b))
            sums[1, n, p] -= np.log(bigram(a, b))
    return sums


@pytest.mark.parametrize("block_tokens", [1, 5, 1000])
def test_equal_to_dictionaries(tmp_path, block_tokens):
    store = make_store(tmp_path / "train", TRAIN, vocab_size=24)
    rows = make_rows(make_store(tmp_path / "heldout", [12, 33, 20, 80], vocab_size=24, seed=9))
    counts = count_ngrams(store, block_tokens=block_tokens)
    unigram, bigram = evaluate_ngrams(counts, rows, EVAL.position_edges)
    expected = brute_force(store, rows, 24)
    np.testing.assert_allclose(unigram.nll_NP, expected[0], rtol=1e-12)
    np.testing.assert_allclose(bigram.nll_NP, expected[1], rtol=1e-12)
    assert counts.pairs == sum(TRAIN) - len(TRAIN)
    assert bigram.weight_NP.sum() == unigram.weight_NP.sum() == sum(row.loss_weights_BT.sum() for row in rows)


def test_merging_early_changes_nothing(tmp_path, monkeypatch):
    store = make_store(tmp_path / "train", TRAIN)
    whole = count_ngrams(store)
    monkeypatch.setattr(ngram._SparseCounts, "_MIN_PENDING", 3)
    pieces = count_ngrams(store, block_tokens=4)
    for field in ("code_U", "count_U", "next_V", "context_V", "distinct_V"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(pieces, field))
    assert (np.diff(whole.code_U) > 0).all()
    assert whole.count_U.sum() == whole.pairs


def test_probabilities_sum_to_one(tmp_path):
    vocab_size = 24
    counts = count_ngrams(make_store(tmp_path / "train", TRAIN, vocab_size=vocab_size))
    unseen = int(np.flatnonzero(counts.context_V == 0)[0])  # the end id: nothing follows it
    for context in (0, 1, unseen):
        row = blank_row(vocab_size, 0)
        row.tokens_BT[:], row.labels_BT[:] = context, np.arange(vocab_size)
        row.loss_weights_BT[:] = 1
        row.positions_BT[:] = np.arange(vocab_size)
        for losses in evaluate_ngrams(counts, [row], tuple(range(1, vocab_size + 1))):
            np.testing.assert_allclose(np.exp(-losses.nll_NP).sum(), 1.0, rtol=1e-12)


def test_a_large_store_is_read_in_parts_from_everywhere(tmp_path):
    """Ids rise over the store, so the ids that were seen tell which part was read."""
    store = make_store(tmp_path / "train", [200])
    tokens_N = np.arange(10, 1010)
    fake = dataclasses.replace(store.manifest, num_tokens=1000, vocab_size=1010)
    store.manifest, store.tokens_N = fake, tokens_N
    read = []
    counts = count_ngrams(store, max_tokens=100, block_tokens=30, on_tokens=read.append)
    assert sum(read) == counts.pairs == 100
    assert read == [25, 25, 25, 25]
    quarters = (np.flatnonzero(counts.context_V) - 10) // 250
    np.testing.assert_array_equal(np.bincount(quarters), [25, 25, 25, 25])


def test_memory_does_not_grow_with_the_square_of_the_vocabulary(tmp_path):
    vocab_size = 300_000
    store = make_store(tmp_path / "train", [2000, 3000], vocab_size=vocab_size)
    rows = make_rows(make_store(tmp_path / "heldout", [80, 80], vocab_size=vocab_size))
    tracemalloc.start()
    _, bigram = evaluate_ngrams(count_ngrams(store), rows, EVAL.position_edges)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6  # a dense table would hold 9e10 entries
    assert np.isfinite(bigram.nll_NP).all()
    assert (bigram.nll_NP.sum() / bigram.weight_NP.sum()) < np.log(vocab_size) + 1


def test_another_vocabulary_is_refused(tmp_path):
    counts = count_ngrams(make_store(tmp_path / "train", TRAIN, vocab_size=10))
    rows = make_rows(make_store(tmp_path / "heldout", [80], vocab_size=24))
    with pytest.raises(UserError, match=r"token id 2\d but the vocabulary of the training store ends at 9"):
        evaluate_ngrams(counts, rows, EVAL.position_edges)
