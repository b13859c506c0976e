"""Rows that are cut over devices: what ``chunked.py`` computes, by shards that each hold whole, consecutive chunks.

The recurrence is a segmented sum, so a shard needs of the chunks before it one state only. Every shard sums up what its
own chunks write, an exclusive scan over shards in the order of the row turns the sums into incoming states, and each
shard then runs its chunks. The gradient is the mirror image: what the reads of a shard's chunks want of its incoming
state, scanned from the last shard to the first, gives each shard the gradient of its last state. No shard ever holds
the states of the others: they exchange slices, 1 / n of every state to each, and back.

Letters: B row, C tokens per chunk, M chunks, D model width, F feed-forward width, n shards, d = D / n.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from intttrain.core.sharding import RULES, axis_size, per_device, sum_over
from intttrain.ttt.chunked import Scanned, backward_scans, read_back, read_gradient, scan_chunks, written_state
from intttrain.ttt.layout import ChunkLayout
from intttrain.ttt.transforms import DeltaTransform

Array = jax.Array

AXIS = "context"
STATE_NAME = "incoming_state"  # for remat policies: with it the backward pass needs no second exchange

# Logical names of dims, in the place of arrays. F is left to XLA, which sums over its pieces where that is needed.
_LEFT = ("tensor",)
_CHUNKS, _STATE = ("batch", "tokens"), ("batch",)
_LAYOUT: Any = ChunkLayout(_CHUNKS, _CHUNKS, _CHUNKS)  # type: ignore[arg-type]
_SCANNED: Any = Scanned(_CHUNKS, _STATE, _CHUNKS, _CHUNKS, _CHUNKS)  # type: ignore[arg-type]
_STATES = ("tokens", "batch")  # one of every shard


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_shards(
    transform: DeltaTransform,
    z_BMCF: Array,
    v_BMCD: Array,
    w_down_DF: Array,
    layout: ChunkLayout,
    gates_BM: Array,
    eta: Array,
    s_in_BDF: Array,
) -> Scanned:
    """``chunked.scan_chunks`` for rows whose chunks lie along the mesh axis ``context``; same values and gradients.

    D and M are multiples of the size of that axis.
    """
    return _forward(transform, z_BMCF, v_BMCD, w_down_DF, layout, gates_BM, eta, s_in_BDF)[0]


def _forward(transform: DeltaTransform, *inputs: Any) -> tuple[Scanned, tuple[Any, ...]]:
    def local(
        z_BMCF: Array, v_BMCD: Array, w_DF: Array, layout: ChunkLayout, gates_BM: Array, eta: Array, first_BDF: Array
    ) -> tuple[Scanned, Array]:
        own_BDF = written_state(transform, z_BMCF, v_BMCD, layout, gates_BM, eta)
        s_in_BDF, s_end_BDF = exclusive_scan(jnp.prod(layout.keeps_BM, axis=1), own_BDF, first_BDF)
        scanned = scan_chunks(transform, z_BMCF, v_BMCD, w_DF, layout, gates_BM, eta, s_in_BDF)
        return scanned._replace(s_end_BDF=s_end_BDF), s_in_BDF[None]

    in_axes = (_CHUNKS, _CHUNKS, (), _LAYOUT, _CHUNKS, (), _STATE)
    scanned, s_in_nBDF = per_device(local, in_axes, (_SCANNED, _STATES), left_to_xla=_LEFT)(*inputs)
    z_BMCF, v_BMCD, _, layout, gates_BM, eta, _ = inputs
    return scanned, (z_BMCF, v_BMCD, layout, gates_BM, eta, checkpoint_name(s_in_nBDF, STATE_NAME))


def _backward(transform: DeltaTransform, residuals: tuple[Any, ...], cotangents: Scanned) -> tuple[Any, ...]:
    def local(
        z_BMCF: Array, v_BMCD: Array, layout: ChunkLayout, gates_BM: Array, eta: Array, s_in_nBDF: Array,
        dc_BMCD: Array, g_last_BDF: Array,
    ) -> tuple[Array, ...]:  # fmt: skip
        do_BMCD = read_gradient(z_BMCF, layout, dc_BMCD)
        own_BDF = read_back(z_BMCF, layout, do_BMCD)
        g_end_BDF, ds_first_BDF = exclusive_scan(jnp.prod(layout.keeps_BM, axis=1), own_BDF, g_last_BDF, reverse=True)
        found = backward_scans(transform, z_BMCF, v_BMCD, layout, gates_BM, eta, s_in_nBDF[0], do_BMCD, g_end_BDF)
        return found.dz_BMCF, found.dv_BMCD, found.dgates_BM, sum_over(found.deta, *RULES["batch"], AXIS), ds_first_BDF

    in_axes = (_CHUNKS, _CHUNKS, _LAYOUT, _CHUNKS, (), _STATES, _CHUNKS, _STATE)
    out_axes = (_CHUNKS, _CHUNKS, _CHUNKS, (), _STATE)
    dz_BMCF, dv_BMCD, dgates_BM, deta, ds_BDF = per_device(local, in_axes, out_axes, left_to_xla=_LEFT)(
        *residuals, cotangents.c_BMCD, cotangents.s_end_BDF
    )
    return dz_BMCF, dv_BMCD, None, None, dgates_BM, deta, ds_BDF


scan_shards.defvjp(_forward, _backward)


def exclusive_scan(keep_B: Array, own_BDF: Array, first_BDF: Array, *, reverse: bool = False) -> tuple[Array, Array]:
    """Inside ``per_device``: the segmented exclusive sum over shards in the order of the row, or from its end.

    Args:
      keep_B: whether the shard carries on what it receives; 0 or 1.
      own_BDF: what the shard adds.
      first_BDF: what the first shard in the direction of the scan receives; the same on all.
      reverse: from the last shard to the first.

    Returns:
      What this shard receives, and what the last one in that direction hands on (the same on all).
    """
    shards = axis_size(AXIS)
    rows, width, d_ff = own_BDF.shape
    own_nBdF = jax.lax.all_to_all(own_BDF.reshape(rows, shards, width // shards, d_ff), AXIS, 1, 0)
    keep_nB = jax.lax.all_gather(keep_B, AXIS)
    start = jax.lax.axis_index(AXIS) * (width // shards)
    first_BdF = jax.lax.dynamic_slice_in_dim(first_BDF, start, width // shards, axis=1)

    def step(carried_BdF: Array, shard: tuple[Array, Array]) -> tuple[Array, Array]:
        keep_B, own_BdF = shard
        return keep_B[:, None, None] * carried_BdF + own_BdF, carried_BdF

    last_BdF, received_nBdF = jax.lax.scan(step, first_BdF, (keep_nB, own_nBdF), reverse=reverse)
    received_BDF = jax.lax.all_to_all(received_nBdF, AXIS, 0, 1).reshape(rows, width, d_ff)
    return received_BDF, jax.lax.all_gather(last_BdF, AXIS, axis=1, tiled=True)
