"""Runs the forward and the prefix scan as Pallas TPU kernels: a tile of the state stays on chip while all chunks pass.

XLA's scans (``chunked.py``) read and write the whole state, 100 MB for Qwen3-4B, in main memory for every chunk. Here
the state is cut into tiles. A tile is copied to on-chip memory (VMEM) before the first chunk, meets every chunk there,
and is copied back after the last. Tiles do not depend on each other. ``docs/kernels.md`` has what that saves.

``forward``, in tiles that are rows of the state, from the first chunk to the last; for the tokens t of a chunk:

    o_t  = (W0 + a_t S) z_t
    S   <- keep S + rate sum_t mu_t v_t z_t^T            rate = eta times the gate of the chunk

``prefix``, in tiles that are columns. The backward pass makes the same states again, instead of storing one for each
chunk, and reads them from the other side:

    dz_t = (W0 + a_t S)^T do_t
    S   <- as above

Both are one program (``_recurrence``). They differ in the side from which they see the state: forward it is read with
z, a factor of the update, in the prefix scan with something else. The suffix scan is in ``kernel_suffix.py``.

Letters: T tokens of all chunks, C tokens per chunk, M chunks, D model width, F feed-forward width; X the dim that a
read sums over, Y the other one and the one along which the state is cut (forward X is F and Y is D; in the prefix scan
it is the other way round). A ref ending in ``_hbm`` is an array in main memory, every other one a block on chip.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from intttrain.ttt import kernel_parts as parts
from intttrain.ttt.kernel_parts import LANES, Machine

Array = jax.Array


class RecurrenceBlocks(NamedTuple):
    """Sizes of the pieces in which ``forward`` and ``prefix`` work.

    Attributes:
      tile: width of a tile of the state along Y.
      columns: how much of X is multiplied at once.
    """

    tile: int
    columns: int


class Scalars(NamedTuple):
    """What ``forward`` and ``prefix`` know of each chunk, fp32.

    Attributes:
      keep_M: 1 if the state that came in is kept, 0 if the chunk's last document begins with an empty one.
      rate_M: eta times the gate; multiplies the update.
      reads_M: a of the first token: 1 if it reads the state, 0 if W0 is all that it reads.
      mixed_M: 1 if some tokens of the chunk read the state and some do not.
    """

    keep_M: Array
    rate_M: Array
    reads_M: Array
    mixed_M: Array


# Rows of the scalars, stacked into one array for the scalar memory of a core.
_KEEP, _RATE, _READS, _MIXED = range(4)


class Forward(NamedTuple):
    """What ``forward`` returns.

    Attributes:
      o_TD: what was read, in the dtype of z.
      delta_square_M: fp32 squared Frobenius norm of the update of each chunk.
      state_square_M: the same of the state after it.
      s_end_DF: fp32 state after the last chunk.
    """

    o_TD: Array
    delta_square_M: Array
    state_square_M: Array
    s_end_DF: Array


def forward(
    scalars: Scalars,
    z_TF: Array,
    v_TD: Array,
    masks_T2: Array,
    w0_DF: Array,
    s_in_DF: Array,
    blocks: RecurrenceBlocks,
    machine: Machine,
) -> Forward:
    """Runs the forward scan: every chunk reads the state that earlier chunks left, then writes into it.

    Args:
      scalars: what to do in each chunk.
      z_TF: what the state is read with, and one factor of the update.
      v_TD: targets, the other factor.
      masks_T2: fp32 a and mu: which tokens read the state, and which write into it.
      w0_DF: fp32.
      s_in_DF: fp32 state before the first chunk.
      blocks: divide D and F, which are multiples of 128.
      machine: what to compile for.
    """
    arrays = (z_TF, v_TD, masks_T2, w0_DF, s_in_DF)
    o_TD, delta_square, state_square, s_end_DF = _recurrence(scalars, arrays, blocks, machine, forward=True)
    # Every tile has found the part of its rows, and repeats it over a register (8 x 128).
    delta_M, state_M = (jnp.sum(square[:, :, 0, 0], axis=0) for square in (delta_square, state_square))
    return Forward(o_TD, delta_M, state_M, s_end_DF)


def prefix(
    scalars: Scalars,
    do_TD: Array,
    v_TD: Array,
    z_TF: Array,
    masks_T2: Array,
    w0_DF: Array,
    s_in_DF: Array,
    blocks: RecurrenceBlocks,
    machine: Machine,
) -> Array:
    """Runs the prefix scan of the backward pass; returns dz_TF, the gradient of z through the reads, in the dtype of z.

    Args:
      do_TD: gradient of what was read.
      scalars, v_TD, z_TF, masks_T2, w0_DF, s_in_DF, blocks, machine: as in ``forward``.
    """
    (dz_TF,) = _recurrence(scalars, (do_TD, v_TD, z_TF, masks_T2, w0_DF, s_in_DF), blocks, machine, forward=False)
    return dz_TF


def _recurrence(
    scalars: Scalars, arrays: tuple[Array, ...], blocks: RecurrenceBlocks, machine: Machine, *, forward: bool
) -> Sequence[Array]:
    """Calls the kernel of ``forward`` or ``prefix``; the grid is tiles x chunks x blocks of columns."""
    *moving_TX, own_TY, _, _, s_in_DF = arrays  # moving: z forward, do and v in the prefix scan; own: v, or z
    x_TX = moving_TX[0]
    (tokens, columns), rows, chunks = x_TX.shape, own_TY.shape[1], scalars.keep_M.shape[0]
    chunk_tokens, tile = tokens // chunks, blocks.tile
    grid = rows // tile, chunks, columns // blocks.columns
    moving = pl.BlockSpec((chunk_tokens, blocks.columns), lambda tile, chunk, block, *_: (chunk, block))
    own = pl.BlockSpec((chunk_tokens, tile), lambda tile, chunk, block, *_: (chunk, tile))
    mask = pl.BlockSpec((chunk_tokens, 2), lambda tile, chunk, block, *_: (chunk, 0))
    # One number per tile and chunk fills a whole register, the smallest block that a kernel can write.
    square = pl.BlockSpec((1, 1, 8, LANES), lambda tile, chunk, block, *_: (tile, chunk, 0, 0))
    in_main_memory = pl.BlockSpec(memory_space=pl.ANY)
    squares = jax.ShapeDtypeStruct((grid[0], chunks, 8, LANES), jnp.float32)
    state = (tile, columns) if forward else (columns, tile)
    results: Sequence[Array] = pl.pallas_call(
        _forward_body if forward else _prefix_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[*(moving for _ in moving_TX), own, mask, in_main_memory, in_main_memory],
            out_specs=[own, *([square, square, in_main_memory] if forward else [])],
            scratch_shapes=[
                # What stays on chip, in the order in which the bodies receive it: W0, S, y_sum, masked_y, square_sums.
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM((chunk_tokens, tile), jnp.float32),
                pltpu.VMEM((chunk_tokens, tile), own_TY.dtype),
                *([pltpu.VMEM((8, blocks.columns), jnp.float32)] * 2 if forward else []),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, rows), x_TX.dtype),
            *([squares, squares, jax.ShapeDtypeStruct(s_in_DF.shape, jnp.float32)] if forward else []),
        ],
        compiler_params=parts.compiler_params(machine),
        # x is read anew for every tile.
        cost_estimate=parts.cost(
            4 * tokens * rows * columns, [*arrays, *moving_TX[1:], s_in_DF], reread=(x_TX, grid[0])
        ),
        interpret=machine.interpret,
        name="ttt_forward" if forward else "ttt_prefix",
    )(jnp.stack(scalars), *arrays)
    return results


class _Refs(NamedTuple):
    """The refs of a recurrence under one set of names.

    The update of a chunk is the product of one factor along X and one along Y: z and v forward, v and z in the prefix
    scan. ``squares``, ``square_sums`` and ``s_end_hbm`` are there forward only.

    Attributes:
      scalars: (4, M), rows as in ``Scalars``.
      x: block (C, columns) of what the state is read with: z, or do.
      factor_x, factor_y: blocks (C, columns) and (C, tile) of the factors of the update.
      masks: block (C, 2): a and mu.
      w0_hbm, s_in_hbm, s_end_hbm: W0, and the states before the first chunk and after the last.
      y: block (C, tile) of what was read: o, or dz.
      squares: blocks (8, 128) for the squared norms of the update and of the state.
      w0, s: fp32 tiles of W0 and of the state.
      y_sum: fp32 (C, tile), the sum over the blocks of columns so far.
      masked_y: (C, tile), ``factor_y`` with zeros for tokens that do not write.
      square_sums: fp32 (8, columns), sums of squares so far.
      semaphores: of the copies from and to main memory.
    """

    scalars: Any
    x: Any
    factor_x: Any
    factor_y: Any
    masks: Any
    w0_hbm: Any
    s_in_hbm: Any
    y: Any
    squares: tuple[Any, ...]
    s_end_hbm: Any
    w0: Any
    s: Any
    y_sum: Any
    masked_y: Any
    square_sums: tuple[Any, ...]
    semaphores: Any


def _forward_body(scalars: Any, z: Any, v: Any, masks: Any, w0_hbm: Any, s_in_hbm: Any, *refs: Any) -> None:
    o, delta_square, state_square, s_end_hbm, w0, s, o_sum, masked_v, delta_sum, state_sum, semaphores = refs
    squares, sums = (delta_square, state_square), (delta_sum, state_sum)
    arguments = (scalars, z, z, v, masks, w0_hbm, s_in_hbm)
    _recurrence_body(_Refs(*arguments, o, squares, s_end_hbm, w0, s, o_sum, masked_v, sums, semaphores), forward=True)


def _prefix_body(scalars: Any, do: Any, v: Any, z: Any, masks: Any, w0_hbm: Any, s_in_hbm: Any, *refs: Any) -> None:
    dz, w0, s, dz_sum, masked_z, semaphores = refs
    arguments = (scalars, do, v, z, masks, w0_hbm, s_in_hbm)
    _recurrence_body(_Refs(*arguments, dz, (), None, w0, s, dz_sum, masked_z, (), semaphores), forward=False)


def _recurrence_body(refs: _Refs, *, forward: bool) -> None:
    """Does one step of the grid: one block of columns of one chunk for one tile.

    The last dim of the grid runs fastest, so a tile stays in on-chip memory from its first step to its last.
    """
    tile, chunk, block = (pl.program_id(dim) for dim in range(3))
    last_chunk, last_block = (pl.num_programs(dim) - 1 for dim in (1, 2))

    @parts.once((chunk == 0) & (block == 0))
    def load() -> None:
        # Both copies run at the same time.
        w0 = parts.tile_copy(refs.w0_hbm, refs.w0, refs.semaphores.at[0], forward, tile)
        state = parts.tile_copy(refs.s_in_hbm, refs.s, refs.semaphores.at[1], forward, tile)
        w0.start()
        state.start()
        w0.wait()
        state.wait()

    @parts.once(block == 0)
    def begin_chunk() -> None:
        # A token that does not write gets a zero factor, so its part of the update is zero.
        refs.masked_y[...] = (refs.factor_y[...].astype(jnp.float32) * refs.masks[:, 1:]).astype(refs.masked_y.dtype)
        for ref in (refs.y_sum, *refs.square_sums):
            ref[...] = jnp.zeros_like(ref)

    # Whole chunks take one product with W0 + S, mixed ones two products.
    one, two = (functools.partial(_read_and_write, refs, chunk, block, forward, mixed) for mixed in (False, True))
    parts.either(refs.scalars[_MIXED, chunk] == 0, one, two)

    @parts.once(block == last_block)
    def end_chunk() -> None:
        refs.y[...] = refs.y_sum[...].astype(refs.y.dtype)
        for ref, sums in zip(refs.squares, refs.square_sums, strict=True):
            ref[...] = jnp.full_like(ref, jnp.sum(sums[...]))

    @parts.once((chunk == last_chunk) & (block == last_block))
    def store() -> None:
        if forward:
            parts.run_copy(parts.tile_copy(refs.s_end_hbm, refs.s, refs.semaphores.at[0], forward, tile, back=True))


def _read_and_write(refs: _Refs, chunk: Any, block: Any, forward: bool, mixed: bool) -> None:
    """Reads a chunk with one block of columns of the tile, then writes the chunk's update into that block.

    Reading and writing stand in one function, called once for whole and once for mixed chunks, because the compiler's
    static profile counts nothing under a condition: so one branch can be profiled as a whole (``docs/decisions/0009``).
    """
    width, dtype = refs.x.shape[1], refs.x.dtype
    part = pl.ds(pl.multiple_of(block * width, LANES), width)
    here = (slice(None), part) if forward else (part, slice(None))
    s, w0 = refs.s[here], refs.w0[here]

    def times(matrix: Array) -> Array:
        return parts.dot(refs.x[...], matrix.astype(dtype), 1, 1 if forward else 0)

    if mixed:  # a differs between the tokens, so W0 and S are two products
        refs.y_sum[...] += times(w0) + refs.masks[:, :1] * times(s)
    else:  # one matrix, summed in fp32 and rounded once
        refs.y_sum[...] += times(w0 + refs.scalars[_READS, chunk] * s)
    factors = (refs.masked_y, refs.factor_x) if forward else (refs.factor_x, refs.masked_y)  # v and z, in this order
    delta = refs.scalars[_RATE, chunk] * parts.dot(factors[0][...], factors[1][...], 0, 0)
    s_next = refs.scalars[_KEEP, chunk] * s + delta
    refs.s[here] = s_next
    # Rows are added in groups of 8, the height of a register: whole registers are added to each other. The sum over the
    # values inside one waits for the end of the chunk, so a norm costs the vector unit little in this step.
    for sums, x in zip(refs.square_sums, (delta, s_next), strict=False):
        sums[...] += jnp.sum(jnp.square(x).reshape(-1, 8, width), axis=0)
