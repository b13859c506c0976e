"""Update rules of somebody else: subclasses that the package does not know, which every implementation has to follow.

Letters: C tokens per chunk, D model width, F feed-forward width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from intttrain import ttt


@dataclasses.dataclass(frozen=True)
class Forgets(ttt.UpdateRule):
    """Scales the state at every chunk: S <- r S + delta."""

    retained: float = 0.8

    @property
    def retention(self) -> float:
        return self.retained


@dataclasses.dataclass(frozen=True)
class DeltaRule(Forgets):
    """Writes what a chunk's own writes do not give yet: e_t = v_t - beta sum_{s < t} e_s (z_s . z_t), then E^T Z."""

    beta: float = 0.05

    def write(self, v_CD: jax.Array, z_CF: jax.Array, writes_C: jax.Array | None) -> jax.Array:
        mask_C1 = jnp.ones((z_CF.shape[0], 1)) if writes_C is None else writes_C[:, None]
        v_CD, z_CF = v_CD.astype(jnp.float32) * mask_C1, z_CF.astype(jnp.float32) * mask_C1
        lower_CC = jnp.eye(z_CF.shape[0]) + self.beta * jnp.tril(z_CF @ z_CF.T, -1)
        return jax.scipy.linalg.solve_triangular(lower_CC, v_CD, lower=True, unit_diagonal=True).T @ z_CF
