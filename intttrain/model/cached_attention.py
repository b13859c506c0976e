"""Attention of a few new tokens to all that a row has read, with keys and values in a ring.

Letters: B row, P new tokens, S cached keys, s keys of a block, L layers, N query heads, K key/value heads, H head dim,
G query heads of a key/value head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK_KEYS = 1024  # whose scores exist at the same time


class KeyCache(NamedTuple):
    """Keys and values of the last S tokens of each row; token t is in slot t mod S."""

    k_LBSKH: Float[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"]


def cache_slots(max_tokens: int, window: int | None, piece_tokens: int) -> int:
    """Returns S: all keys that a piece may see, with those of the piece itself; whole blocks of long ones."""
    slots = min(max_tokens, max_tokens if window is None else window + piece_tokens - 1)
    return slots if slots <= BLOCK_KEYS else -(-slots // BLOCK_KEYS) * BLOCK_KEYS


def remember_keys(
    cache: KeyCache,
    layer: Int[Array, ""] | int,
    k_BPKH: Float[Array, "B P K H"],
    v_BPKH: Float[Array, "B P K H"],
    position_BP: Int[Array, "B P"],
    real_BP: Bool[Array, "B P"],
) -> KeyCache:
    """Returns the cache with the keys and values of the tokens that are real."""
    slots = cache.k_LBSKH.shape[2]
    rows_B1 = jnp.arange(k_BPKH.shape[0])[:, None]
    slot_BP = jnp.where(real_BP, position_BP % slots, slots)

    def put(stack: Array, new: Array) -> Array:
        return stack.at[layer, rows_B1, slot_BP].set(new.astype(stack.dtype), mode="drop")

    return KeyCache(put(cache.k_LBSKH, k_BPKH), put(cache.v_LBSKH, v_BPKH))


def attend_cached(
    q_BPNH: Float[Array, "B P N H"],
    cache: KeyCache,
    layer: Int[Array, ""] | int,
    position_BP: Int[Array, "B P"],
    length_B: Int[Array, "B"],
    window: int | None,
) -> Float[Array, "B P N H"]:
    """Returns softmax attention to the cached keys, the new tokens' own included; fp32 scores and sums.

    Blocks of keys are visited one after the other, and none beyond the longest row: time follows what was read.

    Args:
      q_BPNH: queries.
      cache: with the keys of the new tokens.
      layer: which.
      position_BP: of the queries in their documents.
      length_B: tokens read so far, the new ones included.
      window: how many tokens a query sees, itself included; ``None`` = all.
    """
    rows, new, heads, head_dim = q_BPNH.shape
    slots, kv_heads = cache.k_LBSKH.shape[2:4]
    q_BPKGH = q_BPNH.reshape(rows, new, kv_heads, heads // kv_heads, head_dim)
    width = min(slots, BLOCK_KEYS)

    def block(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, o = carry
        k_BsKH, v_BsKH = (
            jax.lax.dynamic_slice(stack, (layer, 0, number * width, 0, 0), (1, rows, width, kv_heads, head_dim))[0]
            for stack in cache
        )
        scores = jnp.einsum("bpkgh,bskh->bkgps", q_BPKGH, k_BsKH, preferred_element_type=jnp.float32) * head_dim**-0.5
        seen_BPs = _visible(number * width + jnp.arange(width), slots, position_BP, length_B, window)
        scores = jnp.where(seen_BPs[:, None, None], scores, -jnp.inf)
        higher = jnp.maximum(largest, jnp.max(scores, axis=-1))
        known = jnp.where(jnp.isfinite(higher), higher, 0.0)
        weights = jnp.exp(scores - known[..., None])
        keep = jnp.exp(largest - known)
        added = jnp.einsum(
            "bkgps,bskh->bkgph", weights.astype(v_BsKH.dtype), v_BsKH, preferred_element_type=jnp.float32
        )
        return higher, keep * total + jnp.sum(weights, axis=-1), keep[..., None] * o + added

    shape = (rows, kv_heads, heads // kv_heads, new)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    filled = jnp.minimum(jnp.max(length_B), slots)
    _, total, o = jax.lax.fori_loop(0, -(-filled // width), block, start)
    o = o / jnp.maximum(total, 1e-30)[..., None]
    return jnp.moveaxis(o, 3, 1).reshape(rows, new, heads, head_dim).astype(q_BPNH.dtype)


def _visible(
    slot_s: Array, slots: int, position_BP: Array, length_B: Array, window: int | None
) -> Bool[Array, "B P s"]:
    """Returns which slots each query sees: a slot holds the last token that was put there."""
    last_B1 = length_B[:, None] - 1
    token_Bs = last_B1 - (last_B1 - slot_s[None]) % slots
    distance_BPs = position_BP[:, :, None] - token_Bs[:, None]
    seen = (token_Bs[:, None] >= 0) & (distance_BPs >= 0)
    return seen if window is None else seen & (distance_BPs < window)
