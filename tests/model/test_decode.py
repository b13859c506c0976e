"""Prefill + decode equals one full forward, for every cut around the chunk edges, row by row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from intttrain.config import ModelConfig, RopeConfig, TTTConfig
from intttrain.model import (
    DecodeState,
    Reading,
    abstract_params,
    bind,
    init_decode_state,
    next_logits,
    read_documents,
    read_tokens,
    restart_rows,
    token_nll,
)
from intttrain.model import decoder as decoder_module
from intttrain.model.layers import TTTParams

QUICK = {"xla_backend_optimization_level": 0}  # compiled in half the time
CHUNK, LENGTH = 4, 13  # three chunks and a token
PADDED = 16

BASE = ModelConfig(
    family="qwen3", vocab_size=24, d_model=8, d_ff=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4,
    rope=RopeConfig(theta=100.0), ttt=TTTConfig(layers=(0, 2), chunk_tokens=CHUNK, eta=0.5), compute_dtype="float32",
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window": 5},
    "hidden_states": {"ttt": dataclasses.replace(BASE.ttt, target="hidden_states")},  # type: ignore[type-var]
    "next_hidden": {"ttt": dataclasses.replace(BASE.ttt, target="next_hidden", delta_clip=0.5)},  # type: ignore[type-var]
    "row_norm": {"ttt": dataclasses.replace(BASE.ttt, preserve_row_norm=True)},  # type: ignore[type-var]
    "dense_llama": {"ttt": None, "family": "llama", "tie_embeddings": False},
}
ROWS = 5
TOKENS = np.random.default_rng(1).integers(0, BASE.vocab_size, (ROWS, LENGTH)).astype(np.int32)


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters large enough that every update matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), jnp.float32), abstract_params(config)
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _forward(
    config: ModelConfig, params: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array, eta: jax.Array, gates_BM: Any
) -> Any:
    decoder = bind(config, params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    hidden_BTD = decoder(tokens_BT, segment_ids_BT, positions_BT, eta=eta, gates_BM=gates_BM).hidden_BTD
    labels_BT = jnp.roll(tokens_BT, -1, axis=1)
    return jnp.einsum("btd,vd->btv", hidden_BTD, decoder.output_weight()), token_nll(
        hidden_BTD, decoder.output_weight(), labels_BT, 8
    )


def forward(
    config: ModelConfig, params: Any, tokens_BT: np.ndarray, eta: float | None = None, gates_BM: Any = None
) -> Any:
    """Logits and losses of one forward; rows are padded to one length, so that one program serves every test."""
    length = tokens_BT.shape[1]
    padding = ((0, 0), (0, PADDED - length))
    if eta is None:
        eta = config.ttt.eta if config.ttt else 0.0
    segment_ids_BT = np.pad(np.ones(tokens_BT.shape, np.int32), padding)
    logits, nll = _forward(config, params, np.pad(tokens_BT, padding), segment_ids_BT, jnp.float32(eta), gates_BM)
    return np.asarray(logits)[:, :length], np.asarray(nll)[:, : length - 1]


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _read(
    config: ModelConfig, reading: Reading, params: Any, tokens: Any, count: Any, state: Any, eta: Any, settings: Any
) -> Any:
    decoder = bind(config, params)
    read, state = read_tokens(decoder, reading, tokens, count, state, eta=eta, gate=settings)
    return read, next_logits(decoder, state), state


def start(config: ModelConfig, reading: Reading, rows: int = ROWS) -> DecodeState:
    return init_decode_state(config, reading, jnp.arange(rows))


def advance(
    config: ModelConfig, params: Any, state: DecodeState, until_B: np.ndarray, width: int, check: Any = None,
    gate: ttt.GateRule = ttt.GateRule(), settings: ttt.GateSettings = ttt.GateSettings(),
) -> DecodeState:  # fmt: skip
    """Reads every row of TOKENS up to ``until_B`` in pieces of at most ``width`` tokens that end with their chunks."""
    reading = Reading(CHUNK, LENGTH, gate)
    eta = jnp.float32(config.ttt.eta if config.ttt else 0.0)
    while True:
        length_B = np.asarray(state.length_B)
        left_B = np.minimum(until_B - length_B, CHUNK - length_B % CHUNK)
        count_B = np.clip(left_B, 0, width)
        if not count_B.any():
            return state
        tokens_BP = np.zeros((ROWS, width), np.int32)
        for row in range(ROWS):
            tokens_BP[row, : count_B[row]] = TOKENS[row, length_B[row] : length_B[row] + count_B[row]]
        _, logits, state = _read(config, reading, params, tokens_BP, count_B, state, eta, settings)
        if check is not None:
            check(np.asarray(logits), np.flatnonzero(count_B), length_B + count_B - 1)


@pytest.mark.parametrize("name", CASES)
def test_every_split_into_prompt_and_decoding_equals_the_full_forward(name: str) -> None:
    """Row r has read r tokens more than row 0 when decoding begins, over two chunk edges."""
    config = dataclasses.replace(BASE, **CASES[name])
    params = random_params(config)
    expected, _ = forward(config, params, TOKENS)

    def check(logits: np.ndarray, rows: np.ndarray, at_B: np.ndarray) -> None:
        for row in rows:
            np.testing.assert_allclose(logits[row], expected[row, at_B[row]], rtol=2e-4, atol=2e-4)

    for first in (1, CHUNK + 1):  # 1 to 5 tokens, then 5 to 9: over both edges
        split_B = first + np.arange(ROWS)
        state = advance(config, params, start(config, Reading(CHUNK, LENGTH)), split_B, CHUNK, check)
        state = advance(config, params, state, np.full(ROWS, LENGTH), 1, check)
        assert (np.asarray(state.length_B) == LENGTH).all()


@pytest.mark.parametrize("signal", ["reconstruction", "nll"])
def test_every_split_makes_the_same_decisions(signal: str) -> None:
    """Rows decide differently, and the full forward with these decisions gives the same logits."""
    gate = ttt.GateRule("threshold", signal, shared=True)
    params, reading = random_params(BASE), Reading(CHUNK, PADDED, gate)
    tokens_BT = np.pad(TOKENS, ((0, 0), (0, PADDED - LENGTH)))

    def documents(threshold: float) -> tuple[Any, ttt.GateSettings]:
        settings = ttt.GateSettings(threshold_n=jnp.full((2,), threshold, jnp.float32))
        length_B = np.full(ROWS, LENGTH)
        return _documents(BASE, reading, params, tokens_BT, length_B, jnp.arange(ROWS), settings), settings

    watched, _ = documents(-np.inf)
    whole, settings = documents(float(np.nanmedian(watched.decision.signal)))
    gates_BM = whole.decision.gate[0]
    assert len(np.unique(np.asarray(gates_BM)[:, :3], axis=0)) > 1
    expected, _ = forward(BASE, params, TOKENS, gates_BM=gates_BM)

    def check(logits: np.ndarray, rows: np.ndarray, at_B: np.ndarray) -> None:
        for row in rows:
            np.testing.assert_allclose(logits[row], expected[row, at_B[row]], rtol=2e-4, atol=2e-4)

    for first in (1, CHUNK + 1):
        state = start(BASE, Reading(CHUNK, LENGTH, gate))
        state = advance(BASE, params, state, first + np.arange(ROWS), CHUNK, check, gate, settings)
        advance(BASE, params, state, np.full(ROWS, LENGTH), 1, check, gate, settings)


def test_another_target_is_written_by_rows_and_by_decoding_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed where it stands: in ``target_source`` and ``TTTParams.values``, and nowhere else."""
    config = dataclasses.replace(BASE, ttt=dataclasses.replace(BASE.ttt, eta=0.25))  # type: ignore[type-var]
    params, plain = random_params(config), TTTParams.values
    tokens_BT = np.pad(TOKENS, ((0, 0), (0, PADDED - LENGTH)))
    usual = forward(BASE, params, TOKENS, 0.25)[1]  # the same model by another name, traced before the change
    monkeypatch.setattr(decoder_module, "target_source", lambda _, x0_BTD, h_BTD: x0_BTD * h_BTD)
    monkeypatch.setattr(TTTParams, "values", lambda self, *arguments: jnp.tanh(plain(self, *arguments)))
    changed = forward(config, params, TOKENS)[1]
    reading = Reading(CHUNK, PADDED, wants_nll=True)
    read = _documents(config, reading, params, tokens_BT, np.full(ROWS, LENGTH), jnp.arange(ROWS), ttt.GateSettings())
    np.testing.assert_allclose(np.asarray(read.nll_BP)[:, 1:LENGTH], changed, rtol=2e-4, atol=2e-4)
    assert np.abs(changed - usual)[:, CHUNK:].max() > 0.01


def test_updates_change_the_logits_only_after_the_first_chunk() -> None:
    params = random_params(BASE)
    difference = np.abs(forward(BASE, params, TOKENS)[0] - forward(BASE, params, TOKENS, 0.0)[0]).max(axis=(0, 2))
    assert (difference[:CHUNK] == 0).all()
    assert (difference[CHUNK:] > 1e-3).all()


def leaves_by_row(state: DecodeState, row: int) -> list[np.ndarray]:
    """What a later token of the row can depend on: nothing beyond its length."""
    length = int(state.length_B[row])
    k, v = (np.asarray(x)[:, row, :length] for x in state.keys)
    assert state.ttt is not None
    fast = state.ttt._replace(
        **{
            name: np.asarray(getattr(state.ttt, name))[:, :, : length % CHUNK]
            for name in ("z_nBCF", "x_nBCD", "o_nBCD")
        }
    )
    by_row = [np.asarray(x)[:, row] for x in jax.tree.leaves(fast)]
    return [k, v, *by_row, np.asarray(state.hidden_BD[row])]


def test_a_row_that_leaves_and_one_that_joins_change_no_other_bit_for_bit() -> None:
    params = random_params(BASE)
    until_B = np.array([9, 6, 7, 13, 5])
    alone = advance(BASE, params, start(BASE, Reading(CHUNK, LENGTH)), until_B, CHUNK)
    # Row 1 reads another document first, and row 2 begins when the others have gone on.
    state = advance(BASE, params, start(BASE, Reading(CHUNK, LENGTH)), np.array([5, 11, 0, 6, 5]), CHUNK)
    state = restart_rows(state, jnp.arange(ROWS) == 1, jnp.arange(ROWS))
    state = advance(BASE, params, state, until_B, CHUNK)
    for row in (1, 2, 4):
        for got, wanted in zip(leaves_by_row(state, row), leaves_by_row(alone, row), strict=True):
            np.testing.assert_array_equal(got, wanted)
    for row in (0, 3):  # cut elsewhere: other matmul shapes
        for got, wanted in zip(leaves_by_row(state, row), leaves_by_row(alone, row), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


def test_a_permuted_batch_gives_permuted_rows_bit_for_bit() -> None:
    rule = ttt.GateRule("online", "reconstruction")
    reading = Reading(CHUNK, PADDED, rule, wants_nll=True)
    params, tokens_BT = random_params(BASE), np.pad(TOKENS, ((0, 0), (0, PADDED - LENGTH)))
    length_B, order_B = np.array([13, 5, 9, 12, 1]), np.array([3, 0, 4, 2, 1])
    read = _documents(BASE, reading, params, tokens_BT, length_B, jnp.arange(ROWS), ttt.GateSettings())
    permuted = _documents(
        BASE, reading, params, tokens_BT[order_B], length_B[order_B], jnp.asarray(order_B), ttt.GateSettings()
    )
    np.testing.assert_array_equal(np.asarray(read.nll_BP)[order_B], permuted.nll_BP)
    np.testing.assert_array_equal(np.asarray(read.decision.gate)[:, order_B], permuted.decision.gate)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _documents(
    config: ModelConfig, reading: Reading, params: Any, tokens: Any, length: Any, sequence: Any, settings: Any
) -> Any:
    eta = jnp.float32(config.ttt.eta if config.ttt else 0.0)
    return read_documents(bind(config, params), reading, tokens, length, sequence, eta=eta, gate=settings)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_document_read_in_pieces_has_the_losses_of_the_full_forward(name: str) -> None:
    config = dataclasses.replace(BASE, **CASES[name])
    params = random_params(config)
    tokens_BT = np.pad(TOKENS, ((0, 0), (0, PADDED - LENGTH)))
    read = _documents(
        config, Reading(CHUNK, PADDED, wants_nll=True), params, tokens_BT, np.full(ROWS, LENGTH), jnp.arange(ROWS),
        ttt.GateSettings(),
    )  # fmt: skip
    nll_BT = np.asarray(read.nll_BP)
    np.testing.assert_allclose(nll_BT[:, 1:LENGTH], forward(config, params, TOKENS)[1], rtol=2e-4, atol=2e-4)
    assert (nll_BT[:, 0] == 0).all() and (nll_BT[:, LENGTH:] == 0).all()
    np.testing.assert_array_equal(np.asarray(read.full_B), [[True, True, True, False]] * ROWS if config.ttt else False)


def test_the_state_is_a_plain_tree_that_can_hold_shapes_and_shardings() -> None:
    def init() -> Any:
        return start(BASE, Reading(CHUNK, LENGTH), 2)

    shapes, shardings = jax.eval_shape(init), jax.tree.map(lambda leaf: leaf.sharding, init())
    assert jax.tree.structure(shapes) == jax.tree.structure(init()) == jax.tree.structure(shardings)
    assert shapes.ttt.s_nBDF.shape == (2, 2, BASE.d_model, BASE.d_ff)
