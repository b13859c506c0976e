"""The values V that a fast weight is taught: a learned, next-token-aligned view of the target source.

The convolution is centred, so ``v_t`` may depend on the next tokens. That is causal only because a chunk is
committed as a whole after it was computed; the window is therefore cut at chunk edges and at document edges.

``TARGETS`` has the choices by name: a row of the table at the end of this file, or of a user's module.

Letters: B row, T tokens, C tokens per chunk, M chunks, D model width, W conv taps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from intttrain.config.registry import TARGETS

CONV_TAPS = 5  # W; tap 0 is offset -2 (In-Place TTT, arXiv 2604.06169, and its released code)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a fast weight is taught, up to the learned projection.

    Attributes:
      source: x, the token embeddings or the normalised input of the layer's MLP.
      convolution: whether neighbours are mixed by learned taps; without, ``u_t = x_{t+1}`` (see ``mix_neighbours``).
    """

    source: Literal["embeddings", "mlp_input"]
    convolution: bool = True


def target_source(name: str, embeddings: Array, mlp_input: Array) -> Array:
    """Returns what the values of the target called ``name`` are made of."""
    return embeddings if TARGETS[name].source == "embeddings" else mlp_input


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
    reach = 1 if conv_WD is None else conv_WD.shape[0] // 2
    same_WBMC = [other == segments_BMC for other in _neighbours(segments_BMC, reach, -1)]
    if conv_WD is None:
        u_BMCD = jnp.where(same_WBMC[-1][..., None], _neighbours(x_BMCD, reach, 0)[-1], jnp.zeros_like(x_BMCD))
    else:
        u_BMCD = _convolve(x_BMCD, conv_WD, same_WBMC)
    return u_BMCD.reshape(rows, seq_len, width)


def _neighbours(x_BMC: Array, reach: int, outside: int) -> list[Array]:
    """Returns ``x[t + offset]`` for offsets -reach to reach, ``outside`` where that is another chunk."""
    chunk_tokens = x_BMC.shape[2]
    margins = [(0, 0, 0)] * x_BMC.ndim
    margins[2] = (reach, reach, 0)
    padded_BMC = jax.lax.pad(x_BMC, jnp.asarray(outside, x_BMC.dtype), margins)
    return [jax.lax.slice_in_dim(padded_BMC, tap, tap + chunk_tokens, axis=2) for tap in range(2 * reach + 1)]


@jax.custom_vjp
def _convolve(x_BMCD: Array, conv_WD: Array, same_WBMC: list[Array]) -> Array:
    """Returns the sum over taps of neighbours in the same document.

    The gradient is written out because it is a convolution as well, and so that the taps' is a sum of fp32.
    """
    terms = [
        term * tap_D.astype(x_BMCD.dtype)[None, None, None]
        for term, tap_D in zip(_kept_neighbours(x_BMCD, same_WBMC), conv_WD, strict=True)
    ]
    return sum(terms[1:], start=terms[0])


def _kept_neighbours(x_BMCD: Array, same_WBMC: list[Array]) -> list[Array]:
    found = _neighbours(x_BMCD, len(same_WBMC) // 2, 0)
    return [jnp.where(same[..., None], x, jnp.zeros_like(x)) for same, x in zip(same_WBMC, found, strict=True)]


def _convolve_forward(x_BMCD: Array, conv_WD: Array, same_WBMC: list[Array]) -> tuple[Array, tuple[Any, ...]]:
    return _convolve(x_BMCD, conv_WD, same_WBMC), (x_BMCD, conv_WD, same_WBMC)


def _convolve_backward(residuals: tuple[Any, ...], du_BMCD: Array) -> tuple[Array, Array, None]:
    x_BMCD, conv_WD, same_WBMC = residuals
    wide_BMCD = du_BMCD.astype(jnp.float32)
    neighbours = _kept_neighbours(x_BMCD, same_WBMC)
    dconv_WD = jnp.stack([jnp.sum(x.astype(jnp.float32) * wide_BMCD, axis=(0, 1, 2)) for x in neighbours])
    # That t sees t + offset in its document is that t + offset sees t: the taps in reverse order.
    return _convolve(du_BMCD, conv_WD[::-1], same_WBMC), dconv_WD.astype(conv_WD.dtype), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


TARGETS.add("input_embed", Target("embeddings"))
TARGETS.add("hidden_states", Target("mlp_input"))
TARGETS.add("next_hidden", Target("mlp_input", convolution=False))
