"""Causal grouped-query attention inside documents: the module and its XLA back ends.

``dense_attention`` forms all T x S scores; ``banded_attention`` cuts a sliding window into blocks and forms only the
band, so time and memory grow with T * window. ``context_attention.py`` chooses among them and the TPU kernels.

Letters: B row, T query tokens, S key tokens, D model width, N query heads, K key/value heads, H head dim,
G query heads of a key/value head, J blocks of a row, Y window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from intttrain.config import ModelConfig
from intttrain.config.registry import FAMILIES
from intttrain.layout.sharding import constrain
from intttrain.model.layers import make_param, rms_norm
from intttrain.model.linear import linear
from intttrain.model.rope import RopeTables, rotate


class Attention(nnx.Module):
    """Projections of one attention block (or a stack of them), with q/k norms where the family has them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...] = ()):
        d, n, k, h = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        scale = config.initializer_range
        self.q = make_param(rngs, stack, (d, n, h), ("embed", "heads", "head_dim"), scale)
        self.k = make_param(rngs, stack, (d, k, h), ("embed", "kv_heads", "head_dim"), scale)
        self.v = make_param(rngs, stack, (d, k, h), ("embed", "kv_heads", "head_dim"), scale)
        self.o = make_param(rngs, stack, (n, h, d), ("heads", "head_dim", "embed"), scale)
        self.has_qk_norm = FAMILIES[config.family].qk_norm
        if self.has_qk_norm:
            self.q_norm = make_param(rngs, stack, (h,), ("norm",), None)
            self.k_norm = make_param(rngs, stack, (h,), ("norm",), None)
        self.norm_eps = config.norm_eps
        self.gradient_dtype = config.weight_gradient_dtype

    def project(self, x_BTD: Float[Array, "B T D"], rope: RopeTables) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries (B T N H), rotated keys and values (B T K H).

        Pinned to their tokens: where attention brings rows together, XLA would rotate the gradients of whole rows.
        """
        q_BTNH = self._head_projection(x_BTD, self.q, "heads")
        k_BTKH, v_BTKH = (self._head_projection(x_BTD, weight, "kv_heads") for weight in (self.k, self.v))
        if self.has_qk_norm:
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], self.norm_eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], self.norm_eps)
        q_BTNH = constrain(rotate(q_BTNH, rope), "batch", "tokens", "heads", "head_dim")
        k_BTKH = constrain(rotate(k_BTKH, rope), "batch", "tokens", "kv_heads", "head_dim")
        return q_BTNH, k_BTKH, v_BTKH

    def _head_projection(self, x_BTD: jax.Array, weight: nnx.Param, heads: str) -> jax.Array:
        by_head = linear("btd,dnh->btnh", x_BTD, weight, self.gradient_dtype)
        return checkpoint_name(constrain(by_head, "batch", "tokens", heads, "head_dim"), "qkv")

    def output(self, o_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Returns the block's contribution to the residual stream."""
        o_BTD = linear("btnh,nhd->btd", o_BTNH, self.o, self.gradient_dtype)
        return constrain(o_BTD, "batch", "tokens", "width")


def causal_mask(segment_ids_BT: Int[Array, "B T"], window: int | None) -> Bool[Array, "B T T"]:
    """Returns which keys (last axis) each query sees, of whole rows."""
    return visible_keys(segment_ids_BT, segment_ids_BT, jnp.arange(segment_ids_BT.shape[1]), window)


def visible_keys(
    q_segment_ids_BT: Int[Array, "B T"],
    k_segment_ids_BS: Int[Array, "B S"],
    position_T: Int[Array, "T"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Returns which keys (last axis) each query sees, where the queries stand at these positions among the keys."""
    keys = k_segment_ids_BS.shape[1]
    distance_TS = position_T[:, None] - jnp.arange(keys)[None, :]
    visible_TS = (distance_TS >= 0) & (distance_TS < (window or keys))
    return visible_TS[None] & (q_segment_ids_BT[:, :, None] == k_segment_ids_BS[:, None, :])


def dense_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Softmax attention with fp32 scores; every query must see at least one key."""
    rows, tokens, heads, head_dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(rows, tokens, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(rows, tokens, heads, head_dim)


def banded_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"],
    window: int,
) -> Float[Array, "B T N H"]:
    """Sliding-window attention: blocks of ``window`` queries see their own block and the one before."""
    rows, seq_len, heads, head_dim = q_BTNH.shape
    blocks = -(-seq_len // window)
    padding = blocks * window - seq_len

    def in_blocks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return padded.reshape(rows, blocks, window, *x.shape[2:])

    def with_previous(x_BJY: jax.Array) -> jax.Array:
        """Joins each block with the one before it; the first has zeros there, masked below."""
        before = jnp.pad(x_BJY[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x_BJY.ndim - 2))
        return jnp.concatenate([before, x_BJY], axis=2).reshape(rows * blocks, 2 * window, *x_BJY.shape[3:])

    segments_BJY = in_blocks(segment_ids_BT + 1)  # 0 is then outside the row
    own = segments_BJY.reshape(rows * blocks, window)
    seen = with_previous(segments_BJY)
    distance = window + jnp.arange(window)[:, None] - jnp.arange(2 * window)[None, :]
    mask = ((distance >= 0) & (distance < window))[None] & (own[:, :, None] == seen[:, None, :])
    q_blocks = in_blocks(q_BTNH).reshape(rows * blocks, window, heads, head_dim)
    o = dense_attention(q_blocks, with_previous(in_blocks(k_BTKH)), with_previous(in_blocks(v_BTKH)), mask)
    return o.reshape(rows, blocks * window, heads, head_dim)[:, :seq_len]
