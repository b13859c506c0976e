"""A whole evaluation of a tiny run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.evals import evaluate_run
from tests.evals.cases import DENSE, MODEL, make_config, make_params, make_rows, make_store


@pytest.fixture
def stores(tmp_path):
    train = make_store(tmp_path / "train", [50, 60, 70])
    return make_rows(make_store(tmp_path / "heldout", [12, 20, 33, 40, 50], seed=4)), train


def run(stores, config, params, dense=None, train=True):
    lines = []
    rows, store = stores
    report = evaluate_run(
        config, params, dense=dense, heldout_rows=rows, train_store=store if train else None, report=lines.append
    )
    return report, lines


def test_fresh_models_do_not_differ(stores):
    params = make_params(fresh=True)
    report, lines = run(stores, make_config(), params, dense=(DENSE, make_params(dense=True)))
    assert list(report.levels) == ["on", "off", "dense", "unigram", "bigram"]
    for estimate in report.differences.values():
        np.testing.assert_allclose([estimate.value_P, estimate.low_P, estimate.high_P], 0.0, atol=1e-6)
    np.testing.assert_array_equal(report.state_norm_Q, 0.0)
    # A fresh model knows nothing: about log2(24) bits per token.
    np.testing.assert_allclose(report.levels["on"].value_P, np.log2(24), atol=0.1)
    json.dumps(report.to_json(), allow_nan=False)
    assert lines[0] == "scoring 5 documents of up to 32 tokens: on, off, dense"
    assert all("\n" not in line for line in lines)
    for name in ("on", "off", "dense"):
        assert any(line.startswith(f"{name} documents 5/5 (100%)") for line in lines)
    assert "counting unigrams and bigrams in 180 of 180 training tokens" in lines


def test_conditions_are_what_they_are_called(stores):
    params = make_params()
    report, _ = run(stores, make_config(), params, dense=(DENSE, make_params(dense=True)), train=False)
    assert list(report.levels) == ["on", "off", "dense"]
    assert np.abs(report.differences["on - off"].value_P).max() > 1e-4
    assert report.state_norm_Q[-1] > 0.1
    # The dense weights are the same, so switching the update off leaves exactly the dense model.
    np.testing.assert_allclose(report.differences["off - dense"].value_P, 0.0, atol=1e-6)


@pytest.mark.parametrize(("tokenizer", "unit"), [("byte", "bits per byte"), ("huggingface", "bits per token")])
def test_unit_follows_the_tokenizer(stores, tokenizer, unit):
    report, _ = run(stores, make_config(tokenizer=tokenizer), make_params(), train=False)
    assert report.unit == unit
    assert unit in report.table()


def test_a_dense_run_is_evaluated_alone(stores):
    report, _ = run(stores, make_config(DENSE), make_params(dense=True))
    assert list(report.levels) == ["dense", "unigram", "bigram"]
    with pytest.raises(UserError, match="no update to compare"):
        run(stores, make_config(DENSE), make_params(dense=True), dense=(DENSE, make_params(dense=True)))


def test_the_dense_run_must_be_dense(stores):
    with pytest.raises(UserError, match=r"model.ttt.layers=\[0, 1\] but must have model.ttt=None"):
        run(stores, make_config(), make_params(), dense=(MODEL, make_params()))
