"""One Pallas TPU kernel for every scan of the method: read with the state, then write into it, chunk after chunk.

    y_t  = (W + a_t S) x_t              for the tokens of a chunk
    S   <- keep S + gain sum_t p_t w_t^T

with the rows of S in tiles that stay in on-chip memory while all chunks pass by. The forward scan reads and writes
with z (x = w = z, p = v). The prefix scan of the backward pass is the same for the transposed state: it reads with the
incoming gradient and writes ``z v^T`` (x = do, w = v, p = z). The suffix scan goes through the chunks from the last to the
first, twice: for the gradient of v (x = w = z, p = do) and for that of z (x = v, w = do, p = z).

Letters: N tokens, C tokens per chunk, M chunks, P rows of the state (D, or F where it is transposed), E its columns; lower
case is a block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

LANES = 128
_KEEP, _GAIN, _READS, _MIXED = range(4)  # rows of the scalars


class Blocks(NamedTuple):
    """Rows of the state in a tile, and columns that are multiplied at once."""

    rows: int
    columns: int


class Recurrence(NamedTuple):
    """What the kernel returns.

    Attributes:
      y_NP: what was read, in the dtype of the inputs.
      delta_square_M, state_square_M: squared Frobenius norms of what each chunk wrote and of the state after it.
      s_end_PE: fp32 state after the last chunk.
    """

    y_NP: Array
    delta_square_M: Array
    state_square_M: Array
    s_end_PE: Array


class Scalars(NamedTuple):
    """Of each chunk: whether the state is kept, what the update is multiplied by, whether its first token reads the
    state, and whether others do not do as the first."""

    keep_M: Array
    gain_M: Array
    reads_M: Array
    mixed_M: Array


def run(
    scalars: Scalars,
    x_NE: Array,
    w_NE: Array | None,
    p_NP: Array,
    reads_N1: Array,
    base_PE: Array,
    s_in_PE: Array,
    blocks: Blocks,
    *,
    reverse: bool = False,
    static_path: bool = False,
    interpret: Any = False,
) -> Recurrence:
    """Runs the recurrence over all chunks.

    Args:
      scalars: fp32.
      x_NE: read with.
      w_NE: written with; ``None`` for the same.
      p_NP: written, masked.
      reads_N1: fp32, which tokens read the state.
      base_PE: W, fp32.
      s_in_PE: the state before the first chunk, fp32.
      blocks: divide P and E.
      reverse: from the last chunk to the first.
      static_path: leaves out what mixed chunks need, for static profiles.
      interpret: as of ``pl.pallas_call``.
    """
    tokens, columns = x_NE.shape
    rows, chunks = p_NP.shape[1], scalars.keep_M.shape[0]
    chunk_tokens = tokens // chunks
    grid = rows // blocks.rows, chunks, columns // blocks.columns
    at = (lambda m: chunks - 1 - m) if reverse else (lambda m: m)
    moving = pl.BlockSpec((chunk_tokens, blocks.columns), lambda p, m, e, *_: (at(m), e))
    tile = pl.BlockSpec((chunk_tokens, blocks.rows), lambda p, m, e, *_: (at(m), p))
    once = {"pipeline_mode": pl.Buffered(1)} if not interpret else {}
    resident = pl.BlockSpec((blocks.rows, columns), lambda p, m, e, *_: (p, 0), **once)
    mask = pl.BlockSpec((chunk_tokens, 1), lambda p, m, e, *_: (at(m), 0))
    square = pl.BlockSpec((1, 1, 8, LANES), lambda p, m, e, *_: (p, at(m), 0, 0))
    squares = jax.ShapeDtypeStruct((grid[0], chunks, 8, LANES), jnp.float32)
    body = functools.partial(_body, shared=w_NE is None, reverse=reverse, chunks=chunks, static_path=static_path)
    y_NP, delta, state, s_end_PE = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[moving, *([] if w_NE is None else [moving]), tile, mask, resident, resident],
            out_specs=[tile, square, square, resident],
            scratch_shapes=[
                pltpu.VMEM((chunk_tokens, blocks.rows), jnp.float32),
                pltpu.VMEM((8, blocks.columns), jnp.float32),
                pltpu.VMEM((8, blocks.columns), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, rows), x_NE.dtype), squares, squares,
            jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=60 * 2**20
        ),
        interpret=interpret,
        name="ttt_recurrence",
    )(jnp.stack(scalars), x_NE, *([] if w_NE is None else [w_NE]), p_NP, reads_N1, base_PE, s_in_PE)  # fmt: skip
    return Recurrence(y_NP, jnp.sum(delta[:, :, 0, 0], axis=0), jnp.sum(state[:, :, 0, 0], axis=0), s_end_PE)


def _body(scalars_ref: Any, *refs: Any, shared: bool, reverse: bool, chunks: int, static_path: bool) -> None:
    x_ref, *refs = refs
    w_ref, refs = (x_ref, refs) if shared else (refs[0], refs[1:])
    p_ref, reads_ref, base_ref, s_in_ref, y_ref, delta_ref, state_ref, s_ref, sum_ref, delta_sum_ref, state_sum_ref = refs
    step, block = pl.program_id(1), pl.program_id(2)
    chunk = chunks - 1 - step if reverse else step
    width = x_ref.shape[1]
    here = pl.ds(pl.multiple_of(block * width, LANES), width)
    dtype = x_ref.dtype

    @pl.when(step == 0)
    def _() -> None:
        s_ref[:, here] = s_in_ref[:, here]

    @pl.when(block == 0)
    def _() -> None:
        for ref in (sum_ref, delta_sum_ref, state_sum_ref):
            ref[...] = jnp.zeros_like(ref)

    s_pe, base_pe = s_ref[:, here], base_ref[:, here]

    def one_matrix() -> None:
        matrix_pe = (base_pe + scalars_ref[_READS, chunk] * s_pe).astype(dtype)
        sum_ref[...] += _dot(x_ref[...], matrix_pe, 1, 1)

    def two_matrices() -> None:
        through_s = reads_ref[...] * _dot(x_ref[...], s_pe.astype(dtype), 1, 1)
        sum_ref[...] += _dot(x_ref[...], base_pe.astype(dtype), 1, 1) + through_s

    if static_path:
        one_matrix()
    else:
        pl.when(scalars_ref[_MIXED, chunk] == 0)(one_matrix)
        pl.when(scalars_ref[_MIXED, chunk] != 0)(two_matrices)

    delta_pe = scalars_ref[_GAIN, chunk] * _dot(p_ref[...], w_ref[...], 0, 0)
    s_next_pe = scalars_ref[_KEEP, chunk] * s_pe + delta_pe
    s_ref[:, here] = s_next_pe
    # Rows in groups of 8 are added first: that is all the vector unit has to do for a norm in this step.
    delta_sum_ref[...] += jnp.sum(jnp.square(delta_pe).reshape(-1, 8, width), axis=0)
    state_sum_ref[...] += jnp.sum(jnp.square(s_next_pe).reshape(-1, 8, width), axis=0)

    @pl.when(block == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = sum_ref[...].astype(dtype)
        delta_ref[...] = jnp.full_like(delta_ref, jnp.sum(delta_sum_ref[...]))
        state_ref[...] = jnp.full_like(state_ref, jnp.sum(state_sum_ref[...]))


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
