"""How the next token is drawn from logits.

Letters: B row, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sampling(NamedTuple):
    """What every row of a batch is sampled with.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token, whatever the other fields say.
      top_k: only so many of the most likely tokens take part; 0 = all.
      top_p: only the most likely tokens that together have this probability, at least one; 1 = all.
      seed: a row's draws depend on it, on the row's own number and on the position, not on its neighbours.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


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
    vocabulary = logits_BV.shape[1]
    scaled_BV = logits_BV / jnp.maximum(sampling.temperature, 1e-6)
    ordered_BV = jnp.sort(scaled_BV, axis=1, descending=True)
    last_kept = jnp.where(jnp.asarray(sampling.top_k) > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary) - 1
    before_BV = jnp.cumsum(jax.nn.softmax(ordered_BV, axis=1), axis=1) - jax.nn.softmax(ordered_BV, axis=1)
    in_nucleus_B = jnp.sum(before_BV < sampling.top_p, axis=1)
    last_B = jnp.clip(jnp.minimum(in_nucleus_B - 1, last_kept), 0, vocabulary - 1)
    least_B1 = jnp.take_along_axis(ordered_BV, last_B[:, None], axis=1)
    keys_B = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), at))(
        row_B, position_B
    )
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, jnp.where(scaled_BV >= least_B1, scaled_BV, -jnp.inf))
    greedy_B = jnp.argmax(logits_BV, axis=1)
    return jnp.where(jnp.asarray(sampling.temperature) > 0, drawn_B, greedy_B).astype(jnp.int32)
