"""Whole-model decoding: one token per row and step, with every layer's state in one pytree.

Prompts go through the same step as generated tokens, so rows of different lengths need no padding and
prefill + decode equals one full forward by construction.

Letters: B row, S cached keys, L layers, n TTT layers, K key/value heads, H head dim, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from intttrain import ttt
from intttrain.core.config import ModelConfig
from intttrain.model.attention import dense_attention
from intttrain.model.decoder import Decoder, delta_transform
from intttrain.model.functional import Params, bind
from intttrain.model.rope import rope_tables
from intttrain.model.stages import plan_stages, scan_layers


class DecodeState(NamedTuple):
    """What a batch of growing documents carries.

    Attributes:
      k_LBSKH, v_LBSKH: keys and values, a ring of the last S tokens (S is the window, or the longest document).
      ttt: fast-weight caches with a leading axis n; ``None`` without TTT.
      length_B: int32, tokens read so far.
    """

    k_LBSKH: Float[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"]
    ttt: ttt.FastWeightCache | None
    length_B: Int[Array, "B"]


def init_decode_state(config: ModelConfig, rows: int, max_tokens: int) -> DecodeState:
    """Returns the state before the first token of documents of up to ``max_tokens`` tokens."""
    dtype = jnp.dtype(config.compute_dtype)
    cached = min(max_tokens, config.sliding_window or max_tokens)
    shape = (config.num_layers, rows, cached, config.num_kv_heads, config.head_dim)
    caches = None
    if config.ttt is not None:
        one = ttt.init_cache(rows, config.ttt.chunk_tokens, config.d_model, config.d_ff, dtype)
        count = len(config.ttt.layers)
        caches = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), one)
    return DecodeState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), caches, jnp.zeros((rows,), jnp.int32))


def decode_step(
    decoder: Decoder,
    token_B: Int[Array, "B"],
    state: DecodeState,
    active_B: Bool[Array, "B"],
    *,
    eta: Float[Array, ""],
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Reads one token per row; returns fp32 logits of the next and the state after it.

    A row that is not active leaves its state untouched (its logits mean nothing).
    """
    config = decoder.config
    x0_B1D = decoder.embed(token_B[:, None], decoder.dtype)
    rope = rope_tables(config.rope, config.head_dim, state.length_B[:, None])
    merge_layer, layer_params, merge_ttt, ttt_params = decoder.split_layers()

    def block(x_B1D: jax.Array, layer_inputs: Any, ttt_inputs: Any | None) -> tuple[jax.Array, Any, Any]:
        params, k_BSKH, v_BSKH = layer_inputs
        layer = merge_layer(params)
        q, k, v = layer.attention.project(layer.attention_norm(x_B1D), rope)
        k_BSKH, v_BSKH, mask_B1S = _remember(k_BSKH, v_BSKH, k, v, state.length_B, active_B)
        x_B1D = x_B1D + layer.attention.output(dense_attention(q, k_BSKH, v_BSKH, mask_B1S))
        h_B1D = layer.mlp_norm(x_B1D)
        z_B1F = layer.mlp.activate(h_B1D)
        if ttt_inputs is None or config.ttt is None:
            o_B1D = layer.mlp.project(z_B1F).astype(x_B1D.dtype)
            return x_B1D + o_B1D, (k_BSKH, v_BSKH), None
        fast = merge_ttt(ttt_inputs[0])
        source_B1D = x0_B1D if config.ttt.target == "input_embed" else h_B1D
        o_BD, cache = ttt.decode_projection(
            z_B1F[:, 0], source_B1D[:, 0], layer.mlp.down[...], fast.target[...], fast.conv_or_none(),
            ttt_inputs[1], active_B, eta=eta, transform=delta_transform(config.ttt),
        )  # fmt: skip
        return x_B1D + o_BD[:, None], (k_BSKH, v_BSKH), cache

    stages = plan_stages(config.num_layers, config.ttt.layers if config.ttt else ())
    ttt_inputs = None if config.ttt is None else (ttt_params, state.ttt)
    x_B1D, (k_LBSKH, v_LBSKH), caches = scan_layers(
        stages, block, x0_B1D, (layer_params, state.k_LBSKH, state.v_LBSKH), ttt_inputs
    )
    hidden_BD = decoder.final_norm(x_B1D)[:, 0]
    weight_VD = decoder.output_weight().astype(hidden_BD.dtype)
    logits_BV = jnp.einsum("bd,vd->bv", hidden_BD, weight_VD, preferred_element_type=jnp.float32)
    return logits_BV, DecodeState(k_LBSKH, v_LBSKH, caches, state.length_B + active_B.astype(jnp.int32))


def _remember(
    k_BSKH: jax.Array, v_BSKH: jax.Array, k_B1KH: jax.Array, v_B1KH: jax.Array, length_B: jax.Array, active_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes this token's key and value into the ring; returns it with the mask of filled slots."""
    cached = k_BSKH.shape[1]
    slot_S = jnp.arange(cached, dtype=length_B.dtype)
    here_BS = (slot_S[None] == (length_B % cached)[:, None]) & active_B[:, None]
    k_BSKH = jnp.where(here_BS[:, :, None, None], k_B1KH, k_BSKH)
    v_BSKH = jnp.where(here_BS[:, :, None, None], v_B1KH, v_BSKH)
    return k_BSKH, v_BSKH, (slot_S[None] <= length_B[:, None])[:, None, :]


def generate(
    config: ModelConfig,
    params: Params,
    prompts: list[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_token: int,
    eta: float | None = None,
) -> list[np.ndarray]:
    """Continues every prompt by up to ``max_new_tokens`` tokens.

    Args:
      config, params: the model.
      prompts: token ids, at least one each; lengths may differ.
      max_new_tokens: bound on the continuation of each prompt.
      temperature: 0 takes the most likely token.
      seed: of the sampling.
      stop_token: ends a continuation (kept as its last token).
      eta: in place of the configured update size; 0 switches test-time training off.

    Returns:
      The continuations, without the prompts.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    padded_BP = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for row, prompt in enumerate(prompts):
        padded_BP[row, : len(prompt)] = prompt
    if eta is None:
        eta = config.ttt.eta if config.ttt is not None else 0.0
    tokens_TB = _generate(
        config, max_new_tokens, params, padded_BP, lengths_B, jnp.float32(temperature), jax.random.key(seed),
        jnp.int32(stop_token), jnp.float32(eta),
    )  # fmt: skip
    continuations = []
    for row, length in enumerate(lengths_B):
        new = np.asarray(tokens_TB)[length - 1 : length - 1 + max_new_tokens, row]
        stops = np.flatnonzero(new == stop_token)
        continuations.append(new[: stops[0] + 1] if len(stops) else new)
    return continuations


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    config: ModelConfig, max_new_tokens: int, params: Params, prompts_BP: jax.Array, lengths_B: jax.Array,
    temperature: jax.Array, key: jax.Array, stop_token: jax.Array, eta: jax.Array,
) -> jax.Array:  # fmt: skip
    """Returns what follows each position (T B): entry ``length - 1`` of a row is its first new token."""
    rows, longest = prompts_BP.shape
    steps = longest + max_new_tokens - 1
    decoder = bind(config, params)

    def step(carry: tuple[DecodeState, jax.Array, jax.Array], at: jax.Array) -> tuple[Any, jax.Array]:
        state, previous_B, active_B = carry
        in_prompt_B = at < lengths_B
        prompt_B = jax.lax.dynamic_index_in_dim(prompts_BP, jnp.minimum(at, longest - 1), axis=1, keepdims=False)
        token_B = jnp.where(in_prompt_B, prompt_B, previous_B)
        active_B = active_B & (in_prompt_B | (token_B != stop_token))
        logits_BV, state = decode_step(decoder, token_B, state, active_B, eta=eta)
        greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        noisy_BV = logits_BV / jnp.maximum(temperature, 1e-6)
        drawn_B = jax.random.categorical(jax.random.fold_in(key, at), noisy_BV, axis=-1).astype(jnp.int32)
        next_B = jnp.where(temperature > 0, drawn_B, greedy_B)
        return (state, next_B, active_B), next_B

    start = (init_decode_state(config, rows, steps), jnp.zeros((rows,), jnp.int32), jnp.ones((rows,), jnp.bool_))
    return jax.lax.scan(step, start, jnp.arange(steps))[1]
