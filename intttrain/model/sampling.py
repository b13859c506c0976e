"""How the next token is drawn from logits.

Letters: B row, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Sampling(NamedTuple):
    """What every row of a batch is sampled with.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token, whatever the other fields say.
      top_k: only so many of the most likely tokens take part, and those as likely as the last; 0 = all.
      top_p: of those, only the most likely that together have this share of their probability, at least one; 1 = all.
      seed: a row's draws depend on it, on the row's own number and on the position, not on its neighbours.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | np.uint32 = 0  # jit takes a Python int below 2^31 only


def sample_tokens(
    logits_BV: Float[Array, "B V"], sampling: Sampling, row_B: Int[Array, "B"], position_B: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Returns a token for every row; all fields of ``sampling`` may be traced.

    Args:
      logits_BV: fp32.
      sampling: see there.
      row_B: number of the sequence, which with ``position_B`` and the seed makes the key of a draw.
      position_B: of the token that is drawn.
    """
    scaled_BV = logits_BV / jnp.maximum(sampling.temperature, 1e-6)
    kept_BV = kept_tokens(scaled_BV, sampling)
    keys_B = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), at))(
        row_B, position_B
    )
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, jnp.where(kept_BV, scaled_BV, -jnp.inf))
    greedy_B = jnp.argmax(logits_BV, axis=1)
    return jnp.where(jnp.asarray(sampling.temperature) > 0, drawn_B, greedy_B).astype(jnp.int32)


def kept_tokens(scaled_BV: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Returns the tokens that may be drawn: ``top_k`` first, then ``top_p`` of what that leaves, as transformers does.

    Of equally likely tokens at the edge of ``top_p`` as many stay as there, those with the largest ids.

    Args:
      scaled_BV: logits divided by the temperature, fp32.
      sampling: see there.
    """
    vocabulary = scaled_BV.shape[1]
    ordered_BV = jnp.sort(scaled_BV, axis=1)  # the most likely last
    count = jnp.where(jnp.asarray(sampling.top_k) > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary)
    in_top_k_BV = ordered_BV >= jnp.take(ordered_BV, vocabulary - count, axis=1)[:, None]
    up_to_BV = jnp.cumsum(jax.nn.softmax(jnp.where(in_top_k_BV, ordered_BV, -jnp.inf), axis=1), axis=1)
    in_top_p_BV = (up_to_BV > 1.0 - sampling.top_p) | (jnp.asarray(sampling.top_p) >= 1.0)
    kept_B = jnp.maximum(jnp.sum(in_top_k_BV & in_top_p_BV, axis=1), 1)
    least_B1 = jnp.take_along_axis(ordered_BV, vocabulary - kept_B[:, None], axis=1)
    above_BV, equal_BV = scaled_BV > least_B1, scaled_BV == least_B1
    wanted_B1 = (kept_B - jnp.sum(above_BV, axis=1))[:, None]
    return above_BV | (equal_BV & (jnp.cumsum(equal_BV[:, ::-1], axis=1)[:, ::-1] <= wanted_B1))
