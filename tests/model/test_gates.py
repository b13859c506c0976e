"""Gates inside a model: what they must leave alone, and that decisions can be replayed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from intttrain.config import RopeConfig
from intttrain.model import Reading, bind, read_documents, token_nll
from tests.model.test_decode import BASE, CHUNK, QUICK, random_params

T, ROWS = 24, 4
CHUNKS = T // CHUNK
MODEL = dataclasses.replace(BASE, num_layers=2, ttt=dataclasses.replace(BASE.ttt, layers=(0, 1)))  # type: ignore[type-var]
PARAMS = random_params(MODEL)
TOKENS = np.random.default_rng(3).integers(0, MODEL.vocab_size, (ROWS, T)).astype(np.int32)
SETTINGS = ttt.GateSettings(rate=0.5, threshold_n=jnp.array([0.9, 0.97]))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def documents(reading: Reading, tokens: Any, length: Any, sequence: Any, settings: Any, eta: Any) -> Any:
    return read_documents(bind(MODEL, PARAMS), reading, tokens, length, sequence, eta=eta, gate=settings)[0]


def read(rule: ttt.GateRule, settings: Any = SETTINGS, tokens: np.ndarray = TOKENS, eta: float = 0.5) -> Any:
    reading = Reading(CHUNK, T, rule, wants_nll=True)
    rows = tokens.shape[0]
    found = documents(reading, tokens, np.full(rows, T), jnp.arange(rows), settings, jnp.float32(eta))
    return jax.tree.map(np.asarray, found)


@functools.partial(jax.jit, compiler_options=QUICK)
def _rows(gates_BM: Any, eta: Any) -> Any:
    """Losses of whole rows, all chunks of a layer at once, and their gradient with respect to the gates."""

    def losses(gates_BM: Any) -> Any:
        decoder = bind(MODEL, PARAMS)
        ids, positions = jnp.ones((ROWS, T), jnp.int32), jnp.broadcast_to(jnp.arange(T)[None], (ROWS, T))
        hidden = decoder(jnp.asarray(TOKENS), ids, positions, eta=eta, gates_BM=gates_BM).hidden_BTD
        nll = token_nll(hidden[:, :-1], decoder.output_weight(), jnp.asarray(TOKENS[:, 1:]), 16)
        return jnp.sum(nll), nll

    return jax.value_and_grad(losses, has_aux=True)(gates_BM)


def rows(gates_BM: np.ndarray, eta: float = 0.5) -> Any:
    return jax.tree.map(np.asarray, _rows(jnp.asarray(gates_BM, jnp.float32), jnp.float32(eta)))


def test_always_is_the_ungated_model_and_never_the_one_without_updates() -> None:
    ones = np.ones((ROWS, CHUNKS))
    always, never = read(ttt.GateRule("always")), read(ttt.GateRule("never"))
    np.testing.assert_allclose(always.nll_BP[:, 1:], rows(ones)[0][1], rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(never.nll_BP, read(ttt.GateRule("always"), eta=0.0).nll_BP)
    np.testing.assert_allclose(never.nll_BP[:, 1:], rows(0 * ones)[0][1], rtol=2e-4, atol=2e-4)
    assert (always.decision.gate == 1).all() and (never.decision.gate == 0).all()
    assert np.abs(always.nll_BP - never.nll_BP)[:, CHUNK + 1 :].mean() > 0.05


RULES = [
    ttt.GateRule(rule, signal)
    for rule, signal in [
        ("online", "reconstruction"), ("online", "nll"), ("online", "entropy"), ("online", "loss"),
        ("online", "redundancy"), ("online", "delta_norm"), ("threshold", "reconstruction"), ("random", "loss"),
        ("periodic", "loss"), ("ponder_ema", "nll"), ("ponder_ema_code", "reconstruction"),
    ]
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rule}-{rule.signal}")
def test_decisions_are_causal_and_replay_bit_for_bit(rule: ttt.GateRule) -> None:
    found = read(rule)
    gate_nBM = found.decision.gate
    forced = read(ttt.GateRule("forced"), SETTINGS._replace(forced_nBM=gate_nBM))
    np.testing.assert_array_equal(forced.nll_BP, found.nll_BP)

    changed = TOKENS.copy()
    changed[:, 3 * CHUNK :] = (changed[:, 3 * CHUNK :] + 7) % MODEL.vocab_size
    other = read(rule, tokens=changed)
    np.testing.assert_array_equal(other.decision.gate[:, :, :3], gate_nBM[:, :, :3])
    np.testing.assert_array_equal(other.nll_BP[:, : 3 * CHUNK], found.nll_BP[:, : 3 * CHUNK])
    if rule.uses_signal:
        assert np.isfinite(found.decision.margin).all()
        assert np.any(other.decision.signal[:, :, 3:] != found.decision.signal[:, :, 3:])


def test_gates_of_rows_are_the_forced_gates_of_pieces_with_their_gradient() -> None:
    """Layer by layer and chunk by chunk are one computation; a gate's gradient is its finite difference."""
    gates = np.random.default_rng(0).uniform(0.2, 1.0, (ROWS, CHUNKS))
    (_, nll), gradient = rows(gates)
    forced_nBM = jnp.asarray(np.stack([gates] * 2), jnp.float32)
    found = read(ttt.GateRule("forced"), SETTINGS._replace(forced_nBM=forced_nBM))
    np.testing.assert_allclose(found.nll_BP[:, 1:], nll, rtol=2e-4, atol=2e-4)
    assert (gradient[:, -1] == 0).all()  # nothing reads what the last chunk writes
    for chunk in range(CHUNKS - 1):
        moved = gates.copy()
        moved[:, chunk] += 1e-2
        back = gates.copy()
        back[:, chunk] -= 1e-2
        slope = (rows(moved)[0][1] - rows(back)[0][1]).astype(np.float64).sum(axis=1) / 2e-2
        np.testing.assert_allclose(gradient[:, chunk], slope, rtol=0.05, atol=0.05)


def test_signals_are_those_of_the_layers_and_of_the_model() -> None:
    """The model's own loss of a chunk is what is reported about its tokens."""
    found = read(ttt.GateRule("online", "nll"))
    by_chunk_BM = found.nll_BP.reshape(ROWS, CHUNKS, CHUNK).sum(axis=2) / CHUNK
    np.testing.assert_allclose(found.decision.signal[0], by_chunk_BM, rtol=1e-5)
    np.testing.assert_array_equal(found.decision.signal[0], found.decision.signal[1])
    own = read(ttt.GateRule("online", "reconstruction")).decision.signal
    assert (own >= 0).all() and (own <= 1).all() and np.any(own[0] != own[1])
    together = read(ttt.GateRule("online", "reconstruction", shared=True)).decision
    np.testing.assert_array_equal(together.gate[0], together.gate[1])
    np.testing.assert_allclose(together.signal[0, :, 0], own[:, :, 0].mean(axis=0), rtol=1e-6)


def test_documents_of_other_lengths_and_batch_mates_change_no_decision() -> None:
    rule = ttt.GateRule("online", "reconstruction")
    reading = Reading(CHUNK, T, rule, wants_nll=True)
    whole = read(rule)
    length_B = np.array([T, 9, 17, CHUNK])
    mixed = documents(reading, TOKENS, length_B, jnp.arange(ROWS), SETTINGS, jnp.float32(0.5))
    for row, length in enumerate(length_B):
        complete = length // CHUNK
        np.testing.assert_array_equal(mixed.decision.gate[:, row, :complete], whole.decision.gate[:, row, :complete])
        np.testing.assert_array_equal(mixed.decision.gate[:, row, complete:], 0)
        np.testing.assert_array_equal(mixed.nll_BP[row, :length], whole.nll_BP[row, :length])


def test_one_program_serves_all_numbers_of_a_rule() -> None:
    documents.clear_cache()
    for rate, tau, seed in ((0.1, 0.2, 0), (0.7, 0.9, 1)):
        for rule in ("threshold", "random"):
            settings = ttt.GateSettings(rate=rate, threshold_n=jnp.array([tau, tau]), seed=seed)
            read(ttt.GateRule(rule), settings)
    assert documents._cache_size() == 2


def test_rotary_positions_and_cache_do_not_depend_on_the_cut_of_long_documents() -> None:
    """More keys than one block of attention holds, of which most are not there yet."""
    config = dataclasses.replace(MODEL, rope=RopeConfig(theta=1e4), sliding_window=None)
    reading = Reading(CHUNK, 2100, wants_nll=True)
    found = jax.jit(
        lambda tokens: (
            read_documents(
                bind(config, PARAMS), reading, tokens, jnp.full((ROWS,), T), jnp.arange(ROWS), eta=jnp.float32(0.5)
            )[0].nll_BP
        )
    )(TOKENS)
    short = jax.jit(
        lambda tokens: read_documents(
            bind(config, PARAMS), dataclasses.replace(reading, max_tokens=T), tokens, jnp.full((ROWS,), T),
            jnp.arange(ROWS), eta=jnp.float32(0.5),
        )[0].nll_BP
    )(TOKENS)  # fmt: skip
    np.testing.assert_allclose(found, short, rtol=1e-4, atol=1e-5)
