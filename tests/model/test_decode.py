"""Prefill + decode equals one full forward, at every length around the chunk edges, row by row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.core.config import ModelConfig, RopeConfig, TTTConfig
from intttrain.model import abstract_params, bind, decode_step, generate, init_decode_state

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


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters large enough that every update matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), jnp.float32), abstract_params(config)
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array, eta: jax.Array) -> Any:
    decoder = bind(config, params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    hidden_BTD = decoder(tokens_BT, segment_ids_BT, positions_BT, eta=eta).hidden_BTD
    return jnp.einsum("btd,vd->btv", hidden_BTD, decoder.output_weight())


def full_logits(config: ModelConfig, params: Any, tokens_BT: np.ndarray, eta: float | None = None) -> np.ndarray:
    """Logits of one forward; rows are padded to one length, so that one program serves every test."""
    length = tokens_BT.shape[1]
    padding = ((0, 0), (0, PADDED - length))
    if eta is None:
        eta = config.ttt.eta if config.ttt else 0.0
    segment_ids_BT = np.pad(np.ones(tokens_BT.shape, np.int32), padding)
    logits = _forward(config, params, np.pad(tokens_BT, padding), segment_ids_BT, jnp.float32(eta))
    return np.asarray(logits)[:, :length]


@pytest.mark.parametrize("name", CASES)
def test_decoding_equals_the_full_forward_for_rows_of_different_lengths(name: str) -> None:
    config = dataclasses.replace(BASE, **CASES[name])
    params = random_params(config)
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (3, LENGTH)).astype(np.int32)
    pauses = np.array([0, 2, 5])  # row r waits for this many steps in the middle, so rows drift apart
    expected = full_logits(config, params, tokens_BT)
    eta = jnp.float32(config.ttt.eta if config.ttt else 0.0)
    step = jax.jit(lambda params, *rest: decode_step(bind(config, params), *rest, eta=eta))

    state = init_decode_state(config, 3, LENGTH)
    read = np.zeros(3, int)
    for at in range(LENGTH + pauses.max()):
        active = (read < LENGTH) & ~((at >= 3) & (at < 3 + pauses))
        token_B = tokens_BT[np.arange(3), np.minimum(read, LENGTH - 1)]
        logits, state = step(params, jnp.asarray(token_B), state, jnp.asarray(active))
        for row in np.flatnonzero(active):
            np.testing.assert_allclose(np.asarray(logits[row]), expected[row, read[row]], rtol=2e-4, atol=2e-4)
        read += active
    assert (read == LENGTH).all()


def test_updates_change_the_logits_only_after_the_first_chunk() -> None:
    params = random_params(BASE)
    tokens_BT = np.random.default_rng(1).integers(0, BASE.vocab_size, (1, LENGTH)).astype(np.int32)
    difference = np.abs(full_logits(BASE, params, tokens_BT) - full_logits(BASE, params, tokens_BT, 0.0)).max(
        axis=(0, 2)
    )
    assert (difference[:CHUNK] == 0).all()
    assert (difference[CHUNK:] > 1e-3).all()


def test_greedy_generation_follows_the_full_forward_and_ignores_batch_mates() -> None:
    params = random_params(BASE)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, BASE.vocab_size, n).astype(np.int32) for n in (1, CHUNK, 2 * CHUNK + 1)]
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0, "stop_token": -1}
    together = generate(BASE, params, prompts, **settings)
    for prompt, continuation in zip(prompts, together, strict=True):
        assert continuation.tolist() == generate(BASE, params, [prompt], **settings)[0].tolist()
        text = prompt
        for token in continuation:
            assert token == full_logits(BASE, params, text[None])[0, -1].argmax()
            text = np.append(text, token)


def test_a_stop_token_ends_the_continuation_and_sampling_is_seeded() -> None:
    params = random_params(BASE)
    prompt = [np.array([3, 1, 4], np.int32)]
    free = generate(BASE, params, prompt, max_new_tokens=12, temperature=1.0, seed=5, stop_token=-1)[0]
    again = generate(BASE, params, prompt, max_new_tokens=12, temperature=1.0, seed=5, stop_token=-1)[0]
    other = generate(BASE, params, prompt, max_new_tokens=12, temperature=1.0, seed=6, stop_token=-1)[0]
    stopped = generate(BASE, params, prompt, max_new_tokens=12, temperature=1.0, seed=5, stop_token=int(free[4]))[0]
    first = free.tolist().index(int(free[4]))
    assert free.tolist() == again.tolist() != other.tolist()
    assert stopped.tolist() == free[: first + 1].tolist()


def test_the_state_is_a_plain_tree_that_can_hold_shapes_and_shardings() -> None:
    def init() -> Any:
        return init_decode_state(BASE, 2, LENGTH)

    shapes, shardings = jax.eval_shape(init), jax.tree.map(lambda leaf: leaf.sharding, init())
    assert jax.tree.structure(shapes) == jax.tree.structure(init()) == jax.tree.structure(shardings)
    assert shapes.ttt.s_BDF.shape == (2, 2, BASE.d_model, BASE.d_ff)
