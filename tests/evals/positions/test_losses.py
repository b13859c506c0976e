"""Sums by position: which token counts where, and that nothing else counts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.data import Batch, blank_row
from intttrain.evals import evaluate_positions
from intttrain.evals.positions import losses as positions
from intttrain.evals.positions.losses import sum_by_position
from intttrain.model import bind, token_nll
from tests.evals.cases import CHUNK, DENSE, EVAL, MODEL, SEQ_LEN, make_params, make_rows, make_store


@pytest.fixture
def rows(tmp_path):
    # 7 documents for batches of 4: the last batch is padded. Lengths around edges, chunks and the row's end.
    found = make_rows(make_store(tmp_path / "heldout", [12, 16, 17, 31, 32, 33, 80]))
    assert len(found) == 7
    return found


def test_sums_of_a_hand_made_loss():
    """The loss is 2^column, so a sum names the columns that went into it."""
    row = Batch(
        tokens_BT=np.zeros((2, 8), np.int32),
        labels_BT=np.zeros((2, 8), np.int32),
        loss_weights_BT=np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]], np.float32),
        segment_ids_BT=np.array([[1] * 8, [1] * 4 + [0] * 4], np.int32),
        positions_BT=np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 0, 0, 0, 0]], np.int32),
    )
    nll_BT = np.tile(2.0 ** np.arange(8), (2, 1)).astype(np.float32)
    nll_BT[1, 3:] = [np.nan, np.inf, -np.inf, np.nan, 1e30]  # what stands where nothing is scored must not matter
    norm_BM = np.array([[0.0, 3.0], [0.0, 99.0]], np.float32)  # the second document ends inside its first chunk

    losses = sum_by_position(nll_BT, row, (1, 4, 8), norm_BM)

    np.testing.assert_array_equal(losses.nll_NP, [[1, 2 + 4 + 8, 16 + 32 + 64 + 128], [1, 2 + 4, 0]])
    np.testing.assert_array_equal(losses.weight_NP, [[1, 3, 4], [1, 2, 0]])
    np.testing.assert_array_equal(losses.state_norm_NP, [[0, 0, 3], [0, 0, np.nan]])
    assert losses.nll_NP.dtype == losses.weight_NP.dtype == np.float64


def test_position_is_the_one_in_the_batch_not_the_column():
    row = blank_row(4, 0)
    row.positions_BT[:] = [5, 6, 0, 1]
    row.loss_weights_BT[:] = 1
    batch = jax.tree.map(lambda x: x[None], row)
    losses = sum_by_position(np.array([[1.0, 2.0, 4.0, 8.0]], np.float32), batch, (2, 8))
    np.testing.assert_array_equal(losses.nll_NP, [[4 + 8, 1 + 2]])


@functools.partial(jax.jit, static_argnums=0)
def run_model(config, params, batch, eta):
    decoder = bind(config, params)
    output = decoder(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, eta=eta)
    return token_nll(output.hidden_BTD, decoder.output_weight(), batch.labels_BT, 8), output.ttt


def model_by_document(config, params, row, eta):
    """One document at a time, token by token, with the state norm that each token's chunk reads."""
    nll_BT, stats = run_model(config, params, jax.tree.map(lambda x: jnp.asarray(x)[None], row), eta)
    nll_T = np.asarray(nll_BT[0])
    norm_nM = np.zeros((1, SEQ_LEN // CHUNK)) if stats is None else np.asarray(stats.state_norm_nBM[:, 0])
    sums, weights, norms = np.zeros(3), np.zeros(3), np.full(3, np.nan)
    for t in range(SEQ_LEN):
        if row.loss_weights_BT[t]:
            p = 0 if t < 5 else 1 if t < 16 else 2
            sums[p] += float(nll_T[t])
            weights[p] += 1
            read = float(norm_nM[:, t // CHUNK - 1].max()) if t >= CHUNK else 0.0
            norms[p] = np.fmax(norms[p], read)
    return sums, weights, norms


@pytest.mark.parametrize(("model", "eta"), [(MODEL, None), (MODEL, 0.0), (DENSE, None)])
def test_model_losses_equal_a_loop_over_documents(rows, model, eta):
    params = make_params(dense=model.ttt is None)
    done = []
    losses = evaluate_positions(model, params, rows, EVAL, eta=eta, on_rows=done.append)
    expected = [model_by_document(model, params, row, eta) for row in rows]
    np.testing.assert_allclose(losses.nll_NP, [e[0] for e in expected], rtol=1e-5)
    np.testing.assert_array_equal(losses.weight_NP, [e[1] for e in expected])
    assert losses.weight_NP.sum() == sum(row.loss_weights_BT.sum() for row in rows)
    if model.ttt is not None:
        np.testing.assert_allclose(losses.state_norm_NP, [e[2] for e in expected], rtol=1e-4)
        assert bool(np.nanmax(losses.state_norm_NP) > 0.5) is (eta is None)
    else:
        assert losses.state_norm_NP is None
    assert done == [4, 3]


@pytest.mark.parametrize("model", [MODEL, DENSE], ids=["ttt", "dense"])
def test_reading_chunk_by_chunk_gives_the_losses_of_whole_rows(rows, model):
    params = make_params(dense=model.ttt is None)
    whole = evaluate_positions(model, params, rows, EVAL)
    found = evaluate_positions(model, params, rows, dataclasses.replace(EVAL, reading="chunks"))
    np.testing.assert_array_equal(found.weight_NP, whole.weight_NP)
    np.testing.assert_allclose(found.nll_NP, whole.nll_NP, rtol=2e-5, atol=1e-5)


def test_blank_rows_never_count(rows):
    """7 documents in batches of 4 (one blank row) give the same as in one batch with nothing to fill up."""
    params = make_params()
    filled, exact = (
        evaluate_positions(MODEL, params, rows, dataclasses.replace(EVAL, batch_rows=size)) for size in (4, 7)
    )
    assert filled.nll_NP.shape == (7, 3)
    np.testing.assert_allclose(filled.nll_NP, exact.nll_NP, rtol=1e-5)
    np.testing.assert_array_equal(filled.weight_NP, exact.weight_NP)


def test_update_changes_what_comes_after_the_first_chunk_only(rows):
    params = make_params()
    on, off = (evaluate_positions(MODEL, params, rows, EVAL, eta=eta) for eta in (None, 0.0))
    np.testing.assert_array_equal(on.nll_NP[:, 0], off.nll_NP[:, 0])  # positions 0-4 stand before the first update
    assert (np.abs(on.nll_NP - off.nll_NP)[:, 1] > 1e-4).all()


def test_eta_zero_in_the_config_is_off_exactly(rows):
    params = make_params()
    shut = dataclasses.replace(MODEL, ttt=dataclasses.replace(MODEL.ttt, eta=0.0))
    configured = evaluate_positions(shut, params, rows, EVAL)
    off = evaluate_positions(MODEL, params, rows, EVAL, eta=0.0)
    np.testing.assert_array_equal(configured.nll_NP, off.nll_NP)
    np.testing.assert_array_equal(np.nan_to_num(off.state_norm_NP), 0.0)


def test_fresh_model_is_on_off_and_dense_alike(rows):
    params = make_params(fresh=True)
    on, off = (evaluate_positions(MODEL, params, rows, EVAL, eta=eta) for eta in (None, 0.0))
    dense = evaluate_positions(DENSE, make_params(dense=True), rows, EVAL)
    np.testing.assert_array_equal(on.nll_NP, off.nll_NP)
    np.testing.assert_allclose(on.nll_NP, dense.nll_NP, rtol=1e-6)


def test_on_and_off_share_one_program(rows, monkeypatch):
    traced = []
    monkeypatch.setattr(positions, "bind", lambda *args: traced.append(1) or bind(*args))
    model = dataclasses.replace(MODEL, norm_eps=1.1e-6)  # a configuration that no other test has compiled
    for eta in (None, 0.0, 0.1):
        evaluate_positions(model, make_params(), rows, EVAL, eta=eta)
    assert traced == [1]


def test_a_model_that_failed_is_not_hidden(rows):
    params = make_params()
    params["final_norm"] = jax.tree.map(lambda x: x * jnp.nan, params["final_norm"])
    losses = evaluate_positions(MODEL, params, rows, EVAL)
    assert np.isnan(losses.nll_NP[losses.weight_NP > 0]).all()


def test_ids_outside_the_vocabulary_are_refused(rows):
    small = dataclasses.replace(MODEL, vocab_size=20)
    with pytest.raises(UserError, match=r"token id 2\d but model.vocab_size=20 ends at 19; use a store"):
        evaluate_positions(small, {}, rows, EVAL)


def test_wrong_calls_are_refused(rows):
    with pytest.raises(ValueError, match="at least one row"):
        evaluate_positions(MODEL, {}, [], EVAL)
    with pytest.raises(ValueError, match=r"instead of \(64,\)"):
        evaluate_positions(MODEL, {}, rows, dataclasses.replace(EVAL, seq_len=64))
    with pytest.raises(ValueError, match="ttt=None"):
        evaluate_positions(DENSE, {}, rows, EVAL, eta=0.3)
