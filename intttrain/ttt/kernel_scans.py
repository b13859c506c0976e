"""Runs the scans of ``chunked.py`` by the TPU kernels: the same arguments, the same results.

The kernels take tokens in one dim and whole registers, so chunks are padded on the way in and cut on the way out
(``_Padded``). What they leave to XLA is done here: the gradients of gates and eta, and the gradient of W0 through those
tokens of mixed chunks that do not read the state.

Letters: C tokens per chunk, M chunks, T = M C tokens, D model width, F feed-forward width; m chunks and t tokens of a
group; E is D or F.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from intttrain.layout.scan import scan
from intttrain.ttt.chunked import MIXED_SCOPE, Chunks, Forward, Gradients, empty_state
from intttrain.ttt.kernel_blocks import TOKEN_MULTIPLE, Kernels, padded
from intttrain.ttt.kernel_parts import LANES
from intttrain.ttt.kernel_recurrence import Scalars, forward, prefix
from intttrain.ttt.kernel_suffix import stack_scalars, suffix

Array = jax.Array

# Chunks of the suffix scan in one launch. Each core keeps its fp32 part of dv for all of them in main memory, so fewer
# chunks need less memory; but G is copied to the chip and back once for each group.
GROUP_CHUNKS = 32


def forward_scan(kernels: Kernels, w_DF: Array, eta: Array, s_in_DF: Array, chunks: Chunks) -> tuple[Array, Forward]:
    """Returns the last state and what was read, as ``chunked.forward_scan`` does, without row scales."""
    wide = _Padded(kernels, chunks)
    found = forward(
        _scalars(eta, chunks), wide.rows(chunks.z_MCF), wide.rows(chunks.v_MCD),
        wide.masks(chunks.reads_MC, chunks.writes_MC), wide.matrix(w_DF), wide.matrix(s_in_DF),
        kernels.forward, kernels.machine,
    )  # fmt: skip
    delta_norm_M, state_norm_M = jnp.sqrt(found.delta_square_M), jnp.sqrt(found.state_square_M)
    o_MCD = wide.cut_rows(found.o_TD, w_DF.shape[0])
    return wide.cut_matrix(found.s_end_DF, s_in_DF), Forward(o_MCD, None, delta_norm_M, state_norm_M)


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
    """Returns the gradients of ``forward_scan``, that of W0 first, as ``chunked.backward_scans`` does.

    The suffix scan runs in groups of chunks, the last group first. It adds to the gradients of z and W0, so these are
    carried from group to group with G.
    """
    wide = _Padded(kernels, chunks)
    z_TF, v_TD, do_TD = (wide.rows(x) for x in (chunks.z_MCF, chunks.v_MCD, do_MCD))
    masks_T2 = wide.masks(chunks.reads_MC, chunks.writes_MC)
    w_DF, s_in_DF = wide.matrix(w_DF), wide.matrix(s_in_DF)
    scalars = _scalars(eta, chunks)
    dz_TF = prefix(scalars, do_TD, v_TD, z_TF, masks_T2, w_DF, s_in_DF, kernels.prefix, kernels.machine)

    # The suffix scan, group by group from the last one.
    g_start_DF = empty_state(*kernels.shape) if g_end_DF is None else wide.matrix(g_end_DF)
    groups = _groups(chunks.reads_MC.shape[0])
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (chunks, do_MCD))
    tokens = dz_TF.shape[0] // groups

    def group_step(carried: tuple[Array, Array, Array], inputs: tuple[Any, Array]) -> tuple[tuple[Array, ...], Any]:
        """Runs one group, whose part of the gradient of z is changed in its place."""
        g_DF, dw_DF, dz_TF = carried
        (group, do_mCD), start = inputs
        dz_tF = jax.lax.dynamic_slice_in_dim(dz_TF, start, tokens) if groups > 1 else dz_TF
        g_DF, dw_DF, dz_tF, *gradients = _suffix_of_group(kernels, eta, group, do_mCD, g_DF, dw_DF, dz_tF)
        dz_TF = jax.lax.dynamic_update_slice_in_dim(dz_TF, dz_tF, start, 0) if groups > 1 else dz_tF
        return (g_DF, dw_DF, dz_TF), gradients

    carried = (g_start_DF, wide.matrix(dw_DF), dz_TF)
    starts = tokens * jnp.arange(groups)
    (g_DF, dw_wide_DF, dz_TF), found = scan(group_step, carried, (split, starts), groups, reverse=True)
    dv_MCD, inner_M = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    dz_MCF = wide.cut_rows(dz_TF, chunks.z_MCF.shape[-1])
    ds_in_DF = wide.cut_matrix(g_DF, dw_DF)
    # Whatever G held was handed over or is still in it. All of that came through reads, so it is the gradient of W0 as
    # well, but for the gradient of the last state, with which G began.
    dw_DF = wide.cut_matrix(dw_wide_DF, dw_DF) + (ds_in_DF if g_end_DF is None else ds_in_DF - g_end_DF)
    dw_DF = _add_unread(dw_DF, 1.0 - _handing_over(chunks).joins_MC, do_MCD, chunks.z_MCF)
    return dw_DF, Gradients(dz_MCF, dv_MCD, eta * inner_M, jnp.sum(chunks.gate_M * inner_M), ds_in_DF)


def _groups(chunks: int) -> int:
    """Returns the number of equal groups, of at most ``GROUP_CHUNKS``, into which a row of so many chunks is cut.

    It is 1 where the groups would be small, as for a prime number of chunks: copies of G would cost more than dv saves.
    """
    fits = [n for n in range(1, chunks + 1) if chunks % n == 0 and chunks // n <= GROUP_CHUNKS]
    return fits[0] if GROUP_CHUNKS // 4 * fits[0] <= chunks else 1


def _suffix_of_group(
    kernels: Kernels, eta: Array, chunks: Chunks, do_MCD: Array, g_DF: Array, dw_DF: Array, dz_TF: Array
) -> tuple[Array, ...]:
    """Runs the suffix scan of a group; returns G, the gradients of W0, z and v, and <V^T Z, G> of each chunk.

    The last is the gradient of rate = eta x gate. It needs no product, for <V^T Z, G> is the sum of <v_t, G z_t>.
    """
    wide, marks, rate_M = _Padded(kernels, chunks), _handing_over(chunks), eta * chunks.gate_M
    found = suffix(
        stack_scalars(rate_M, marks.before_M, marks.after_M),
        wide.rows(chunks.z_MCF), wide.rows(chunks.v_MCD), wide.rows(do_MCD), dz_TF,
        wide.masks(marks.joins_MC, chunks.writes_MC), g_DF, dw_DF, kernels.suffix, kernels.cores, kernels.machine,
    )  # fmt: skip
    # The rate is not in this product yet: the gradient of a shut gate, whose rate is 0, is not 0.
    gz_MCD = chunks.writes_MC[..., None] * wide.cut_rows(found.dv_TD, do_MCD.shape[-1])
    inner_M = jnp.sum(chunks.v_MCD.astype(jnp.float32) * gz_MCD, axis=(1, 2))
    dv_MCD = (rate_M[:, None, None] * gz_MCD).astype(chunks.v_MCD.dtype)
    return found.g_DF, found.dw_DF, found.dz_TF, dv_MCD, inner_M


def _scalars(eta: Array, chunks: Chunks) -> Scalars:
    first_M = chunks.reads_MC[:, 0]
    mixed_M = jnp.any(chunks.reads_MC != first_M[:, None], axis=1).astype(jnp.float32)
    return Scalars(chunks.keep_M, eta * chunks.gate_M, first_M, mixed_M)


class _HandingOver(NamedTuple):
    """Which reads G collects, and where it is handed over to the gradient of W0 because a document ends.

    Attributes:
      joins_MC: 1 for tokens whose ``do_t z_t^T`` is added to G.
      before_M, after_M: 1 if G is handed over before these are added, or with them, as in ``stack_scalars``.
    """

    joins_MC: Array
    before_M: Array
    after_M: Array


def _handing_over(chunks: Chunks) -> _HandingOver:
    """Returns the marks of each chunk.

    In a chunk where no token reads S, all of them read W0 alone, so their products join G and leave with it: W0 gets
    them without a product of its own. In a mixed chunk only those that read S join; ``_add_unread`` does the others.
    """
    unread_M = (jnp.max(chunks.reads_MC, axis=1) == 0).astype(jnp.float32)
    after_M = (1.0 - chunks.keep_M) * unread_M
    before_M = (1.0 - chunks.keep_M) * (1.0 - unread_M)
    return _HandingOver(jnp.maximum(chunks.reads_MC, after_M[:, None]), before_M, after_M)


def _add_unread(dw_DF: Array, weights_MC: Array, do_MCD: Array, z_MCF: Array) -> Array:
    """Adds ``weight_t do_t z_t^T`` to the gradient of W0, for tokens that read W0 but did not join G.

    Most chunks have none and are passed over under a condition.
    """

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
    """Brings arrays into the shape that the kernels take, and back: tokens in one dim, and zeros up to whole registers.

    Zeros change nothing: a token of zeros writes and reads zeros, and so does a row or column of zeros of W0.
    """

    def __init__(self, kernels: Kernels, chunks: Chunks):
        self.chunks, self.tokens = chunks.reads_MC.shape
        self.shape = kernels.shape
        self.more_tokens = padded(self.tokens, TOKEN_MULTIPLE) - self.tokens

    def rows(self, x_MCE: Array) -> Array:
        """Returns (T, E), padded in C and E."""
        more = padded(x_MCE.shape[-1], LANES) - x_MCE.shape[-1]
        if more or self.more_tokens:
            x_MCE = jnp.pad(x_MCE, ((0, 0), (0, self.more_tokens), (0, more)))
        return x_MCE.reshape(-1, x_MCE.shape[-1])

    def cut_rows(self, x_TE: Array, width: int) -> Array:
        """Returns (M, C, width) of an array that lies as ``rows`` makes it: without the padding of C and E."""
        return x_TE.reshape(self.chunks, -1, x_TE.shape[-1])[:, : self.tokens, :width]

    def masks(self, *masks_MC: Array) -> Array:
        """Returns the masks side by side, (T, 2), padded in C."""
        masks_MC2 = jnp.stack(masks_MC, axis=-1)
        if self.more_tokens:
            masks_MC2 = jnp.pad(masks_MC2, ((0, 0), (0, self.more_tokens), (0, 0)))
        return masks_MC2.reshape(-1, len(masks_MC))

    def matrix(self, x_DF: Array) -> Array:
        """Returns a matrix padded in D and F."""
        more = [(0, wanted - size) for size, wanted in zip(x_DF.shape, self.shape, strict=True)]
        return jnp.pad(x_DF, more) if any(after for _, after in more) else x_DF

    def cut_matrix(self, x_DF: Array, like_DF: Array) -> Array:
        """Returns what ``matrix`` made in the shape of ``like_DF``."""
        return x_DF[: like_DF.shape[0], : like_DF.shape[1]]
