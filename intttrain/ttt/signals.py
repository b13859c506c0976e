"""What a gate may look at: one number for a finished chunk, known before the chunk is written.

A signal of the layer is computed from what one TTT layer read and would write; a signal of the whole model from what
it predicted, the same for all layers. A new one is a function registered here or in a user's module.

Letters: B row (a sequence), P tokens of a piece, C tokens per chunk, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from intttrain.config.registry import GATE_SIGNALS
from intttrain.ttt.targets import CONV_TAPS


class LayerChunk(NamedTuple):
    """A finished chunk in one layer. The last two cost a product each and are made only for who asks.

    Attributes:
      o_BCD: O, what the layer read.
      v_BCD: V, what it would write.
      measured_BC: which tokens count.
      added_BCD: makes what only the state adds to O.
      delta_norm_B: makes the norm of the update, relative to that of W0; fp32.
    """

    o_BCD: Float[Array, "B C D"]
    v_BCD: Float[Array, "B C D"]
    measured_BC: Bool[Array, "B C"] | Float[Array, "B C"]
    added_BCD: Callable[[], Float[Array, "B C D"]]
    delta_norm_B: Callable[[], Float[Array, "B"]]


class Predictions(NamedTuple):
    """What the whole model makes of the tokens of a piece; each is computed only for who asks.

    Attributes:
      nll_BP: makes the loss of every token, fp32; 0 where there is none.
      entropy_BP: makes the entropy of the prediction after every token, fp32; 0 where there is none.
    """

    nll_BP: Callable[[], Float[Array, "B P"]]
    entropy_BP: Callable[[], Float[Array, "B P"]]


@dataclasses.dataclass(frozen=True)
class LayerSignal:
    """A signal of the layer: ``measure`` returns it for a chunk of every row, fp32. ``signed``: it may be negative."""

    measure: Callable[[LayerChunk], Float[Array, "B"]]
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class ModelSignal:
    """A signal of the whole model: ``measure`` returns a number for every token; the chunk has their mean."""

    measure: Callable[[Predictions], Float[Array, "B P"]]
    signed: bool = False


def _inner_and_sizes(
    read_BCD: Float[Array, "B C D"], v_BCD: Float[Array, "B C D"], measured_BC: Array
) -> tuple[Array, Array, Array]:
    """Returns <O, V>, |O|^2 |V|^2 and the number of tokens, over the measured tokens of a chunk."""
    weight_BC1 = measured_BC.astype(jnp.float32)[..., None]
    o_BCD, v_BCD = (x.astype(jnp.float32) * weight_BC1 for x in (read_BCD, v_BCD))
    inner_B = jnp.sum(o_BCD * v_BCD, axis=(1, 2))
    sizes_B = jnp.sum(jnp.square(o_BCD), axis=(1, 2)) * jnp.sum(jnp.square(v_BCD), axis=(1, 2))
    return inner_B, sizes_B, jnp.sum(weight_BC1, axis=(1, 2))


def relative_error(
    read_BCD: Float[Array, "B C D"],
    v_BCD: Float[Array, "B C D"],
    measured_BC: Bool[Array, "B C"] | Float[Array, "B C"],
) -> Float[Array, "B"]:
    """Returns ``1 - max(0, cos(O, V))^2``, the relative error of the best multiple of O as a guess of V; fp32."""
    inner_B, sizes_B, _ = _inner_and_sizes(read_BCD, v_BCD, measured_BC)
    cosine_B = inner_B * jax.lax.rsqrt(jnp.maximum(sizes_B, 1e-30))
    return 1.0 - jnp.square(jnp.maximum(cosine_B, 0.0))


def loss_of_layer(chunk: LayerChunk) -> Float[Array, "B"]:
    """Returns ``-<O, V> / tokens``: unbounded, grows with norms."""
    inner_B, _, tokens_B = _inner_and_sizes(chunk.o_BCD, chunk.v_BCD, chunk.measured_BC)
    return -inner_B / jnp.maximum(tokens_B, 1.0)


GATE_SIGNALS.add("reconstruction", LayerSignal(lambda chunk: relative_error(*chunk[:3])))
GATE_SIGNALS.add("loss", LayerSignal(loss_of_layer, signed=True))
GATE_SIGNALS.add(
    "redundancy", LayerSignal(lambda chunk: relative_error(chunk.added_BCD(), chunk.v_BCD, chunk.measured_BC))
)
GATE_SIGNALS.add("delta_norm", LayerSignal(lambda chunk: chunk.delta_norm_B()))
GATE_SIGNALS.add("nll", ModelSignal(lambda predictions: predictions.nll_BP()))
GATE_SIGNALS.add("entropy", ModelSignal(lambda predictions: predictions.entropy_BP()))


def measured_tokens(chunk_tokens: int, has_conv: bool) -> int:
    """Returns how many tokens of a chunk a signal covers: those whose target sees all of its window."""
    return max(1, chunk_tokens - (CONV_TAPS // 2 if has_conv else 1))
