"""Pallas TPU kernels of the three scans: a part of the state stays in on-chip memory while all chunks pass by.

``recurrence`` reads with the state, then writes into it, chunk after chunk:

    y_t  = (W + a_t S) x_t              for the tokens of a chunk
    S   <- keep S + gain sum_t mu_t v_t z_t^T

Forward x = z, and a tile holds rows of S, whole along F. The prefix scan of the backward pass re-creates the same S in
tiles that are whole along D, and reads it from the other side: y_t = do_t (W + a_t S).

``suffix`` goes from the last chunk to the first, in tiles that are whole along D:

    dv_t  = z_t G^T,   dz_t += gain mu_t v_t G,   G <- keep G + sum_t a_t do_t z_t^T

Reads need G as it was before the chunk, so they read a copy in the dtype of the inputs while G moves. A tile knows only
its part of dv: what the tiles of a core find is summed from one launch to the next, and the sums of the cores by XLA.
Where a document begins, G holds what its reads want of W0, and is added to that gradient in main memory.

Letters: N tokens, C tokens per chunk, M chunks, P the dim along which the state is cut (D or F), E the other one; lower
case is a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

LANES = 128
_KEEP, _GAIN, _READS, _MIXED = range(4)  # rows of ``Scalars``
# Of ``suffix``: by what v G is multiplied, and whether G is handed over before and after the reads of a chunk join it.
_FACTOR, _BEFORE, _AFTER = range(3)


class RecurrenceBlocks(NamedTuple):
    """Width of a tile of the state along P, and of what is multiplied at once along E."""

    tile: int
    columns: int


class SuffixBlocks(NamedTuple):
    """Width of a tile of G along F, and tokens that are multiplied at once."""

    tile: int
    tokens: int


class Scalars(NamedTuple):
    """Of each chunk, fp32.

    Attributes:
      keep_M: whether the state is kept.
      gain_M: what the update is multiplied by.
      reads_M: whether the first token reads the state.
      mixed_M: whether others do not do as the first.
    """

    keep_M: Array
    gain_M: Array
    reads_M: Array
    mixed_M: Array


class Recurrence(NamedTuple):
    """What ``recurrence`` returns.

    Attributes:
      y_NP: what was read, in the dtype of the inputs.
      squares_M: squared Frobenius norms of what each chunk wrote, and of the state after it; forward, else None.
      s_end: fp32 state after the last chunk; forward, else None.
    """

    y_NP: Array
    squares_M: tuple[Array, Array] | None
    s_end: Array | None


class Machine(NamedTuple):
    """What a kernel is compiled for: on-chip memory that it may use, and how Pallas interprets it without a TPU."""

    vmem_bytes: int
    interpret: Any = False


def recurrence(
    scalars: Scalars,
    x_NE: Array,
    w_NE: Array | None,
    p_NP: Array,
    masks_N2: Array,
    base_DF: Array,
    s_in_DF: Array,
    blocks: RecurrenceBlocks,
    machine: Machine,
) -> Recurrence:
    """Runs the forward scan, or with ``w_NE`` the prefix scan of the backward pass.

    Args:
      scalars: of the chunks.
      x_NE: read with: z, or the incoming gradient.
      w_NE: v, which is written with ``p_NP`` = z; ``None`` forward, where ``p_NP`` = v is written with x.
      p_NP: multiplied by the second mask.
      masks_N2: fp32, which tokens read the state and which write into it.
      base_DF, s_in_DF: W0, and the state before the first chunk, fp32.
      blocks: divide P and E, which are multiples of 128.
    """
    forward = w_NE is None
    (tokens, columns), rows, chunks = x_NE.shape, p_NP.shape[1], scalars.keep_M.shape[0]
    chunk_tokens, tile = tokens // chunks, blocks.tile
    grid = rows // tile, chunks, columns // blocks.columns
    moving = pl.BlockSpec((chunk_tokens, blocks.columns), lambda p, m, e, *_: (m, e))
    own = pl.BlockSpec((chunk_tokens, tile), lambda p, m, e, *_: (m, p))
    mask = pl.BlockSpec((chunk_tokens, 2), lambda p, m, e, *_: (m, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    square = pl.BlockSpec((1, 1, 8, LANES), lambda p, m, e, *_: (p, m, 0, 0))
    squares = jax.ShapeDtypeStruct((grid[0], chunks, 8, LANES), jnp.float32)
    state = (tile, columns) if forward else (columns, tile)
    others = [] if w_NE is None else [w_NE]
    moved = [x_NE, *others, p_NP, masks_N2, base_DF, s_in_DF]
    y_NP, *found = pl.pallas_call(
        _forward_body if forward else _prefix_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[moving, *(moving for _ in others), own, mask, anywhere, anywhere],
            out_specs=[own, *([square, square, anywhere] if forward else [])],
            scratch_shapes=[
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM((chunk_tokens, tile), jnp.float32),
                pltpu.VMEM((chunk_tokens, tile), p_NP.dtype),
                *([pltpu.VMEM((8, blocks.columns), jnp.float32)] * 2 if forward else []),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, rows), x_NE.dtype),
            *([squares, squares, jax.ShapeDtypeStruct(s_in_DF.shape, jnp.float32)] if forward else []),
        ],
        compiler_params=_compiler_params(machine),
        cost_estimate=_cost(4 * tokens * rows * columns, [*moved, *others, s_in_DF], reread=(x_NE, grid[0])),
        interpret=machine.interpret,
        name="ttt_forward" if forward else "ttt_prefix",
    )(jnp.stack(scalars), *moved)
    if not forward:
        return Recurrence(y_NP, None, None)
    delta, after, s_end_DF = found
    return Recurrence(y_NP, (jnp.sum(delta[:, :, 0, 0], axis=0), jnp.sum(after[:, :, 0, 0], axis=0)), s_end_DF)


class _Refs(NamedTuple):
    """Of a recurrence: blocks of the arguments, arguments in main memory, blocks of the results, on-chip memory.

    ``squares`` and their sums, and ``s_end_hbm``, are there forward only.
    """

    scalars: Any
    x: Any
    w: Any
    p: Any
    masks: Any
    base_hbm: Any
    s_in_hbm: Any
    y: Any
    squares: tuple[Any, ...]
    s_end_hbm: Any
    base: Any
    s: Any
    y_sum: Any
    masked: Any
    square_sums: tuple[Any, ...]
    semaphores: Any


def _forward_body(scalars: Any, z: Any, v: Any, masks: Any, base_hbm: Any, s_in_hbm: Any, *refs: Any) -> None:
    o, delta, after, s_end_hbm, base, s, o_sum, masked, delta_sum, after_sum, semaphores = refs
    squares, sums = (delta, after), (delta_sum, after_sum)
    arguments = (scalars, z, z, v, masks, base_hbm, s_in_hbm)
    _recurrence_body(_Refs(*arguments, o, squares, s_end_hbm, base, s, o_sum, masked, sums, semaphores), forward=True)


def _prefix_body(scalars: Any, do: Any, v: Any, z: Any, masks: Any, base_hbm: Any, s_in_hbm: Any, *refs: Any) -> None:
    dz, base, s, dz_sum, masked, semaphores = refs
    arguments = (scalars, do, v, z, masks, base_hbm, s_in_hbm)
    _recurrence_body(_Refs(*arguments, dz, (), None, base, s, dz_sum, masked, (), semaphores), forward=False)


def _recurrence_body(refs: _Refs, *, forward: bool) -> None:
    tile, chunk, block = (pl.program_id(dim) for dim in range(3))
    last_chunk, last_block = (pl.num_programs(dim) - 1 for dim in (1, 2))

    @once((chunk == 0) & (block == 0))
    def load() -> None:
        base = _tile_copy(refs.base_hbm, refs.base, refs.semaphores.at[0], forward, tile)
        state = _tile_copy(refs.s_in_hbm, refs.s, refs.semaphores.at[1], forward, tile)
        base.start()
        state.start()
        base.wait()
        state.wait()

    @once(block == 0)
    def begin_chunk() -> None:
        refs.masked[...] = (refs.p[...].astype(jnp.float32) * refs.masks[:, 1:]).astype(refs.masked.dtype)
        for ref in (refs.y_sum, *refs.square_sums):
            ref[...] = jnp.zeros_like(ref)

    one, two = (functools.partial(_read_and_write, refs, chunk, block, forward, mixed) for mixed in (False, True))
    either(refs.scalars[_MIXED, chunk] == 0, one, two)

    @once(block == last_block)
    def end_chunk() -> None:
        refs.y[...] = refs.y_sum[...].astype(refs.y.dtype)
        for ref, sums in zip(refs.squares, refs.square_sums, strict=True):
            ref[...] = jnp.full_like(ref, jnp.sum(sums[...]))

    @once((chunk == last_chunk) & (block == last_block))
    def store() -> None:
        if forward:
            _copy(_tile_copy(refs.s_end_hbm, refs.s, refs.semaphores.at[0], forward, tile, back=True))


def _read_and_write(refs: _Refs, chunk: Any, block: Any, forward: bool, mixed: bool) -> None:
    """Reads a chunk with a part of the tile, and writes into that part."""
    width, dtype = refs.x.shape[1], refs.x.dtype
    part = pl.ds(pl.multiple_of(block * width, LANES), width)
    here = (slice(None), part) if forward else (part, slice(None))
    s, base = refs.s[here], refs.base[here]

    def times(matrix: Array) -> Array:
        return _dot(refs.x[...], matrix.astype(dtype), 1, 1 if forward else 0)

    if mixed:
        refs.y_sum[...] += times(base) + refs.masks[:, :1] * times(s)
    else:
        refs.y_sum[...] += times(base + refs.scalars[_READS, chunk] * s)
    pair = (refs.masked, refs.w) if forward else (refs.w, refs.masked)
    delta = refs.scalars[_GAIN, chunk] * _dot(pair[0][...], pair[1][...], 0, 0)
    s_next = refs.scalars[_KEEP, chunk] * s + delta
    refs.s[here] = s_next
    # Rows in groups of 8 are added first: that is all the vector unit has to do for a norm in this step.
    for sums, x in zip(refs.square_sums, (delta, s_next), strict=False):
        sums[...] += jnp.sum(jnp.square(x).reshape(-1, 8, width), axis=0)


class Suffix(NamedTuple):
    """What ``suffix`` returns.

    Attributes:
      dz_NF: in the dtype of the inputs.
      dv_ND: fp32 z_t G^T, neither masked nor multiplied.
      g_DF, dw_DF: fp32 gradient of the state before the first chunk, and of W0 as far as G does not hold it.
    """

    dz_NF: Array
    dv_ND: Array
    g_DF: Array
    dw_DF: Array


def suffix(
    scalars: Array,
    z_NF: Array,
    v_ND: Array,
    do_ND: Array,
    dz_NF: Array,
    masks_N2: Array,
    g_end_DF: Array,
    dw_DF: Array,
    blocks: SuffixBlocks,
    cores: int,
    machine: Machine,
) -> Suffix:
    """Runs the suffix scan of the backward pass.

    Args:
      scalars: fp32 (3, M): by what v G is multiplied; whether G is added to the gradient of W0 and begins anew before,
        and after, the reads of a chunk are added to it. At most one of the two.
      z_NF, v_ND, do_ND: as they are.
      dz_NF: what the gradient of z is added to.
      masks_N2: fp32, which tokens of ``do_ND`` join G, and which of ``v_ND`` count.
      g_end_DF: fp32 gradient of the state after the last chunk.
      dw_DF: fp32, what the gradient of W0 is added to.
      blocks: divide F and C; tiles are a multiple of ``cores``.
      cores: TensorCores of a device, which work on a tile each.
    """
    dv_cND: Array | None = None
    for first in range(0, z_NF.shape[1] // blocks.tile, cores):
        dz_NF, dv_cND, g_end_DF, dw_DF = _suffix_tiles(
            scalars, (z_NF, v_ND, do_ND, masks_N2), dz_NF, dv_cND, g_end_DF, dw_DF, first, blocks, cores, machine
        )
    assert dv_cND is not None
    # Added one by one: XLA makes a reduction of ``jnp.sum``, which costs eight times as much.
    return Suffix(dz_NF, functools.reduce(jnp.add, [dv_cND[core] for core in range(cores)]), g_end_DF, dw_DF)


def _suffix_tiles(
    scalars: Array, rows: tuple[Array, ...], dz_NF: Array, dv_cND: Array | None, g_DF: Array, dw_DF: Array,
    first: int, blocks: SuffixBlocks, cores: int, machine: Machine,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Runs as many tiles as there are cores, from ``first``; the results take the place of the arguments."""
    z_NF, v_ND, do_ND, masks_N2 = rows
    (tokens, d_ff), width, chunks = z_NF.shape, v_ND.shape[1], scalars.shape[1]
    steps = tokens // chunks // blocks.tokens
    grid = cores, chunks, steps
    at = lambda m, t: (chunks - 1 - m) * steps + t  # noqa: E731
    own = pl.BlockSpec((blocks.tokens, blocks.tile), lambda p, m, t, *_: (at(m, t), first + p))
    whole = pl.BlockSpec((blocks.tokens, width), lambda p, m, t, *_: (at(m, t), 0))
    mask = pl.BlockSpec((blocks.tokens, 2), lambda p, m, t, *_: (at(m, t), 0))
    sums = pl.BlockSpec((1, blocks.tokens, width), lambda p, m, t, *_: (p, at(m, t), 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    dv_shape = jax.ShapeDtypeStruct((cores, tokens, width), jnp.float32)
    before = [] if dv_cND is None else [dv_cND]
    moved = [z_NF, v_ND, do_ND, masks_N2, dz_NF, g_DF, dw_DF, *before]
    part = cores * blocks.tile / d_ff
    return pl.pallas_call(
        functools.partial(_suffix_body, first=first, adds=bool(before)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[own, whole, whole, mask, own, anywhere, anywhere, *(sums for _ in before)],
            out_specs=[own, sums, anywhere, anywhere],
            scratch_shapes=[
                pltpu.VMEM((width, blocks.tile), jnp.float32),
                pltpu.VMEM((width, blocks.tile), z_NF.dtype),
                pltpu.VMEM((HANDED_ROWS, blocks.tile), jnp.float32),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=[dz_NF, dv_shape, g_DF, dw_DF],
        input_output_aliases={5: 0, 6: 2, 7: 3} | ({8: 1} if before else {}),
        compiler_params=_compiler_params(machine),
        cost_estimate=_cost(
            int(6 * part * tokens * width * d_ff), [v_ND] * 2 * cores + [dv_shape] * (1 + len(before)),
            parts=([z_NF] * 3 + [g_DF] * 2, part),
        ),
        interpret=machine.interpret,
        name="ttt_suffix",
    )(scalars, *moved)  # fmt: skip


HANDED_ROWS = 128  # rows of G that are added to the gradient of W0 at once


def _suffix_body(
    scalars_ref: Any, z_ref: Any, v_ref: Any, do_ref: Any, masks_ref: Any, dz_in_ref: Any, g_in_hbm: Any, _: Any,
    *refs: Any, first: int, adds: bool,
) -> None:  # fmt: skip
    dv_in_refs, (dz_ref, dv_ref, g_hbm, dw_hbm, g_ref, read_ref, handed_ref, semaphore) = refs[:adds], refs[adds:]
    step, block = pl.program_id(1), pl.program_id(2)
    last_step, last_block = pl.num_programs(1) - 1, pl.num_programs(2) - 1
    chunk, tile, dtype = last_step - step, first + pl.program_id(0), z_ref.dtype

    def hand_over() -> None:
        """Adds G to the gradient of W0 and begins with an empty one."""
        columns = pl.ds(pl.multiple_of(tile * g_ref.shape[1], LANES), g_ref.shape[1])

        @pl.loop(0, g_ref.shape[0] // HANDED_ROWS)
        def _(at: Array) -> None:
            rows = pl.ds(pl.multiple_of(at * HANDED_ROWS, HANDED_ROWS), HANDED_ROWS)
            _copy(pltpu.make_async_copy(dw_hbm.at[rows, columns], handed_ref, semaphore))
            handed_ref[...] += g_ref[rows, :]
            g_ref[rows, :] = jnp.zeros_like(handed_ref)
            _copy(pltpu.make_async_copy(handed_ref, dw_hbm.at[rows, columns], semaphore))

    @once((step == 0) & (block == 0))
    def load() -> None:
        _copy(_tile_copy(g_in_hbm, g_ref, semaphore, False, tile))

    @once(block == 0)
    def begin_chunk() -> None:
        read_ref[...] = g_ref[...].astype(dtype)

    @once((block == 0) & (scalars_ref[_BEFORE, chunk] > 0))
    def hand_over_before() -> None:
        hand_over()

    dv = _dot(z_ref[...], read_ref[...], 1, 1)
    dv_ref[0] = dv + dv_in_refs[0][0] if adds else dv
    weights = scalars_ref[_FACTOR, chunk] * masks_ref[:, 1:]
    dz = dz_in_ref[...].astype(jnp.float32) + weights * _dot(v_ref[...], read_ref[...], 1, 0)
    dz_ref[...] = dz.astype(dtype)
    do = (do_ref[...].astype(jnp.float32) * masks_ref[:, :1]).astype(dtype)
    g_ref[...] += _dot(do, z_ref[...], 0, 0)

    @once((block == last_block) & (scalars_ref[_AFTER, chunk] > 0))
    def hand_over_after() -> None:
        hand_over()

    @once((step == last_step) & (block == last_block))
    def store() -> None:
        _copy(_tile_copy(g_hbm, g_ref, semaphore, False, tile, back=True))


# The two forms of a condition. Static profiles count nothing under one: `tests/benchmarks/profile_scans.py` replaces
# both.


def either(condition: Any, usual: Callable[[], None], other: Callable[[], None]) -> None:
    """Runs ``usual``, or ``other``."""
    pl.when(condition)(usual)
    pl.when(jnp.logical_not(condition))(other)


def once(condition: Any) -> Callable[[Callable[[], None]], None]:
    """Decorates what few steps of the grid do."""
    return pl.when(condition)


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _tile_copy(hbm: Any, ref: Any, semaphore: Any, by_rows: bool, tile: Any, *, back: bool = False) -> Any:
    """Returns the copy of a tile of a matrix in main memory, rows or columns of it, to ``ref`` or back."""
    size = ref.shape[0 if by_rows else 1]
    part = pl.ds(pl.multiple_of(tile * size, LANES), size)
    there = hbm.at[part, :] if by_rows else hbm.at[:, part]
    return pltpu.make_async_copy(ref, there, semaphore) if back else pltpu.make_async_copy(there, ref, semaphore)


def _copy(copy: Any) -> None:
    copy.start()
    copy.wait()


def _compiler_params(machine: Machine) -> pltpu.CompilerParams:
    """What a device with two TensorCores may divide is the first dim of the grid."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=machine.vmem_bytes
    )


def _cost(
    flops: int, moved: list[Any], *, reread: tuple[Any, int] | None = None, parts: tuple[list[Any], float] = ([], 1.0)
) -> pl.CostEstimate:
    """FLOPs of the products and bytes to and from main memory; ``parts`` are arrays of which a part is moved."""
    size = lambda x: x.size * x.dtype.itemsize  # noqa: E731
    total = sum(map(size, moved)) + parts[1] * sum(map(size, parts[0]))
    if reread is not None:
        total += (reread[1] - 1) * size(reread[0])
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=int(total))
