"""No loss ever depends on a token that comes after the one it predicts from: measured by its gradient, exactly zero.

Every token of the row is another one and the head is not tied, so a row of the embedding table's gradient belongs to
one position, and one Jacobian holds every pair (loss at t, token at s).

Letters: T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from intttrain.model import bind, token_nll
from intttrain.ttt import api, chunked
from tests.model.tiny import TINY, C, T, V, random_params, rows, run, with_ttt

# A window of three in two layers reaches four tokens back: everything further away arrived through the fast weight.
CONFIG = dataclasses.replace(TINY, tie_embeddings=False, sliding_window=3)
assert T == V
TOKENS = np.random.default_rng(4).permutation(V).astype(np.int32)[None]
LABELS = np.random.default_rng(5).integers(0, V, (1, T)).astype(np.int32)


def compile_influence(config):
    params = random_params(config)

    def losses(table_VD, ids_BT, positions_BT):
        decoder = bind(config, params | {"embed": {"weight": table_VD}})
        output = decoder(jnp.asarray(TOKENS), ids_BT, positions_BT)
        return token_nll(output.hidden_BTD, decoder.output_weight(), jnp.asarray(LABELS), 16)[0]

    # Compiled without optimisation: half the time, and an exact zero stays one.
    return jax.jit(jax.jacrev(losses), compiler_options={"xla_backend_optimization_level": 0})


compiled_once = functools.cache(compile_influence)


def influence(config, ids_BT, positions_BT, compiled=compiled_once):
    """Returns |d loss_t / d embedding_s| as T x T, rows t."""
    jacobian_TVD = compiled(config)(random_params(config)["embed"]["weight"], ids_BT, positions_BT)
    return np.max(np.abs(np.asarray(jacobian_TVD)[:, TOKENS[0]]), axis=2)


def future(matrix_TS):
    return matrix_TS[np.triu_indices(T, 1)]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("target", ["input_embed", "hidden_states", "next_hidden"])
def test_the_future_has_no_gradient(family, target):
    config = with_ttt(dataclasses.replace(CONFIG, family=family), target=target, eta=0.2)
    _, ids_BT, positions_BT, _ = rows((T,))
    matrix_TS = influence(config, ids_BT, positions_BT)
    np.testing.assert_array_equal(future(matrix_TS), 0.0)
    # The measurement is alive: the far past arrives, and the tokens of the row's last chunk are written nowhere.
    assert np.all(matrix_TS[2 * C :, : C - 1] > 0)
    assert np.all(np.diag(matrix_TS) > 0)
    chunk_T = np.arange(T) // C
    distance_TS = np.arange(T)[:, None] - np.arange(T)[None, :]
    same_chunk_out_of_window = (chunk_T[:, None] == chunk_T[None, :]) & (distance_TS > 4)
    np.testing.assert_array_equal(matrix_TS[same_chunk_out_of_window], 0.0)


def test_documents_have_no_gradient_into_each_other():
    config = with_ttt(CONFIG, target="hidden_states", eta=0.2)
    _, ids_BT, positions_BT, _ = rows((6, 3, -1, 15, 7))
    matrix_TS = influence(config, ids_BT, positions_BT)
    np.testing.assert_array_equal(future(matrix_TS), 0.0)
    apart = ids_BT[0][:, None] != ids_BT[0][None, :]
    np.testing.assert_array_equal(matrix_TS[apart], 0.0)
    assert np.any(matrix_TS[17:25, 10:14] > 0)  # inside the document of 15, across a chunk edge


def value_changes(config, s):
    """Returns the first position whose hidden state changes when every token from ``s`` on does."""
    _, ids_BT, positions_BT, _ = rows((T,))
    changed = np.where(np.arange(T) >= s, (TOKENS + 1) % V, TOKENS).astype(np.int32)
    params, eta = random_params(config), jnp.float32(0.2)
    one, two = (
        np.asarray(FORWARD(config, params, tokens, ids_BT, positions_BT, eta).hidden_BTD[0])
        for tokens in (TOKENS, changed)
    )
    return int(np.argmax(np.any(one != two, axis=1)))


FORWARD = run


@pytest.mark.parametrize("target", ["input_embed", "hidden_states", "next_hidden"])
def test_the_future_has_no_value_either(target):
    """The fast weight has its own gradient rule, so a forward pass that leaks could still have clean gradients."""
    for s in (1, C - 1, C, C + 1, 2 * C - 1, 2 * C, 3 * C + 3, T - 1):
        assert value_changes(with_ttt(CONFIG, target=target), s) == s


def _across_chunks(mix, x, conv, ids, chunk_tokens):
    return mix(x, conv, ids, x.shape[1])


def _inclusive(matrix, w_DF, s_DF, chunk):
    written_DF = ttt.UpdateRule().delta(chunk.v_MCD, chunk.z_MCF, chunk.writes_MC, jnp.asarray(0.2))
    return matrix(w_DF, s_DF + written_DF, chunk)


def _all_visible(make, *arguments):
    layout = make(*arguments)
    return layout._replace(reads_BMC=jnp.ones_like(layout.reads_BMC), keeps_BM=jnp.ones_like(layout.keeps_BM))


def test_a_planted_convolution_across_chunks_is_seen(monkeypatch):
    monkeypatch.setattr(ttt, "mix_neighbours", functools.partial(_across_chunks, ttt.mix_neighbours))
    _, ids_BT, positions_BT, _ = rows((T,))
    assert np.any(future(influence(with_ttt(CONFIG, eta=0.2), ids_BT, positions_BT, compile_influence)) > 0)


def test_a_planted_inclusive_scan_is_seen(monkeypatch):
    """By value: the gradient rule is not derived from the forward pass and stays clean."""
    monkeypatch.setattr(chunked, "_read_matrix", functools.partial(_inclusive, chunked._read_matrix))
    traced_afresh = jax.jit(lambda *arguments: run.__wrapped__(*arguments), static_argnums=0)
    monkeypatch.setitem(globals(), "FORWARD", traced_afresh)
    assert value_changes(CONFIG, C + 1) < C + 1


def test_a_planted_leak_between_documents_is_seen(monkeypatch):
    monkeypatch.setattr(api, "make_layout", functools.partial(_all_visible, api.make_layout))
    _, ids_BT, positions_BT, _ = rows((6, 3, -1, 15, 7))
    matrix_TS = influence(with_ttt(CONFIG, eta=0.2), ids_BT, positions_BT, compile_influence)
    assert np.any(matrix_TS[ids_BT[0][:, None] != ids_BT[0][None, :]] > 0)
