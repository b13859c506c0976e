"""The scans of ``chunked.py`` by the kernels of ``kernel.py``: the same arguments, the same results.

Letters: C tokens per chunk, M chunks, N = M C tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from intttrain.layout.scan import scan
from intttrain.ttt import kernel
from intttrain.ttt.chunked import MIXED_SCOPE, Chunks, Forward, Gradients, empty_state
from intttrain.ttt.kernel_blocks import TOKEN_MULTIPLE, Kernels, padded

Array = jax.Array

# Of the suffix scan in one launch. Every core keeps an fp32 part of dv, and the state comes and goes once a group.
GROUP_CHUNKS = 32


def forward_scan(kernels: Kernels, w_DF: Array, eta: Array, s_in_DF: Array, chunks: Chunks) -> tuple[Array, Forward]:
    """Returns what ``chunked.forward_scan`` does, without row scales."""
    wide = _Padded(kernels, chunks)
    found = kernel.recurrence(
        _scalars(eta, chunks), wide.rows(chunks.z_MCF), None, wide.rows(chunks.v_MCD),
        wide.masks(chunks.reads_MC, chunks.writes_MC), wide.matrix(w_DF), wide.matrix(s_in_DF),
        kernels.forward, kernels.machine,
    )  # fmt: skip
    assert found.squares_M is not None and found.s_end is not None
    delta_norm_M, state_norm_M = (jnp.sqrt(square_M) for square_M in found.squares_M)
    o_MCD = wide.cut_rows(found.y_NP, w_DF.shape[0])
    return wide.cut_matrix(found.s_end, s_in_DF), Forward(o_MCD, None, delta_norm_M, state_norm_M)


def backward_scans(
    kernels: Kernels,
    w_DF: Array,
    eta: Array,
    dw_DF: Array,
    s_in_DF: Array,
    chunks: Chunks,
    do_MCD: Array,
    g_end_DF: Array | None,
) -> tuple[Array, Gradients]:
    """Returns what ``chunked.backward_scans`` does."""
    wide = _Padded(kernels, chunks)
    z_NF, v_ND, do_ND = (wide.rows(x) for x in (chunks.z_MCF, chunks.v_MCD, do_MCD))
    masks_N2 = wide.masks(chunks.reads_MC, chunks.writes_MC)
    w_DF, s_in_DF = wide.matrix(w_DF), wide.matrix(s_in_DF)
    dz_NF = kernel.recurrence(
        _scalars(eta, chunks), do_ND, v_ND, z_NF, masks_N2, w_DF, s_in_DF, kernels.prefix, kernels.machine
    ).y_NP

    g_start_DF = empty_state(*kernels.shape) if g_end_DF is None else wide.matrix(g_end_DF)
    groups = _groups(chunks.reads_MC.shape[0])
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (chunks, do_MCD))
    tokens = dz_NF.shape[0] // groups

    def suffix(carried: tuple[Array, Array, Array], inputs: tuple[Any, Array]) -> tuple[tuple[Array, ...], Any]:
        """Runs one group; the gradient of z is added to that of the read in its place."""
        g_DF, dw_DF, dz_NF = carried
        (group, do_mCD), start = inputs
        dz_nF = jax.lax.dynamic_slice_in_dim(dz_NF, start, tokens) if groups > 1 else dz_NF
        g_DF, dw_DF, dz_nF, *gradients = _suffix(kernels, eta, group, do_mCD, g_DF, dw_DF, dz_nF)
        dz_NF = jax.lax.dynamic_update_slice_in_dim(dz_NF, dz_nF, start, 0) if groups > 1 else dz_nF
        return (g_DF, dw_DF, dz_NF), gradients

    carried = (g_start_DF, wide.matrix(dw_DF), dz_NF)
    starts = tokens * jnp.arange(groups)
    (g_DF, dw_wide_DF, dz_NF), found = scan(suffix, carried, (split, starts), groups, reverse=True)
    dv_MCD, inner_M = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    dz_MCF = wide.cut_rows(dz_NF, chunks.z_MCF.shape[-1])
    ds_in_DF = wide.cut_matrix(g_DF, dw_DF)
    dw_DF = wide.cut_matrix(dw_wide_DF, dw_DF) + (ds_in_DF if g_end_DF is None else ds_in_DF - g_end_DF)
    dw_DF = _add_unread(dw_DF, 1.0 - _ends(chunks).joins_MC, do_MCD, chunks.z_MCF)
    return dw_DF, Gradients(dz_MCF, dv_MCD, eta * inner_M, jnp.sum(chunks.gate_M * inner_M), ds_in_DF)


def _groups(chunks: int) -> int:
    """Returns into how many groups of chunks a row is cut, so that the fp32 parts of dv are of one group."""
    fits = [n for n in range(1, chunks + 1) if chunks % n == 0 and chunks // n <= GROUP_CHUNKS]
    return fits[0] if GROUP_CHUNKS // 4 * fits[0] <= chunks else 1


def _suffix(
    kernels: Kernels, eta: Array, chunks: Chunks, do_MCD: Array, g_DF: Array, dw_DF: Array, dz_NF: Array
) -> tuple[Array, ...]:
    """Runs the suffix scan of some chunks; returns G, the gradients of W0, z and v, and <V^T Z, G> of each chunk."""
    wide, ends, factor_M = _Padded(kernels, chunks), _ends(chunks), eta * chunks.gate_M
    found = kernel.suffix(
        jnp.stack([factor_M, ends.before_M, ends.after_M]),
        wide.rows(chunks.z_MCF), wide.rows(chunks.v_MCD), wide.rows(do_MCD), dz_NF,
        wide.masks(ends.joins_MC, chunks.writes_MC), g_DF, dw_DF, kernels.suffix, kernels.cores, kernels.machine,
    )  # fmt: skip
    raw_MCD = chunks.writes_MC[..., None] * wide.cut_rows(found.dv_ND, do_MCD.shape[-1])
    inner_M = jnp.sum(chunks.v_MCD.astype(jnp.float32) * raw_MCD, axis=(1, 2))
    dv_MCD = (factor_M[:, None, None] * raw_MCD).astype(chunks.v_MCD.dtype)
    return found.g_DF, found.dw_DF, found.dz_NF, dv_MCD, inner_M


def _scalars(eta: Array, chunks: Chunks) -> kernel.Scalars:
    first_M = chunks.reads_MC[:, 0]
    mixed_M = jnp.any(chunks.reads_MC != first_M[:, None], axis=1).astype(jnp.float32)
    return kernel.Scalars(chunks.keep_M, eta * chunks.gate_M, first_M, mixed_M)


class _Ends(NamedTuple):
    """Where documents begin, and G with what its readers want of W0 is added to that gradient.

    Attributes:
      joins_MC: whose products with z are added to G.
      before_M, after_M: whether G leaves before these are added, or with them.
    """

    joins_MC: Array
    before_M: Array
    after_M: Array


def _ends(chunks: Chunks) -> _Ends:
    """A chunk of which no token reads S leaves with G: W0 is all that they read. In a mixed one the readers stay."""
    unread_M = (jnp.max(chunks.reads_MC, axis=1) == 0).astype(jnp.float32)
    after_M = (1.0 - chunks.keep_M) * unread_M
    before_M = (1.0 - chunks.keep_M) * (1.0 - unread_M)
    return _Ends(jnp.maximum(chunks.reads_MC, after_M[:, None]), before_M, after_M)


def _add_unread(dw_DF: Array, weights_MC: Array, do_MCD: Array, z_MCF: Array) -> Array:
    """Returns the gradient of W0 with that of the tokens of mixed chunks that do not read S."""

    def step(dw_DF: Array, at: Array) -> tuple[Array, None]:
        weights_C = weights_MC[at]

        @jax.named_scope(MIXED_SCOPE)
        def add(dw_DF: Array) -> Array:
            do_CD = jax.lax.dynamic_index_in_dim(do_MCD, at, keepdims=False) * weights_C[:, None].astype(do_MCD.dtype)
            z_CF = jax.lax.dynamic_index_in_dim(z_MCF, at, keepdims=False)
            return dw_DF + jnp.einsum("cd,cf->df", do_CD, z_CF, preferred_element_type=jnp.float32)

        return jax.lax.cond(jnp.any(weights_C > 0), add, lambda dw_DF: dw_DF, dw_DF), None

    return jax.lax.scan(step, dw_DF, jnp.arange(weights_MC.shape[0]))[0]


class _Padded:
    """Arrays as the kernels take them: tokens in one dim, and zeros up to whole registers."""

    def __init__(self, kernels: Kernels, chunks: Chunks):
        self.chunks, self.tokens = chunks.reads_MC.shape
        self.shape = kernels.shape
        self.more_tokens = padded(self.tokens, TOKEN_MULTIPLE) - self.tokens

    def rows(self, x_MCE: Array) -> Array:
        more = padded(x_MCE.shape[-1], kernel.LANES) - x_MCE.shape[-1]
        if more or self.more_tokens:
            x_MCE = jnp.pad(x_MCE, ((0, 0), (0, self.more_tokens), (0, more)))
        return x_MCE.reshape(-1, x_MCE.shape[-1])

    def cut_rows(self, x_NE: Array, width: int) -> Array:
        return x_NE.reshape(self.chunks, -1, x_NE.shape[-1])[:, : self.tokens, :width]

    def masks(self, *masks_MC: Array) -> Array:
        masks_MC2 = jnp.stack(masks_MC, axis=-1)
        if self.more_tokens:
            masks_MC2 = jnp.pad(masks_MC2, ((0, 0), (0, self.more_tokens), (0, 0)))
        return masks_MC2.reshape(-1, len(masks_MC))

    def matrix(self, x_DF: Array) -> Array:
        more = [(0, wanted - size) for size, wanted in zip(x_DF.shape, self.shape, strict=True)]
        return jnp.pad(x_DF, more) if any(after for _, after in more) else x_DF

    def cut_matrix(self, x_DF: Array, like_DF: Array) -> Array:
        return x_DF[: like_DF.shape[0], : like_DF.shape[1]]
