"""Runs the suffix scan of the backward pass as a Pallas TPU kernel: a tile of G = dL/dS stays on chip, as in
``kernel_recurrence.py``.

Tiles are columns of G, and chunks pass from the last to the first; for the tokens t of a chunk:

    dv_t   = G z_t                                       rate and mu_t are multiplied in by the caller
    dz_t  += rate mu_t G^T v_t                           rate = eta times the gate of the chunk
    G     <- keep G + sum_t a_t do_t z_t^T

keep is 1 or 0. There is no product with it: where it is 0, G is handed over and begins anew (``stack_scalars``).

Letters: T tokens of all chunks, M chunks, D model width, F feed-forward width, c cores. A ref ending in ``_hbm`` is an
array in main memory, every other one a block in on-chip memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from intttrain.ttt import kernel_parts as parts
from intttrain.ttt.kernel_parts import LANES, Machine

Array = jax.Array


class SuffixBlocks(NamedTuple):
    """Sizes of the pieces in which ``suffix`` works.

    Attributes:
      tile: width of a tile of G along F.
      tokens: tokens that are multiplied at once.
    """

    tile: int
    tokens: int


# Rows of the scalars of each chunk.
_RATE, _BEFORE, _AFTER = range(3)


def stack_scalars(rate_M: Array, before_M: Array, after_M: Array) -> Array:
    """Returns what ``suffix`` knows of each chunk as one array (3, M) for the scalar memory of a core.

    Where a document ends, G is the gradient of the state through all reads of that document, and that of W0 through the
    same reads is equal to it. So G is added to the gradient of W0 there ("handed over") and begins anew with zeros,
    which takes no product of its own (``docs/decisions/0007``).

    Args:
      rate_M: fp32 eta times the gate.
      before_M: 1 if G is handed over before the reads of the chunk are added to it.
      after_M: 1 if it is handed over with them; at most one of the two is 1.
    """
    return jnp.stack([rate_M, before_M, after_M])


HANDED_ROWS = 128  # rows of G that are added to the gradient of W0 at once


class Suffix(NamedTuple):
    """What ``suffix`` returns.

    Attributes:
      dz_TF: whole gradient of z, in its dtype.
      dv_TD: fp32 G z_t, without rate and mask.
      g_DF: fp32 gradient of the state before the first chunk.
      dw_DF: fp32 gradient of W0 through the documents whose G was handed over; that of the first one is still in G.
    """

    dz_TF: Array
    dv_TD: Array
    g_DF: Array
    dw_DF: Array


def suffix(
    scalars_3M: Array,
    z_TF: Array,
    v_TD: Array,
    do_TD: Array,
    dz_TF: Array,
    masks_T2: Array,
    g_end_DF: Array,
    dw_DF: Array,
    blocks: SuffixBlocks,
    cores: int,
    machine: Machine,
) -> Suffix:
    """Runs the suffix scan of the backward pass.

    A tile of G gives only its part of dv, which is a sum over all tiles. One launch runs one tile on each core and
    adds its part to the dv that the launch before left for that core; XLA adds the cores at the end.

    Args:
      scalars_3M: from ``stack_scalars``.
      z_TF, v_TD, do_TD: as in ``prefix``.
      dz_TF: gradient of z through the reads; the gradient through the updates is added to it.
      masks_T2: fp32: which tokens of ``do_TD`` are added to G, and mu.
      g_end_DF: fp32 gradient of the state after the last chunk.
      dw_DF: fp32 gradient of W0 to which G is added where it is handed over.
      blocks: divide F and C; the number of tiles is a multiple of ``cores``.
      cores: TensorCores of a device.
      machine: what to compile for.
    """
    rows = (z_TF, v_TD, do_TD, masks_T2)
    dv_cTD: Array | None = None  # of each core
    for first in range(0, z_TF.shape[1] // blocks.tile, cores):
        dz_TF, dv_cTD, g_end_DF, dw_DF = _suffix_tiles(
            scalars_3M, rows, dz_TF, dv_cTD, g_end_DF, dw_DF, first, blocks, cores, machine
        )
    assert dv_cTD is not None
    # Added one by one: XLA turns ``jnp.sum`` into a reduction, which costs eight times as much.
    return Suffix(dz_TF, functools.reduce(jnp.add, [dv_cTD[core] for core in range(cores)]), g_end_DF, dw_DF)


def _suffix_tiles(
    scalars_3M: Array, rows: tuple[Array, ...], dz_TF: Array, dv_cTD: Array | None, g_DF: Array, dw_DF: Array,
    first: int, blocks: SuffixBlocks, cores: int, machine: Machine,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Runs one launch: tile ``first`` on the first core, the next tile on the next one, all chunks from the last.

    Returns dz, dv, G and dW0 in the memory of the arguments, changed in the columns of these tiles and in dv. The first
    launch has no dv to add to (``dv_cTD`` is ``None``) and writes a new one. Tiles are launches and not a dim of the
    grid because each adds to the dv of the one before, and a kernel fetches no block of an output back once the grid
    has left it.

    The grid is cores x chunks x blocks of tokens.
    """
    z_TF, v_TD, do_TD, masks_T2 = rows
    (tokens, d_ff), width, chunks = z_TF.shape, v_TD.shape[1], scalars_3M.shape[1]
    steps = tokens // chunks // blocks.tokens
    grid = cores, chunks, steps
    place = lambda step, block: (chunks - 1 - step) * steps + block  # noqa: E731  # from the last chunk to the first
    own = pl.BlockSpec((blocks.tokens, blocks.tile), lambda core, step, block, *_: (place(step, block), first + core))
    whole = pl.BlockSpec((blocks.tokens, width), lambda core, step, block, *_: (place(step, block), 0))
    mask = pl.BlockSpec((blocks.tokens, 2), lambda core, step, block, *_: (place(step, block), 0))
    sums = pl.BlockSpec((1, blocks.tokens, width), lambda core, step, block, *_: (core, place(step, block), 0))
    in_main_memory = pl.BlockSpec(memory_space=pl.ANY)
    dv_shape = jax.ShapeDtypeStruct((cores, tokens, width), jnp.float32)
    before = [] if dv_cTD is None else [dv_cTD]
    moved = [z_TF, v_TD, do_TD, masks_T2, dz_TF, g_DF, dw_DF, *before]
    part = cores * blocks.tile / d_ff
    return pl.pallas_call(
        functools.partial(_suffix_body, first=first, adds=bool(before)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[own, whole, whole, mask, own, in_main_memory, in_main_memory, *(sums for _ in before)],
            out_specs=[own, sums, in_main_memory, in_main_memory],
            scratch_shapes=[
                pltpu.VMEM((width, blocks.tile), jnp.float32),
                pltpu.VMEM((width, blocks.tile), z_TF.dtype),
                pltpu.VMEM((HANDED_ROWS, blocks.tile), jnp.float32),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=[dz_TF, dv_shape, g_DF, dw_DF],
        # dz, G, dW0 and dv are changed in their places: a launch writes only its own tiles, and what the others hold
        # must stay. Keys count arguments, the scalars being number 0.
        input_output_aliases={5: 0, 6: 2, 7: 3} | ({8: 1} if before else {}),
        compiler_params=parts.compiler_params(machine),
        cost_estimate=parts.cost(
            int(6 * part * tokens * width * d_ff), [v_TD] * 2 * cores + [dv_shape] * (1 + len(before)),
            partly=([z_TF] * 3 + [g_DF] * 2, part),
        ),
        interpret=machine.interpret,
        name="ttt_suffix",
    )(scalars_3M, *moved)  # fmt: skip


def _suffix_body(
    scalars_ref: Any, z_ref: Any, v_ref: Any, do_ref: Any, masks_ref: Any, dz_in_ref: Any, g_in_hbm: Any, _: Any,
    *refs: Any, first: int, adds: bool,
) -> None:  # fmt: skip
    """Does one step of the grid: one block of tokens of one chunk for one tile of G.

    All tokens of a chunk have to read G as it was after the chunk, whereas the first block of them already changes it.
    So they read ``read_ref``, a copy in the dtype of the matmuls that is made when the chunk begins.
    """
    dv_in_refs, (dz_ref, dv_ref, g_hbm, dw_hbm, g_ref, read_ref, handed_ref, semaphore) = refs[:adds], refs[adds:]
    step, block = pl.program_id(1), pl.program_id(2)
    last_step, last_block = pl.num_programs(1) - 1, pl.num_programs(2) - 1
    chunk, tile, dtype = last_step - step, first + pl.program_id(0), z_ref.dtype

    def hand_over() -> None:
        """Adds G to the gradient of W0 and begins with an empty one.

        That gradient lies in main memory and passes through a small buffer, ``HANDED_ROWS`` rows at a time: beside G on
        chip it would make tiles half as wide, for what happens once per document.
        """
        columns = pl.ds(pl.multiple_of(tile * g_ref.shape[1], LANES), g_ref.shape[1])

        @pl.loop(0, g_ref.shape[0] // HANDED_ROWS)
        def _(at: Array) -> None:
            rows = pl.ds(pl.multiple_of(at * HANDED_ROWS, HANDED_ROWS), HANDED_ROWS)
            parts.run_copy(pltpu.make_async_copy(dw_hbm.at[rows, columns], handed_ref, semaphore))
            handed_ref[...] += g_ref[rows, :]
            g_ref[rows, :] = jnp.zeros_like(handed_ref)
            parts.run_copy(pltpu.make_async_copy(handed_ref, dw_hbm.at[rows, columns], semaphore))

    @parts.once((step == 0) & (block == 0))
    def load() -> None:
        parts.run_copy(parts.tile_copy(g_in_hbm, g_ref, semaphore, False, tile))

    @parts.once(block == 0)
    def begin_chunk() -> None:
        # Before anything of this chunk is added, or handed over: its tokens wrote into the state that G belongs to.
        read_ref[...] = g_ref[...].astype(dtype)

    @parts.once((block == 0) & (scalars_ref[_BEFORE, chunk] > 0))
    def hand_over_before() -> None:
        hand_over()

    # The two gradients through the update that this chunk wrote.
    dv = parts.dot(z_ref[...], read_ref[...], 1, 1)
    dv_ref[0] = dv + dv_in_refs[0][0] if adds else dv
    weights = scalars_ref[_RATE, chunk] * masks_ref[:, 1:]
    dz = dz_in_ref[...].astype(jnp.float32) + weights * parts.dot(v_ref[...], read_ref[...], 1, 0)
    dz_ref[...] = dz.astype(dtype)
    # The gradient of the state through the reads of this chunk.
    do = (do_ref[...].astype(jnp.float32) * masks_ref[:, :1]).astype(dtype)
    g_ref[...] += parts.dot(do, z_ref[...], 0, 0)

    @parts.once((block == last_block) & (scalars_ref[_AFTER, chunk] > 0))
    def hand_over_after() -> None:
        hand_over()

    @parts.once((step == last_step) & (block == last_block))
    def store() -> None:
        parts.run_copy(parts.tile_copy(g_hbm, g_ref, semaphore, False, tile, back=True))
