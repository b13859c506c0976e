"""The chunked form: one scan over chunks forward, two backward, and never one state per chunk in memory.

``apply then update``: chunk i reads ``W0 + S_i``, the state left by the chunks before it, then adds its own update, so
the recurrence is a segmented exclusive prefix sum. Its gradient needs S_i again (a prefix scan re-creates it) and
``G_i = dL/dS_i`` (a suffix scan carries it). Residuals are the inputs only; see ``docs/method.md``, "Backward".

Where all tokens of a chunk read the state, or none does, ``W0 + S_i`` is one matrix, and what the reads want of S_i is
what they want of W0: one matmul serves both. Only a chunk in which a document begins after its first token takes more;
its results then replace the usual ones.

Letters: C tokens per chunk, M chunks, D model width, F feed-forward width, E either of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from intttrain.layout.sharding import differing
from intttrain.ttt.rules import UpdateRule, matmul, weighted

Array = jax.Array

# Work in this scope is done only for a chunk in which a document begins.
MIXED_SCOPE = "mixed_chunk"


class Chunks(NamedTuple):
    """The chunks of a row, or without M one of them; masks as in ``ChunkLayout``.

    Attributes:
      z_MCF, v_MCD: what is read with and written with, and what is written; in the compute dtype.
      reads_MC, writes_MC: which tokens may read the state, and which write into it.
      keep_M: whether the state that came in is kept.
      gate_M: multiplies the update.
    """

    z_MCF: Array
    v_MCD: Array
    reads_MC: Array
    writes_MC: Array
    keep_M: Array
    gate_M: Array


class Forward(NamedTuple):
    """What ``forward_scan`` returns.

    Attributes:
      o_MCD: ``(W0 + a_t S_i) z_t``, in the dtype of z.
      scale_MD: fp32 row scales with which each chunk read, ``None`` unless row norms are preserved.
      delta_norm_M, state_norm_M: Frobenius norms of each update as committed and of the state after it.
    """

    o_MCD: Array
    scale_MD: Array | None
    delta_norm_M: Array
    state_norm_M: Array


class Gradients(NamedTuple):
    """Of z, v, the gates, eta and the incoming state."""

    dz_MCF: Array
    dv_MCD: Array
    dgate_M: Array
    deta: Array
    ds_in_DF: Array


def forward_scan(update: UpdateRule, w_DF: Array, eta: Array, s_in_DF: Array, chunks: Chunks) -> tuple[Array, Forward]:
    """Runs the recurrence over the chunks of a row; returns the last state and what was read.

    Matmul inputs have the dtype of z; ``w_DF`` (W0), the state and every sum are fp32.
    """

    dtype = chunks.z_MCF.dtype

    def step(s_DF: Array, inputs: tuple[Chunks, Array]) -> tuple[Array, Forward]:
        chunk, at = inputs
        scale_D = update.row_scale(s_DF, w_DF)

        def finish(o_CD: Array) -> Array:
            return (o_CD if scale_D is None else o_CD * read_scale(scale_D, chunk.reads_MC)).astype(dtype)

        def replace(_: Array) -> Array:
            return finish(_through_both("cf,df->cd", _chunk_at(chunks.z_MCF, at), w_DF, s_DF, chunk.reads_MC))

        o_CD = finish(matmul("cf,df->cd", chunk.z_MCF, _read_matrix(w_DF, s_DF, chunk)))
        o_CD = _if_mixed(chunk, replace, o_CD)
        s_next_DF, delta_DF = commit(update, s_DF, chunk, eta)
        return s_next_DF, Forward(o_CD, scale_D, _norm(delta_DF), _norm(s_next_DF))

    return jax.lax.scan(step, s_in_DF, (chunks, _numbers(chunks)))


def read_scale(scale_MD: Array, reads_MC: Array) -> Array:
    """Returns by what the outputs (M C D) of tokens are multiplied: the row scales where a token reads the state."""
    return jnp.where(reads_MC[..., None] > 0, scale_MD[..., None, :], 1.0)


def _read_matrix(w_DF: Array, s_DF: Array, chunk: Chunks) -> Array:
    """Returns ``W0 + a S`` as an input of matmuls, for a chunk whose tokens all have the same a."""
    return (w_DF + chunk.reads_MC[0] * s_DF).astype(chunk.z_MCF.dtype)


def _through_both(equation: str, x_CE: Array, w_DF: Array, s_DF: Array, reads_C: Array) -> Array:
    """Returns the product (fp32) of each token with ``W0 + a_t S``, by two matmuls."""
    through_s = matmul(equation, x_CE, s_DF.astype(x_CE.dtype))
    return matmul(equation, x_CE, w_DF.astype(x_CE.dtype)) + reads_C[:, None] * through_s


def _if_mixed(chunk: Chunks, replace: Callable[[Array], Array], x: Array) -> Array:
    """Returns ``x``, or ``replace(x)`` for a chunk of which some tokens read the state and some do not.

    ``replace`` should take of whole rows what it needs: a part handed over would be copied for every chunk.
    """
    uniform = jnp.all(chunk.reads_MC == chunk.reads_MC[0])
    return jax.lax.cond(uniform, lambda x: x, jax.named_scope(MIXED_SCOPE)(replace), x)


def _in_order(*arrays: Array) -> tuple[Array, ...]:
    """Returns the arrays, all computed: what a conditional reads is updated in place after it, instead of in a copy."""
    return jax.lax.optimization_barrier(arrays)


def _numbers(chunks: Chunks) -> Array:
    return jnp.arange(chunks.keep_M.shape[0])


def _chunk_at(x_MCE: Array, at: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x_MCE, at, keepdims=False)


def commit(update: UpdateRule, s_DF: Array, chunk: Chunks, eta: Array) -> tuple[Array, Array]:
    """Returns the state after a chunk, and what the chunk added to it."""
    delta_DF = chunk.gate_M * update.delta(chunk.v_MCD, chunk.z_MCF, chunk.writes_MC, eta)
    return update.combine(update.carry(chunk.keep_M), s_DF, delta_DF), delta_DF


def written_state(update: UpdateRule, eta: Array, chunks: Chunks) -> Array:
    """Returns the state (D F) after the last chunk of a row that began with an empty one.

    Where updates are plain sums and nothing is forgotten, that is one matmul over all tokens: its weights are 0 and 1
    (and the gates), which the compute dtype holds exactly, as it does not hold powers of a retention.
    """
    if not (update.is_plain_sum and update.keeps_everything):

        def step(s_DF: Array, chunk: Chunks) -> tuple[Array, None]:
            return commit(update, s_DF, chunk, eta)[0], None

        return jax.lax.scan(step, empty_state(chunks.v_MCD.shape[-1], chunks.z_MCF.shape[-1]), chunks)[0]
    kept_after_M = _kept_before(chunks.keep_M[::-1])[::-1]
    weights_MC = chunks.writes_MC * (chunks.gate_M * kept_after_M)[:, None]
    return eta * matmul("mcd,mcf->df", weighted(chunks.v_MCD, weights_MC), chunks.z_MCF)


def read_back(update: UpdateRule, chunks: Chunks, do_MCD: Array) -> Array:
    """Returns the gradient (D F) of the incoming state through all reads, without that of the last state.

    One matmul, or a scan, as in ``written_state``.
    """
    if not update.keeps_everything:

        def step(g_DF: Array, inputs: tuple[Chunks, Array]) -> tuple[Array, None]:
            chunk, do_CD = inputs
            return update.combine(update.carry(chunk.keep_M), g_DF, _from_reads_of(chunk, do_CD)), None

        empty_DF = empty_state(chunks.v_MCD.shape[-1], chunks.z_MCF.shape[-1])
        return jax.lax.scan(step, empty_DF, (chunks, do_MCD), reverse=True)[0]
    weights_MC = chunks.reads_MC * _kept_before(chunks.keep_M)[:, None]
    return matmul("mcd,mcf->df", weighted(do_MCD, weights_MC), chunks.z_MCF)


def _from_reads_of(chunk: Chunks, do_CD: Array) -> Array:
    """Returns the gradient (D F) of the state through the reads of a chunk."""
    return matmul("cd,cf->df", weighted(do_CD, chunk.reads_MC), chunk.z_MCF)


def _kept_before(keep_M: Array) -> Array:
    """Returns for each chunk the product of ``keep`` over the chunks before it."""
    kept_M = jnp.cumprod(keep_M)
    return jnp.concatenate([jnp.ones_like(kept_M[:1]), kept_M[:-1]])


def empty_state(width: int, d_ff: int) -> Array:
    """Returns zeros (D F) that XLA takes for an array: it folds a constant into every step of a scan that it starts."""
    zeros_DF = jax.lax.optimization_barrier(jnp.zeros((width, d_ff), jnp.float32))
    return differing(zeros_DF, "batch", "tokens")


def _norm(x_DF: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x_DF)))


def backward_scans(
    update: UpdateRule,
    w_DF: Array,
    eta: Array,
    dw_DF: Array,
    s_in_DF: Array,
    chunks: Chunks,
    do_MCD: Array,
    g_end_DF: Array | None,
) -> tuple[Array, Gradients]:
    """Returns the gradients of ``forward_scan``, that of W0 (fp32) first.

    Args:
      update, w_DF, eta, s_in_DF, chunks: as there.
      dw_DF: what the gradient of W0 is added to.
      do_MCD: gradient of what was read, row scales included, in the dtype of z.
      g_end_DF: gradient of the last state; ``None`` for zero.
    """

    dtype = chunks.z_MCF.dtype

    def prefix(carried: tuple[Array, Array], inputs: tuple[Chunks, Array, Array]) -> tuple[tuple[Array, Array], None]:
        """Re-creates S_i and puts the gradient of z through the read, ``do_t (W0 + a_t S_i)``, into its place."""
        s_DF, dz_MCF = carried
        chunk, do_CD, at = inputs

        def replace(dz_MCF: Array) -> Array:
            dz_CF = _through_both("cd,df->cf", _chunk_at(do_MCD, at), w_DF, s_DF, chunk.reads_MC)
            return jax.lax.dynamic_update_index_in_dim(dz_MCF, dz_CF.astype(dtype), at, axis=0)

        dz_CF = matmul("cd,df->cf", do_CD, _read_matrix(w_DF, s_DF, chunk)).astype(dtype)
        dz_MCF = _if_mixed(chunk, replace, jax.lax.dynamic_update_index_in_dim(dz_MCF, dz_CF, at, axis=0))
        s_DF, dz_MCF = _in_order(s_DF, dz_MCF)
        return (commit(update, s_DF, chunk, eta)[0], dz_MCF), None

    def suffix(carried: tuple[_Sums, Array], inputs: tuple[Chunks, Array, Array]) -> tuple[Any, tuple[Array, ...]]:
        """Carries ``G_{i+1} = dL/dS_{i+1}`` back through the commit and the read of chunk i.

        The gradient of z through the commit is added to that through the read.
        """
        sums, dz_MCF = carried
        chunk, do_CD, at = inputs
        dz_CF, *gradients = update.delta_gradient(
            chunk.v_MCD, chunk.z_MCF, chunk.writes_MC, chunk.gate_M, eta, sums.g_DF
        )
        dz_CF = dz_CF + _chunk_at(dz_MCF, at)
        dz_MCF = jax.lax.dynamic_update_index_in_dim(dz_MCF, dz_CF, at, axis=0)
        a = update.carry(chunk.keep_M)
        dw_DF = _lost_by_g(update, sums, chunk, g_end_DF, (do_MCD, chunks.z_MCF, at))
        g_DF, dw_DF = _in_order(sums.g_DF, dw_DF)
        g_DF = update.combine(a, g_DF, _from_reads_of(chunk, do_CD))
        return (_Sums(g_DF, dw_DF, a * sums.end_share), dz_MCF), tuple(gradients)

    inputs = (chunks, do_MCD, _numbers(chunks))
    empty_MCF = differing(jax.lax.empty(chunks.z_MCF.shape, dtype), "batch", "tokens")
    (_, dz_MCF), _ = jax.lax.scan(prefix, (s_in_DF, empty_MCF), inputs)
    g_DF = empty_state(*w_DF.shape) if g_end_DF is None else g_end_DF
    sums = _Sums(g_DF, dw_DF, differing(jnp.float32(1.0), "batch", "tokens"))
    (sums, dz_MCF), (dv_MCD, dgate_M, deta_M) = jax.lax.scan(suffix, (sums, dz_MCF), inputs, reverse=True)
    gradients = Gradients(dz_MCF, dv_MCD, dgate_M, jnp.sum(deta_M), sums.g_DF)
    return sums.dw_DF + _from_reads(sums, g_end_DF), gradients


class _Sums(NamedTuple):
    """What the suffix scan carries.

    Attributes:
      g_DF: G, the gradient of the state after the chunk.
      dw_DF: the gradient of W0 through reads that G has no part in (any more).
      end_share: how much of the gradient of the last state is in G.
    """

    g_DF: Array
    dw_DF: Array
    end_share: Array


def _from_reads(sums: _Sums, g_end_DF: Array | None) -> Array:
    """Returns the part of G that comes from reads: as ``W0 + S`` is what is read, it is a gradient of W0 as well."""
    return sums.g_DF if g_end_DF is None else sums.g_DF - sums.end_share * g_end_DF


def _lost_by_g(
    update: UpdateRule, sums: _Sums, chunk: Chunks, g_end_DF: Array | None, rows: tuple[Array, Array, Array]
) -> Array:
    """Returns the gradient of W0 with what G is about to lose, and with what never was in it.

    G sums up what reads want of the state, which is what they want of W0: at the first chunk of a row it holds the
    gradient of W0, except for

    * (1 - a) G, which does not pass the chunk backwards: all of it where a document ends, a part under a rule that
      forgets. Without this term the gradient of W0 is wrong and everything else is right.
    * tokens that read W0 alone, at the beginning of a document inside a chunk.

    A rule that keeps everything pays for both only in a chunk where a document begins.
    """
    do_MCD, z_MCF, at = rows

    def lost(dw_DF: Array) -> Array:
        return dw_DF + (1.0 - update.carry(chunk.keep_M)) * _from_reads(sums, g_end_DF)

    @jax.named_scope(MIXED_SCOPE)
    def unread(dw_DF: Array) -> Array:
        unread_CD = weighted(_chunk_at(do_MCD, at), 1.0 - chunk.reads_MC)
        dw_DF = lost(dw_DF) if update.keeps_everything else dw_DF
        return dw_DF + matmul("cd,cf->df", unread_CD, _chunk_at(z_MCF, at))

    dw_DF = sums.dw_DF if update.keeps_everything else lost(sums.dw_DF)
    return jax.lax.cond(jnp.all(chunk.reads_MC > 0), lambda dw_DF: dw_DF, unread, dw_DF)
