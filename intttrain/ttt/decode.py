"""The same layer one token at a time, for generation: prefill + decode equals one full forward.

A chunk commits when its last token has been seen; an open chunk never updates. Rows of a batch may be at
different places of their chunks.

Letters: B row, C tokens per chunk, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from intttrain.ttt.api import project
from intttrain.ttt.targets import make_targets
from intttrain.ttt.transforms import DeltaTransform, bound_delta, row_scale


class FastWeightCache(NamedTuple):
    """State of one TTT layer while decoding one document per row.

    Attributes:
      s_BDF: fp32 sum of the committed updates.
      z_BCF, x_BCD: activations and target source of the open chunk.
      filled_B: tokens already in the open chunk, 0 to C - 1.
    """

    s_BDF: Float[Array, "*L B D F"]
    z_BCF: Float[Array, "*L B C F"]
    x_BCD: Float[Array, "*L B C D"]
    filled_B: Int[Array, "*L B"]


def init_cache(rows: int, chunk_tokens: int, d_model: int, d_ff: int, dtype: jnp.dtype) -> FastWeightCache:
    """Returns the cache before the first token."""
    return FastWeightCache(
        s_BDF=jnp.zeros((rows, d_model, d_ff), jnp.float32),
        z_BCF=jnp.zeros((rows, chunk_tokens, d_ff), dtype),
        x_BCD=jnp.zeros((rows, chunk_tokens, d_model), dtype),
        filled_B=jnp.zeros((rows,), jnp.int32),
    )


def decode_projection(
    z_BF: Float[Array, "B F"],
    x_BD: Float[Array, "B D"],
    w_down_DF: Float[Array, "D F"],
    w_target_DD: Float[Array, "D D"],
    conv_WD: Float[Array, "W D"] | None,
    cache: FastWeightCache,
    active_B: Array,
    *,
    eta: Float[Array, ""],
    transform: DeltaTransform = DeltaTransform(),
) -> tuple[Float[Array, "B D"], FastWeightCache]:
    """Returns the projected token and the cache after it.

    Args:
      z_BF, x_BD: activations and target source of one token per row.
      w_down_DF, w_target_DD, conv_WD: parameters as in ``fast_weight_projection`` and ``make_targets``.
      cache: the layer's state.
      active_B: bool; a row that is not active is computed but its cache stays as it was.
      eta, transform: as in ``fast_weight_projection``.
    """
    s_z_BD = jnp.einsum("bf,bdf->bd", z_BF, cache.s_BDF.astype(z_BF.dtype), preferred_element_type=jnp.float32)
    o_BD = project(z_BF[:, None], w_down_DF)[:, 0] + s_z_BD
    if transform.preserve_row_norm:
        o_BD = o_BD * row_scale(cache.s_BDF, w_down_DF)

    chunk_tokens = cache.z_BCF.shape[1]
    here_BC = (jnp.arange(chunk_tokens)[None] == cache.filled_B[:, None]) & active_B[:, None]
    z_BCF = jnp.where(here_BC[..., None], z_BF[:, None], cache.z_BCF)
    x_BCD = jnp.where(here_BC[..., None], x_BD[:, None], cache.x_BCD)
    filled_B = cache.filled_B + active_B.astype(jnp.int32)
    full_B = filled_B == chunk_tokens

    def commit(s_BDF: Array) -> Array:
        segments_BC = jnp.ones(z_BCF.shape[:2], jnp.int32)
        v_BCD = make_targets(x_BCD, w_target_DD, conv_WD, segments_BC, chunk_tokens)
        delta_BDF = eta * jnp.einsum("bcd,bcf->bdf", v_BCD, z_BCF, preferred_element_type=jnp.float32)
        return jnp.where(full_B[:, None, None], s_BDF + bound_delta(delta_BDF, transform), s_BDF)

    s_BDF = jax.lax.cond(jnp.any(full_B), commit, lambda s_BDF: s_BDF, cache.s_BDF)
    return o_BD.astype(z_BF.dtype), FastWeightCache(s_BDF, z_BCF, x_BCD, jnp.where(full_B, 0, filled_B))
