"""The ladder can fail: each classic mistake of this method, planted once, is caught by the comparison named here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from intttrain.ttt import api, chunked
from tests.ttt.cases import BY_NAME, assert_close, assert_same, cotangents, forward, forward_loop, leaves_of

FP32 = 1e-5


def run(case):
    """Value and gradients of the chunked form, traced afresh so that a planted fault is seen."""
    along_o, along_s = cotangents(case)

    def loss(leaves):
        output = forward(case, leaves, case.segments_BT)
        return jnp.sum(output.o_BTD * along_o) + jnp.sum(output.state.s_BDF * along_s), output

    return jax.jit(jax.grad(loss, has_aux=True))(leaves_of(case))


def compare_values(case):
    _, output = run(case)
    o_BTD, s_BDF = forward_loop(case, leaves_of(case))
    assert_close(output.o_BTD, o_BTD, FP32)
    assert_close(output.state.s_BDF, s_BDF, FP32)


def compare_finite_differences(case, name, gradients):
    gradient = np.asarray(gradients[name], np.float64)
    leaves = {key: np.asarray(leaf, np.float64) for key, leaf in leaves_of(case).items()}
    along_o, along_s = cotangents(case)
    direction = np.random.default_rng(5).standard_normal(gradient.shape)
    losses = []
    for sign in (1, -1):
        o, s = forward_loop(case, leaves | {name: leaves[name] + sign * 1e-5 * direction})
        losses.append((o * along_o).sum() + (s * along_s).sum())
    assert_close(np.sum(gradient * direction), (losses[0] - losses[1]) / 2e-5, 1e-3)


def change_layout(monkeypatch, **changes):
    make = api.make_layout

    def make_changed(*arguments):
        layout = make(*arguments)
        return layout._replace(**{name: change(getattr(layout, name)) for name, change in changes.items()})

    monkeypatch.setattr(api, "make_layout", make_changed)


CASE = BY_NAME["several_in_a_chunk"]


def test_no_fault_passes():
    compare_values(CASE)
    gradients, _ = run(CASE)
    for name in ("z", "v", "gates", "eta", "w_down"):
        compare_finite_differences(CASE, name, gradients)


def test_an_inclusive_scan_is_caught(monkeypatch):
    """Update, then apply: the chunk reads what it has just written."""
    matrix = chunked._read_matrix

    def after_writing(w, s, chunk):
        written = ttt.UpdateRule().delta(chunk.v_MCD, chunk.z_MCF, chunk.writes_MC, jnp.asarray(0.3))
        return matrix(w, s + written, chunk)

    monkeypatch.setattr(chunked, "_read_matrix", after_writing)
    with pytest.raises(AssertionError, match="error"):
        compare_values(BY_NAME["one_document"])


def test_a_missing_keep_mask_is_caught(monkeypatch):
    change_layout(monkeypatch, keeps_BM=jnp.ones_like)
    with pytest.raises(AssertionError, match="error"):
        compare_values(CASE)


def test_a_missing_read_mask_is_caught(monkeypatch):
    change_layout(monkeypatch, reads_BMC=jnp.ones_like)
    with pytest.raises(AssertionError, match="error"):
        compare_values(CASE)


def test_a_missing_write_mask_is_caught(monkeypatch):
    change_layout(monkeypatch, writes_BMC=jnp.ones_like)
    with pytest.raises(AssertionError, match="error"):
        compare_values(CASE)


def test_a_convolution_across_chunk_edges_is_caught(monkeypatch):
    make = ttt.make_targets
    monkeypatch.setattr(ttt, "make_targets", lambda x, w, conv, ids, _: make(x, w, conv, ids, x.shape[1]))
    with pytest.raises(AssertionError, match="error"):
        compare_values(BY_NAME["one_document"])


def test_a_convolution_across_documents_is_caught(monkeypatch):
    make = ttt.make_targets
    monkeypatch.setattr(
        ttt, "make_targets", lambda x, w, conv, ids, chunk_tokens: make(x, w, conv, jnp.ones_like(ids), chunk_tokens)
    )
    with pytest.raises(AssertionError, match="error"):
        compare_values(CASE)


def test_a_transposed_target_projection_is_caught(monkeypatch):
    make = ttt.make_targets
    monkeypatch.setattr(ttt, "make_targets", lambda x, w, *rest: make(x, w.T, *rest))
    with pytest.raises(AssertionError, match="error"):
        compare_values(CASE)


def test_a_backward_pass_without_its_suffix_scan_is_caught(monkeypatch):
    """Dropping what later chunks say about S leaves values right and gradients wrong."""

    def forgetful(carried, other):
        is_suffix = other.ndim == 2  # the gradient of W0; of the prefix scan it is that of z
        return (0.0 * carried if is_suffix else carried), other

    monkeypatch.setattr(chunked, "_in_order", forgetful)
    case = dataclasses.replace(BY_NAME["state_in"], rows=((16,), (16,), (16,)))
    compare_values(case)
    gradients, _ = run(case)
    for name in ("z", "v", "s_in", "gates", "eta"):
        with pytest.raises(AssertionError, match="error"):
            compare_finite_differences(case, name, gradients)


@pytest.mark.parametrize("case", [CASE, dataclasses.replace(BY_NAME["forgets"], rows=((16,), (16,), (16,)))])
def test_a_gradient_of_w0_without_what_the_state_lost_is_caught(case, monkeypatch):
    """Where a document ends or the rule forgets, what the readers wanted of W0 must not be lost with the state."""
    monkeypatch.setattr(chunked, "_lost_by_g", lambda update, sums, *chunk: sums.dw_DF)
    compare_values(case)
    gradients, _ = run(case)
    compare_finite_differences(case, "z", gradients)
    with pytest.raises(AssertionError, match="error"):
        compare_finite_differences(case, "w_down", gradients)


def test_a_gate_or_eta_that_is_ignored_is_caught(monkeypatch):
    delta = ttt.UpdateRule.delta
    monkeypatch.setattr(ttt.UpdateRule, "delta", lambda *arguments: delta(*arguments[:-1], jnp.asarray(1.0)))
    with pytest.raises(AssertionError, match="error"):
        compare_values(CASE)


def test_bit_for_bit_means_bit_for_bit():
    with pytest.raises(AssertionError):
        assert_same(np.float32(1.0), np.nextafter(np.float32(1.0), np.float32(2.0)))
