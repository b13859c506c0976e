"""The update rule: what a chunk writes into the fast weight, and what becomes of what was written before.

    S_{i+1} = a_i S_i + g_i Delta_i,    a_i = r k_i,    Delta_i = bound(eta write(v_i, z_i))

``k_i`` (*keep*, 0 or 1) says whether the document goes on past chunk i, and belongs to the row. ``r`` (*retention*, a
number in (0, 1]) says how much of the state is left after a chunk, and belongs to the rule; ``a_i`` is what the state
is multiplied by. ``g_i`` is the gate. Because ``a_i`` depends on no state, chunks combine associatively, see
``combine``: that is what lets a row be cut into pieces.

``UpdateRule`` is In-Place TTT (arXiv 2604.06169): ``write`` is the sum of outer products and nothing is forgotten.
Every implementation (the reference, the scans over chunks, the exchange between shards, decoding) asks the rule and
restates none of it, so another rule is a subclass that overrides ``retention``, ``write`` or ``bound``. What has no
closed gradient is differentiated by JAX. The Pallas kernels know ``UpdateRule()`` alone and refuse every other rule.
``model.ttt.update`` chooses a rule by the name under which it is registered; ``update_rule`` makes it.

Letters: B row, C tokens per chunk, M chunks, D model width, F feed-forward width, E either of both.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from intttrain.config import Config, TTTConfig
from intttrain.config.errors import UserError
from intttrain.config.registry import UPDATE_RULES
from intttrain.config.ttt import BOUNDS, SumConfig

_POWER_ITERATIONS = 12
_TINY = 1e-30  # keeps the gradient of a norm finite at an update of exactly zero


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """The sum of outer products, and bounds on it, all off. Hashable and static: one compilation per rule.

    Attributes:
      clip: largest Frobenius norm of one update (In-Place TTT, inference of Qwen3-4B: 1e-5); None = free.
      spectral: largest spectral norm of one update (TTT-NTP, arXiv 2606.21803); None = free.
      preserve_row_norm: read ``W0 + S`` with its rows rescaled to the norms of ``W0``'s rows. This acts when the state
        is read, so the state stays a plain sum (``docs/decisions/0003``).
    """

    clip: float | None = None
    spectral: float | None = None
    preserve_row_norm: bool = False

    # --- what becomes of what was written before ----------------------------------------------------------------------

    @property
    def retention(self) -> float:
        """r: how much of the state is left after a chunk; 1 keeps all of it."""
        return 1.0

    def carry(self, keep: Array) -> Array:
        """Returns a = r k, what the state is multiplied by over a chunk.

        A chunk that writes nothing (gate shut, all padding) still multiplies: forgetting counts chunks, not updates.
        """
        return keep if self.keeps_everything else self.retention * keep

    @property
    def keeps_everything(self) -> bool:
        """Whether a document's state only ever grows by what is added to it."""
        return self.retention == 1.0

    def combine(self, a: Array, s_DF: Array, then_s_DF: Array) -> Array:
        """Returns what two consecutive pieces of a row leave: ``a s + s'``, where a belongs to the second one.

        With the product of a beside each state, ``(a1, S1)`` then ``(a2, S2)`` is ``(a1 a2, a2 S1 + S2)``: associative.
        """
        return a * s_DF + then_s_DF

    # --- what a chunk writes -----------------------------------------------------------------------------------------

    def write(self, v_CD: Array, z_CF: Array, writes_C: Array | None) -> Array:
        """Returns ``sum_t mu_t v_t z_t^T`` (D F, fp32).

        Args:
          v_CD, z_CF: values and activations of a chunk, in the compute dtype.
          writes_C: mu, 1 for the tokens that are written and 0 for the others (another document, padding); ``None`` if
            all are.
        """
        return matmul("cd,cf->df", v_CD if writes_C is None else weighted(v_CD, writes_C), z_CF)

    def bound(self, delta_DF: Array) -> Array:
        """Returns the update scaled down to the bounds."""
        if self.clip is not None:
            delta_DF = _scaled_down(delta_DF, jnp.sqrt(jnp.sum(jnp.square(delta_DF)) + _TINY), self.clip)
        if self.spectral is not None:
            delta_DF = _scaled_down(delta_DF, spectral_norm(delta_DF), self.spectral)
        return delta_DF

    def delta(self, v_CD: Array, z_CF: Array, writes_C: Array | None, eta: Array) -> Array:
        """Returns ``bound(eta write(v, z))`` (D F, fp32): what a chunk whose gate is 1 adds to the state."""
        return self.bound(eta * self.write(v_CD, z_CF, writes_C))

    def delta_gradient(
        self, v_CD: Array, z_CF: Array, writes_C: Array, gate: Array, eta: Array, g_DF: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Returns the gradients of z, v (in their dtype), gate and eta through ``gate * delta``.

        Args:
          v_CD, z_CF, writes_C, eta: as there.
          gate: g of the chunk.
          g_DF: fp32 gradient of the state after the chunk.
        """
        if not self.writes_outer_products:
            gated = lambda z, v, gate, eta: gate * self.delta(v, z, writes_C, eta)  # noqa: E731
            dz_CF, dv_CD, dgate, deta = jax.vjp(gated, z_CF, v_CD, gate, eta)[1](g_DF)
            return dz_CF, dv_CD, dgate, deta
        factor: Array | float = eta * gate
        if not self.is_plain_sum:
            # JAX differentiates the bounds alone, at the sum V^T Z, which is made once: two matmuls less.
            bounded = lambda raw_DF, gate, eta: gate * self.bound(eta * raw_DF)  # noqa: E731
            raw_DF = self.write(v_CD, z_CF, writes_C)
            (g_DF, dgate, deta), factor = jax.vjp(bounded, raw_DF, gate, eta)[1](g_DF), 1.0
        dtype, writes_C1 = z_CF.dtype, writes_C[:, None]
        g_DF = g_DF.astype(dtype)
        gz_CD = writes_C1 * matmul("cf,df->cd", z_CF, g_DF)
        vg_CF = writes_C1 * matmul("cd,df->cf", v_CD, g_DF)
        if self.is_plain_sum:
            inner = jnp.sum(v_CD.astype(jnp.float32) * gz_CD)  # <V^T Z, G>
            dgate, deta = eta * inner, gate * inner
        return (factor * vg_CF).astype(dtype), (factor * gz_CD).astype(dtype), dgate, deta

    @property
    def writes_outer_products(self) -> bool:
        """Whether ``write`` is the sum of outer products, linear in v and in z."""
        return type(self).write is UpdateRule.write

    @property
    def is_plain_sum(self) -> bool:
        """Whether what several chunks write is the sum over their tokens, which one matmul computes."""
        unbounded = self.clip is None and self.spectral is None and type(self).bound is UpdateRule.bound
        return unbounded and self.writes_outer_products

    # --- how the state is read ---------------------------------------------------------------------------------------

    def row_scale(self, s_DF: Float[Array, "D F"], w_down_DF: Float[Array, "D F"]) -> Float[Array, "D"] | None:
        """Returns what rows of ``W0 + S`` are read multiplied with to have the norms of W0's; ``None`` for nothing."""
        return row_scale(s_DF, w_down_DF) if self.preserve_row_norm else None


@UPDATE_RULES.register("sum", SumConfig)
def _sum(section: SumConfig, config: TTTConfig) -> UpdateRule:
    return UpdateRule(**config.bounds)


def update_rule(config: TTTConfig) -> UpdateRule:
    """Returns the rule that ``model.ttt.update`` chooses, with the bounds of the configuration.

    Raises:
      UserError: the rule does not have a bound as it is configured, so it would be ignored.
    """
    rule: UpdateRule = UPDATE_RULES.choice(config.update)(config.update, config)
    for field, name in BOUNDS.items():
        asked, kept = config.bounds[name], getattr(rule, name)
        if kept != asked:
            kind = UPDATE_RULES.kind_of(config.update)
            raise UserError(
                f"model.ttt.{field}={asked} would be ignored: the update rule {kind!r} was made with {name}={kept}; "
                f"use model.ttt.{field}={kept}, or make the rule with **config.bounds"
            )
    return rule


@UPDATE_RULES.check_every
def _check_bounds(config: Config) -> None:
    if config.model.ttt is not None:
        update_rule(config.model.ttt)


def matmul(equation: str, a: Array, b: Array) -> Array:
    """Returns the einsum of two arrays, summed and returned in fp32 whatever their dtype."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def weighted(x_MCE: Array, weights_MC: Array) -> Array:
    """Returns the tokens multiplied by their weights, in the dtype of the tokens; M may be missing."""
    return x_MCE * weights_MC[..., None].astype(x_MCE.dtype)


def _scaled_down(delta_DF: Array, norm: Array, most: float) -> Array:
    return delta_DF * (most / jnp.maximum(norm, most))


def spectral_norm(delta_DF: Float[Array, "D F"]) -> Float[Array, ""]:
    """Returns the largest singular value of a matrix by power iteration from a fixed start.

    The singular vectors are constants for differentiation, which makes ``u^T delta w`` and its gradient
    ``u w^T`` exact once the iteration has converged.
    """
    w_F = jax.random.normal(jax.random.key(0), (delta_DF.shape[1],), delta_DF.dtype)
    fixed_DF = jax.lax.stop_gradient(delta_DF)

    def iterate(_: jax.Array, w_F: jax.Array) -> jax.Array:
        u_D = _unit(jnp.einsum("df,f->d", fixed_DF, w_F))
        return _unit(jnp.einsum("df,d->f", fixed_DF, u_D))

    w_F = jax.lax.fori_loop(0, _POWER_ITERATIONS, iterate, _unit(w_F))
    u_D = _unit(jnp.einsum("df,f->d", fixed_DF, w_F))
    return jnp.einsum("d,df,f->", u_D, delta_DF, w_F)


def row_scale(s_DF: Float[Array, "D F"], w_down_DF: Float[Array, "D F"]) -> Float[Array, "D"]:
    """Returns ``|W0[d]| / |W0[d] + S[d]|`` in fp32, a constant for differentiation."""
    base_DF = w_down_DF.astype(jnp.float32)
    base_D = jnp.sqrt(jnp.sum(jnp.square(base_DF), axis=1))
    moved_D = jnp.sqrt(jnp.sum(jnp.square(base_DF + s_DF), axis=1))
    return jax.lax.stop_gradient(base_D / jnp.maximum(moved_D, 1e-12))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.sum(jnp.square(x)) + _TINY)
