"""Optional bounds on one chunk's update, off by default.

A transform acts on the finished update ``eta * V^T Z`` of one chunk, before it is added, so the state stays a
plain sum and the recurrence an associative scan. Row-norm preservation acts when the state is read instead
(``docs/decisions/0003``).

Letters: B row, D model width, F feed-forward width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_POWER_ITERATIONS = 12
_TINY = 1e-30  # keeps the gradient of a norm finite at an update of exactly zero


@dataclasses.dataclass(frozen=True)
class DeltaTransform:
    """Which bounds hold. Hashable, so it is a static argument: one compilation per choice.

    Attributes:
      clip: largest Frobenius norm of one update (In-Place TTT, inference of Qwen3-4B: 1e-5); None = free.
      spectral: largest spectral norm of one update (TTT-NTP, arXiv 2606.21803); None = free.
      preserve_row_norm: read ``W0 + S`` with its rows rescaled to the norms of ``W0``'s rows.
    """

    clip: float | None = None
    spectral: float | None = None
    preserve_row_norm: bool = False

    @property
    def bounds_delta(self) -> bool:
        """Whether updates are changed at all; if not, the backward pass needs no extra matmul."""
        return self.clip is not None or self.spectral is not None


def bound_delta(delta_BDF: Float[Array, "B D F"], transform: DeltaTransform) -> Float[Array, "B D F"]:
    """Returns the updates scaled down to the bounds of ``transform``, each row of the batch by itself."""
    if transform.clip is not None:
        norm_B = jnp.sqrt(jnp.sum(jnp.square(delta_BDF), axis=(1, 2)) + _TINY)
        delta_BDF = delta_BDF * (transform.clip / jnp.maximum(norm_B, transform.clip))[:, None, None]
    if transform.spectral is not None:
        norm_B = spectral_norm(delta_BDF)
        delta_BDF = delta_BDF * (transform.spectral / jnp.maximum(norm_B, transform.spectral))[:, None, None]
    return delta_BDF


def spectral_norm(delta_BDF: Float[Array, "B D F"]) -> Float[Array, "B"]:
    """Returns the largest singular value of each matrix by power iteration from a fixed start.

    The singular vectors are constants for differentiation, which makes ``u^T delta w`` and its gradient
    ``u w^T`` exact once the iteration has converged.
    """
    width = delta_BDF.shape[2]
    start_F = jax.random.normal(jax.random.key(0), (width,), delta_BDF.dtype)
    w_BF = jnp.broadcast_to(start_F[None, :], (delta_BDF.shape[0], width))
    fixed_BDF = jax.lax.stop_gradient(delta_BDF)

    def iterate(_: jax.Array, w_BF: jax.Array) -> jax.Array:
        u_BD = _unit(jnp.einsum("bdf,bf->bd", fixed_BDF, w_BF))
        return _unit(jnp.einsum("bdf,bd->bf", fixed_BDF, u_BD))

    w_BF = jax.lax.fori_loop(0, _POWER_ITERATIONS, iterate, _unit(w_BF))
    u_BD = _unit(jnp.einsum("bdf,bf->bd", fixed_BDF, w_BF))
    return jnp.einsum("bd,bdf,bf->b", u_BD, delta_BDF, w_BF)


def row_scale(s_BDF: Float[Array, "B D F"], w_down_DF: Float[Array, "D F"]) -> Float[Array, "B D"]:
    """Returns ``|W0[d]| / |W0[d] + S[d]|`` in fp32, a constant for differentiation."""
    base_DF = w_down_DF.astype(jnp.float32)
    base_D = jnp.sqrt(jnp.sum(jnp.square(base_DF), axis=1))
    moved_BD = jnp.sqrt(jnp.sum(jnp.square(base_DF[None] + s_BDF), axis=2))
    return jax.lax.stop_gradient(base_D[None] / jnp.maximum(moved_BD, 1e-12))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _TINY)
