"""The values V that a fast weight is taught: a learned, next-token-aligned view of the target source.

The convolution is centred, so ``v_t`` may depend on the next tokens. That is causal only because a chunk is
committed as a whole after it was computed; the window is therefore cut at chunk edges and at document edges.

Letters: B row, T tokens, C tokens per chunk, M chunks, D model width, W conv taps.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CONV_TAPS = 5  # W; tap 0 is offset -2 (In-Place TTT, arXiv 2604.06169, and its released code)


def make_targets(
    x_BTD: Float[Array, "B T D"],
    w_target_DD: Float[Array, "D D"],
    conv_WD: Float[Array, "W D"] | None,
    segment_ids_BT: Int[Array, "B T"],
    chunk_tokens: int,
) -> Float[Array, "B T D"]:
    """Returns ``v_t = (sum_k conv[k] x_{t+k}) W_target`` in the dtype of ``x_BTD``.

    ``w_target_DD`` is used as D_in x D_out (a row vector times this matrix); the rest as in ``mix_neighbours``.
    """
    u_BTD = mix_neighbours(x_BTD, conv_WD, segment_ids_BT, chunk_tokens)
    return jnp.einsum("btd,de->bte", u_BTD, w_target_DD.astype(x_BTD.dtype))


def mix_neighbours(
    x_BTD: Float[Array, "B T D"],
    conv_WD: Float[Array, "W D"] | None,
    segment_ids_BT: Int[Array, "B T"],
    chunk_tokens: int,
) -> Float[Array, "B T D"]:
    """Returns ``u_t = sum_k conv[k] x_{t+k}`` in the dtype of ``x_BTD``.

    Args:
      x_BTD: the target source: token embeddings or the MLP's normalised input.
      conv_WD: depthwise taps, offsets -(W // 2) to W // 2; ``None`` takes the next position alone
        (TTT-NTP, arXiv 2606.21803), zero at the last token of a chunk or document.
      segment_ids_BT: documents; 0 is padding.
      chunk_tokens: C, divides T.
    """
    rows, seq_len, width = x_BTD.shape
    chunks = seq_len // chunk_tokens
    x_BMCD = x_BTD.reshape(rows, chunks, chunk_tokens, width)
    segments_BMC = segment_ids_BT.reshape(rows, chunks, chunk_tokens)
    if conv_WD is None:
        u_BMCD = _neighbour(x_BMCD, segments_BMC, 1)
    else:
        taps = conv_WD.shape[0]
        terms = [
            _neighbour(x_BMCD, segments_BMC, tap - taps // 2) * conv_WD[tap].astype(x_BTD.dtype)[None, None, None, :]
            for tap in range(taps)
        ]
        u_BMCD = sum(terms[1:], start=terms[0])
    return u_BMCD.reshape(rows, seq_len, width)


def _neighbour(
    x_BMCD: Float[Array, "B M C D"], segments_BMC: Int[Array, "B M C"], offset: int
) -> Float[Array, "B M C D"]:
    """Returns ``x[t + offset]``, zero where that token is in another chunk or another document."""
    if offset == 0:
        return x_BMCD
    before, after = max(0, -offset), max(0, offset)
    chunk_tokens = x_BMCD.shape[2]
    if before + after >= chunk_tokens:
        return jnp.zeros_like(x_BMCD)
    kept = slice(after, chunk_tokens - before)
    shifted = jnp.pad(x_BMCD[:, :, kept], ((0, 0), (0, 0), (before, after), (0, 0)))
    other = jnp.pad(segments_BMC[:, :, kept], ((0, 0), (0, 0), (before, after)), constant_values=-1)
    return jnp.where((other == segments_BMC)[..., None], shifted, jnp.zeros_like(shifted))
