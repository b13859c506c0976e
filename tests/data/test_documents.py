"""Evaluation rows hold one document each, from its first token."""

from __future__ import annotations

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.data import document_rows, stack_rows
from tests.data.plain import END, one_line

LENGTHS = [3, 8, 20, 7, 9, 16]


def choose(store, **changes):
    settings = {"seq_len": 8, "min_document_tokens": 8, "max_documents": 10, "seed": 0, **changes}
    return document_rows(store, **settings)


def test_rows(make_store):
    store = make_store(LENGTHS)
    chosen = choose(store, min_document_tokens=7)
    assert sorted(chosen.documents_N) == [1, 2, 3, 4, 5]
    assert chosen.num_eligible == 5
    for row, document in zip(chosen.rows, chosen.documents_N, strict=True):
        ids = store.document(int(document))
        n = min(len(ids), 8)
        labels = ids[1:9]
        assert row.tokens_BT.tolist() == [*ids[:8], *[END] * (8 - n)]
        assert row.labels_BT.tolist() == [*labels, *[0] * (8 - len(labels))]
        assert row.loss_weights_BT.tolist() == [1.0] * len(labels) + [0.0] * (8 - len(labels))
        assert row.segment_ids_BT.tolist() == [1] * n + [0] * (8 - n)
        assert row.positions_BT.tolist() == [*range(n), *[0] * (8 - n)]
    batch = stack_rows(chosen.rows)
    assert batch.tokens_BT.shape == (5, 8) and batch.tokens_BT.dtype == np.int32


def test_the_choice_is_seeded_and_extends(make_store):
    store = make_store([10] * 30)
    ten, twenty = choose(store, max_documents=10), choose(store, max_documents=20)
    assert ten.documents_N.tolist() == twenty.documents_N[:10].tolist()
    assert len(ten.rows) == 10 and ten.num_eligible == 30
    assert ten.documents_N.tolist() != choose(store, max_documents=10, seed=1).documents_N.tolist()


def test_exactly_long_enough(make_store):
    store = make_store([20])
    assert len(choose(store, min_document_tokens=20).rows) == 1
    with pytest.raises(UserError) as error:
        choose(store, min_document_tokens=21)
    assert "eval.min_document_tokens=21" in one_line(error) and "has 20" in one_line(error)
