"""The chunked form: one scan over chunks forward, two backward, and never one state per chunk in memory.

``apply then update``: chunk i reads the state left by the chunks before it, then adds its own update, so the
recurrence is a segmented exclusive prefix sum. Its gradient needs S_i again (a prefix scan re-creates it) and
``G_i = dL/dS_i`` (a suffix scan carries it). Residuals are the inputs only; see ``docs/method.md``, "Backward".

Letters: B row, C tokens per chunk, M chunks, D model width, F feed-forward width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from intttrain.ttt.layout import ChunkLayout
from intttrain.ttt.transforms import DeltaTransform, bound_delta, row_scale

Array = jax.Array


class Scanned(NamedTuple):
    """Everything the scan produces.

    Attributes:
      c_BMCD: fp32, ``a_t S_i z_t``: what the state adds to ``W0 z``.
      s_end_BDF: fp32 state after the last chunk.
      scale_BMD: fp32 row scales with which each chunk reads (ones unless row norms are preserved); no gradient.
      delta_norm_BM, state_norm_BM: Frobenius norms of each update as committed and of the state after it;
        no gradient.
    """

    c_BMCD: Array
    s_end_BDF: Array
    scale_BMD: Array
    delta_norm_BM: Array
    state_norm_BM: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_chunks(
    transform: DeltaTransform,
    z_BMCF: Array,
    v_BMCD: Array,
    w_down_DF: Array,
    layout: ChunkLayout,
    gates_BM: Array,
    eta: Array,
    s_in_BDF: Array,
) -> Scanned:
    """Runs the recurrence over the chunks of a row.

    Matmul inputs keep the dtype of ``z_BMCF`` and ``v_BMCD``; the state and every sum are fp32. Differentiable
    in z, v, gates, eta and the incoming state. ``w_down_DF`` is read only for row scales, without gradient.
    """

    def step(s_BDF: Array, chunk: _Chunk) -> tuple[Array, tuple[Array, ...]]:
        c_BCD = _read(s_BDF, chunk)
        s_next_BDF, delta_BDF = _commit(transform, s_BDF, chunk, eta)
        scale_BD = _scale(s_BDF, w_down_DF, transform)
        return s_next_BDF, (c_BCD, scale_BD, _norm(delta_BDF), _norm(s_next_BDF))

    chunks = _by_chunk(z_BMCF, v_BMCD, layout, gates_BM)
    s_end_BDF, stacked = jax.lax.scan(step, s_in_BDF, chunks)
    c_BMCD, scale_BMD, delta_norm_BM, state_norm_BM = (jnp.moveaxis(x, 0, 1) for x in stacked)
    return Scanned(c_BMCD, s_end_BDF, scale_BMD, delta_norm_BM, state_norm_BM)


class _Chunk(NamedTuple):
    """One chunk of every row, as the scans see it."""

    z_BCF: Array
    v_BCD: Array
    reads_BC: Array
    writes_BC: Array
    keep_B: Array
    gate_B: Array


def _by_chunk(z_BMCF: Array, v_BMCD: Array, layout: ChunkLayout, gates_BM: Array) -> _Chunk:
    """Puts the chunk axis first, where ``lax.scan`` wants it (free for one row)."""
    leaves = (z_BMCF, v_BMCD, layout.reads_BMC, layout.writes_BMC, layout.keeps_BM, gates_BM)
    return _Chunk(*(jnp.moveaxis(x, 1, 0) for x in leaves))


def _read(s_BDF: Array, chunk: _Chunk) -> Array:
    """Returns ``a_t S z_t`` (fp32)."""
    s_z = jnp.einsum("bcf,bdf->bcd", chunk.z_BCF, s_BDF.astype(chunk.z_BCF.dtype), preferred_element_type=jnp.float32)
    return chunk.reads_BC[:, :, None] * s_z


def _raw_delta(chunk: _Chunk, eta: Array) -> Array:
    """Returns ``eta * sum_t mu_t v_t z_t^T`` (fp32), not yet bounded or gated."""
    written_BCD = chunk.v_BCD * chunk.writes_BC[:, :, None].astype(chunk.v_BCD.dtype)
    return eta * jnp.einsum("bcd,bcf->bdf", written_BCD, chunk.z_BCF, preferred_element_type=jnp.float32)


def _commit(transform: DeltaTransform, s_BDF: Array, chunk: _Chunk, eta: Array) -> tuple[Array, Array]:
    """Returns the state after a chunk, and the chunk's update of it."""
    delta_BDF = chunk.gate_B[:, None, None] * bound_delta(_raw_delta(chunk, eta), transform)
    return chunk.keep_B[:, None, None] * s_BDF + delta_BDF, delta_BDF


def written_state(
    transform: DeltaTransform, z_BMCF: Array, v_BMCD: Array, layout: ChunkLayout, gates_BM: Array, eta: Array
) -> Array:
    """Returns the state (B D F) after the last chunk of rows that began with an empty one.

    Without bounds on updates that is one matmul over all tokens.
    """
    if transform.bounds_delta:

        def step(s_BDF: Array, chunk: _Chunk) -> tuple[Array, None]:
            return _commit(transform, s_BDF, chunk, eta)[0], None

        empty_BDF = jnp.zeros((z_BMCF.shape[0], v_BMCD.shape[-1], z_BMCF.shape[-1]), jnp.float32)
        return jax.lax.scan(step, empty_BDF, _by_chunk(z_BMCF, v_BMCD, layout, gates_BM))[0]
    kept_after_BM = _kept_before(layout.keeps_BM[:, ::-1])[:, ::-1]
    weights_BMC = layout.writes_BMC * (gates_BM * kept_after_BM)[:, :, None]
    written_BMCD = v_BMCD * weights_BMC[..., None].astype(v_BMCD.dtype)
    return eta * jnp.einsum("bmcd,bmcf->bdf", written_BMCD, z_BMCF, preferred_element_type=jnp.float32)


def read_back(z_BMCF: Array, layout: ChunkLayout, do_BMCD: Array) -> Array:
    """Returns the gradient (B D F) of the incoming state through all reads, without that of the last state."""
    weighted_BMCD = do_BMCD * _kept_before(layout.keeps_BM)[:, :, None, None].astype(do_BMCD.dtype)
    return jnp.einsum("bmcd,bmcf->bdf", weighted_BMCD, z_BMCF, preferred_element_type=jnp.float32)


def _kept_before(keeps_BM: Array) -> Array:
    """Returns for each chunk the product of ``keeps`` over the chunks before it."""
    kept_BM = jnp.cumprod(keeps_BM, axis=1)
    return jnp.concatenate([jnp.ones_like(kept_BM[:, :1]), kept_BM[:, :-1]], axis=1)


def _scale(s_BDF: Array, w_down_DF: Array, transform: DeltaTransform) -> Array:
    if transform.preserve_row_norm:
        return row_scale(s_BDF, w_down_DF)
    return jnp.ones(s_BDF.shape[:2], jnp.float32)


def _norm(x_BDF: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x_BDF), axis=(1, 2)))


def _forward(transform: DeltaTransform, *inputs: Any) -> tuple[Scanned, tuple[Any, ...]]:
    return scan_chunks(transform, *inputs), inputs


def _backward(transform: DeltaTransform, residuals: tuple[Any, ...], cotangents: Scanned) -> tuple[Any, ...]:
    z_BMCF, v_BMCD, _, layout, gates_BM, eta, s_in_BDF = residuals
    do_BMCD = read_gradient(z_BMCF, layout, cotangents.c_BMCD)
    found = backward_scans(transform, z_BMCF, v_BMCD, layout, gates_BM, eta, s_in_BDF, do_BMCD, cotangents.s_end_BDF)
    return found.dz_BMCF, found.dv_BMCD, None, None, found.dgates_BM, found.deta, found.ds_in_BDF


def read_gradient(z_BMCF: Array, layout: ChunkLayout, dc_BMCD: Array) -> Array:
    """Returns the gradient of what was read, zero where nothing was, as an input of matmuls."""
    return (layout.reads_BMC[..., None] * dc_BMCD).astype(z_BMCF.dtype)


class Gradients(NamedTuple):
    """Of z, v, the gates, eta and the incoming state."""

    dz_BMCF: Array
    dv_BMCD: Array
    dgates_BM: Array
    deta: Array
    ds_in_BDF: Array


def backward_scans(
    transform: DeltaTransform,
    z_BMCF: Array,
    v_BMCD: Array,
    layout: ChunkLayout,
    gates_BM: Array,
    eta: Array,
    s_in_BDF: Array,
    do_BMCD: Array,
    g_end_BDF: Array,
) -> Gradients:
    """Returns the gradients, from that of what was read (``read_gradient``) and that of the last state."""
    chunks = _by_chunk(z_BMCF, v_BMCD, layout, gates_BM)
    do_MBCD = jnp.moveaxis(do_BMCD, 1, 0)

    def prefix(s_BDF: Array, inputs: tuple[_Chunk, Array]) -> tuple[Array, Array]:
        """Re-creates S_i and returns the gradient of z through the read: ``a_t do_t S_i``."""
        chunk, do_BCD = inputs
        dz_BCF = jnp.einsum("bcd,bdf->bcf", do_BCD, s_BDF.astype(do_BCD.dtype))
        return _commit(transform, s_BDF, chunk, eta)[0], dz_BCF

    def suffix(g_BDF: Array, inputs: tuple[_Chunk, Array]) -> tuple[Array, tuple[Array, ...]]:
        """Carries ``G_{i+1} = dL/dS_{i+1}`` back through the commit and the read of chunk i."""
        chunk, do_BCD = inputs
        gradients = _commit_gradient(transform, chunk, eta, g_BDF)
        read_BDF = jnp.einsum("bcd,bcf->bdf", do_BCD, chunk.z_BCF, preferred_element_type=jnp.float32)
        return chunk.keep_B[:, None, None] * g_BDF + read_BDF, gradients

    _, dz_read_MBCF = jax.lax.scan(prefix, s_in_BDF, (chunks, do_MBCD))
    ds_in_BDF, gradients = jax.lax.scan(suffix, g_end_BDF, (chunks, do_MBCD), reverse=True)
    dz_MBCF, dv_MBCD, dgate_MB, deta_MB = gradients
    dz_BMCF, dv_BMCD = jnp.moveaxis(dz_read_MBCF + dz_MBCF, 0, 1), jnp.moveaxis(dv_MBCD, 0, 1)
    return Gradients(dz_BMCF, dv_BMCD, jnp.moveaxis(dgate_MB, 0, 1), jnp.sum(deta_MB), ds_in_BDF)


def _commit_gradient(transform: DeltaTransform, chunk: _Chunk, eta: Array, g_BDF: Array) -> tuple[Array, ...]:
    """Returns the gradients of z, v, gate and eta through ``gate * bound(eta * sum mu v z^T)``; ``g_BDF`` is dL/dS."""
    if transform.bounds_delta:
        draw_BDF, dgate_B, deta_B = _bounded_gradient(transform, chunk, eta, g_BDF)
        factor_B = jnp.ones_like(chunk.gate_B)
    else:
        draw_BDF, factor_B = g_BDF, eta * chunk.gate_B
    dtype, writes_BC1 = chunk.z_BCF.dtype, chunk.writes_BC[:, :, None]
    draw_BDF = draw_BDF.astype(dtype)
    gz_BCD = writes_BC1 * jnp.einsum("bcf,bdf->bcd", chunk.z_BCF, draw_BDF, preferred_element_type=jnp.float32)
    vg_BCF = writes_BC1 * jnp.einsum("bcd,bdf->bcf", chunk.v_BCD, draw_BDF, preferred_element_type=jnp.float32)
    if not transform.bounds_delta:
        inner_B = jnp.sum(chunk.v_BCD.astype(jnp.float32) * gz_BCD, axis=(1, 2))  # <V^T Z, G>
        dgate_B, deta_B = eta * inner_B, chunk.gate_B * inner_B
    factor_B11 = factor_B[:, None, None]
    return (factor_B11 * vg_BCF).astype(dtype), (factor_B11 * gz_BCD).astype(dtype), dgate_B, deta_B


def _bounded_gradient(transform: DeltaTransform, chunk: _Chunk, eta: Array, g_BDF: Array) -> tuple[Array, Array, Array]:
    """Returns the gradients of the raw sum ``V^T Z``, the gate and eta when the update is bounded."""

    def commit(raw_BDF: Array, gate_B: Array, eta_B: Array) -> Array:
        return gate_B[:, None, None] * bound_delta(eta_B[:, None, None] * raw_BDF, transform)

    raw_BDF = _raw_delta(chunk, jnp.ones_like(eta))
    _, pull = jax.vjp(commit, raw_BDF, chunk.gate_B, jnp.broadcast_to(eta, chunk.gate_B.shape))
    return pull(g_BDF)


scan_chunks.defvjp(_forward, _backward)
