"""The rows of a batch, whole or cut over devices: what each device runs, and what devices tell each other.

A device that holds whole rows runs them one after the other as one long row, in which each is a document of its own:
nothing is transposed and there is one state at a time.

Where the mesh axis ``context`` cuts rows, every shard holds whole, consecutive chunks. The recurrence is a segmented
sum, so a shard needs of the chunks before it one state only. Every shard sums up what its own chunks write, an
exclusive scan over shards in the order of the row turns the sums into incoming states, and each shard then runs its
chunks. The gradient is the mirror image: what the reads of a shard's chunks want of its incoming state, scanned from
the last shard to the first, gives each shard the gradient of its last state. No shard ever holds the states of the
others: they exchange slices, 1 / n of every state to each, and back.

Letters: B row, C tokens per chunk, M chunks, D model width, F feed-forward width, n shards, d = D / n.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from intttrain.core.scan import scan
from intttrain.core.sharding import RULES, axis_size, constrain, gather_pieces, per_device, sum_over, sum_to_pieces
from intttrain.ttt import chunked, kernel_scans
from intttrain.ttt.chunked import Chunks, Forward, Gradients, empty_state, read_back, read_scale, written_state
from intttrain.ttt.kernel_blocks import Kernels
from intttrain.ttt.layout import ChunkLayout
from intttrain.ttt.transforms import DeltaTransform

Array = jax.Array

AXIS = "context"
STATE_NAME = "incoming_state"  # for remat policies: with it the backward pass needs no second exchange

# Logical names of dims, in the place of arrays. F is left to XLA, which sums over its pieces where that is needed.
_LEFT = ("tensor",)
_CHUNKS, _STATE, _WEIGHT = ("batch", "tokens"), ("batch",), ("embed",)
_STATES = ("tokens", "batch")  # one of every shard
_FORWARD: Any = Forward(_CHUNKS, _CHUNKS, _CHUNKS, _CHUNKS)  # type: ignore[arg-type]
_BATCH: Any = Chunks(*(_CHUNKS,) * len(Chunks._fields))  # type: ignore[arg-type]


class Options(NamedTuple):
    """What is static.

    Attributes:
      transform: bounds on updates.
      gradient_dtype: in which the gradient of W0 is summed over devices.
      kernels: that run the scans; ``None`` for XLA.
    """

    transform: DeltaTransform
    gradient_dtype: str
    kernels: Kernels | None

    @property
    def left_to_xla(self) -> tuple[str, ...]:
        """Mesh axes over which XLA divides the work of a device: kernels are not divided."""
        return _LEFT if self.kernels is None else ()

    def forward_scan(self, *arguments: Any) -> tuple[Array, Forward]:
        """``chunked.forward_scan`` without its first argument."""
        if self.kernels is None:
            return chunked.forward_scan(self.transform, *arguments)
        return kernel_scans.forward_scan(self.kernels, *arguments)

    def backward_scans(self, *arguments: Any) -> tuple[Array, Gradients]:
        """``chunked.backward_scans`` without its first argument."""
        if self.kernels is None:
            return chunked.backward_scans(self.transform, *arguments)
        return kernel_scans.backward_scans(self.kernels, *arguments)


class Scanned(NamedTuple):
    """Result of ``scan_rows``, with the fields of ``chunked.Forward``.

    Attributes:
      read: every leaf with B in front; only ``o_MCD`` carries a gradient.
      s_end_BDF: fp32 state after the last chunk of every row, ``None`` if none came in.
    """

    read: Forward
    s_end_BDF: Array | None


def scan_rows(
    options: Options,
    z_BMCF: Array,
    v_BMCD: Array,
    w_down_DF: Array,
    layout: ChunkLayout,
    gates_BM: Array,
    eta: Array,
    s_in_BDF: Array | None,
) -> Scanned:
    """Reads and writes every chunk of every row, in order, with the state that the chunks before it left.

    Args:
      options: static.
      z_BMCF, v_BMCD: in the compute dtype.
      w_down_DF: W0, fp32, as it is stored: the devices gather it.
      layout: masks.
      gates_BM, eta: of the updates.
      s_in_BDF: fp32 incoming states; with ``None`` they are empty and the last ones are not returned.

    Differentiable in z, v, W0, gates, eta and the incoming state. Over a context axis of n devices, D and M are
    multiples of n.
    """
    batch = Chunks(z_BMCF, v_BMCD, layout.reads_BMC, layout.writes_BMC, layout.keeps_BM, gates_BM)
    return _scan_rows(options, w_down_DF, eta, s_in_BDF, batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_rows(options: Options, w_DF: Array, eta: Array, s_in_BDF: Array | None, batch: Chunks) -> Scanned:
    return _forward(options, w_DF, eta, s_in_BDF, batch)[0]


def _forward(
    options: Options, w_DF: Array, eta: Array, s_in_BDF: Array | None, batch: Chunks
) -> tuple[Scanned, tuple[Any, ...]]:
    def local(w_dF: Array, eta: Array, s_in_BDF: Array | None, batch: Chunks) -> tuple[Any, ...]:
        w_DF = gather_pieces(w_dF, *_WEIGHT, 0).astype(jnp.float32)
        given, last_BDF = s_in_BDF is not None, None
        if axis_size(AXIS) > 1:
            own_BDF = jax.lax.map(lambda chunks: written_state(options.transform, eta, chunks), batch)
            kept_B = jnp.prod(batch.keep_M, axis=1)
            s_in_BDF, last_BDF = exclusive_scan(kept_B, own_BDF, s_in_BDF)
        s_in_RDF, rows = _as_rows(options, s_in_BDF, batch)

        def run(_: None, row: tuple[Array, Chunks]) -> tuple[None, tuple[Array, Forward]]:
            return None, options.forward_scan(w_DF, eta, *row)

        _, (s_end_RDF, found) = scan(run, None, (s_in_RDF, rows), s_in_RDF.shape[0])
        s_end_BDF = s_end_RDF if last_BDF is None else last_BDF
        kept_nBDF = None if s_in_BDF is None else s_in_BDF[None]
        return _shaped_as(batch, found), s_end_BDF if given else None, kept_nBDF

    in_axes, out_axes = (_WEIGHT, (), _STATE, _BATCH), (_FORWARD, _STATE, _STATES)
    read, s_end_BDF, s_in_nBDF = per_device(local, in_axes, out_axes, left_to_xla=options.left_to_xla)(
        w_DF, eta, s_in_BDF, batch
    )
    if axis_size(AXIS) > 1:
        s_in_nBDF = checkpoint_name(s_in_nBDF, STATE_NAME)
    return Scanned(read, s_end_BDF), (w_DF, eta, s_in_nBDF, batch, read.scale_MD)


def _backward(options: Options, residuals: tuple[Any, ...], cotangents: Scanned) -> tuple[Any, ...]:
    def local(
        w_dF: Array, eta: Array, s_in_nBDF: Array | None, batch: Chunks, scale_BMD: Array | None, do_BMCD: Array,
        g_end_BDF: Array | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        w_DF = gather_pieces(w_dF, *_WEIGHT, 0).astype(jnp.float32)
        if scale_BMD is not None:
            scaled_BMCD = do_BMCD.astype(jnp.float32) * read_scale(scale_BMD, batch.reads_MC)
            do_BMCD = scaled_BMCD.astype(do_BMCD.dtype)
        given, ds_first_BDF = g_end_BDF is not None, None
        if axis_size(AXIS) > 1:
            own_BDF = jax.lax.map(lambda pair: read_back(*pair), (batch, do_BMCD))
            kept_B = jnp.prod(batch.keep_M, axis=1)
            g_end_BDF, ds_first_BDF = exclusive_scan(kept_B, own_BDF, g_end_BDF, reverse=True)
        s_in_RDF, (rows, do_RMCD) = _as_rows(options, None if s_in_nBDF is None else s_in_nBDF[0], (batch, do_BMCD))

        def run(dw_DF: Array, row: tuple[Any, ...]) -> tuple[Array, Gradients]:
            return options.backward_scans(w_DF, eta, dw_DF, *row)

        inputs = (s_in_RDF, rows, do_RMCD, g_end_BDF)
        dw_DF, found = scan(run, empty_state(*w_DF.shape), inputs, s_in_RDF.shape[0])
        dw_dF = sum_over(sum_to_pieces(dw_DF.astype(options.gradient_dtype), *_WEIGHT, 0), "data")
        deta = sum_over(jnp.sum(found.deta), *RULES["batch"], AXIS)
        ds_BDF = found.ds_in_DF if ds_first_BDF is None else ds_first_BDF
        dbatch = _shaped_as(batch, (found.dz_MCF, found.dv_MCD, found.dgate_M))
        return dw_dF.astype(w_dF.dtype), deta, ds_BDF if given else None, *dbatch

    in_axes = (_WEIGHT, (), _STATES, _BATCH, _CHUNKS, _CHUNKS, _STATE)
    out_axes = (_WEIGHT, (), _STATE, _CHUNKS, _CHUNKS, _CHUNKS)
    dw_DF, deta, ds_BDF, dz_BMCF, dv_BMCD, dgates_BM = per_device(
        local, in_axes, out_axes, left_to_xla=options.left_to_xla
    )(*residuals, cotangents.read.o_MCD, cotangents.s_end_BDF)
    return dw_DF, deta, ds_BDF, Chunks(dz_BMCF, dv_BMCD, None, None, None, dgates_BM)  # type: ignore[arg-type]


_scan_rows.defvjp(_forward, _backward)


def _as_rows(options: Options, s_in_BDF: Array | None, tree: Any) -> tuple[Array, Any]:
    """Returns what runs one after the other, R in front: rows with their states, or all as one with an empty state."""
    if s_in_BDF is not None:
        return s_in_BDF, tree
    chunks = tree if isinstance(tree, Chunks) else tree[0]
    empty_DF = empty_state(chunks.v_MCD.shape[-1], chunks.z_MCF.shape[-1])
    in_one = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), tree)
    return (constrain(empty_DF, None, "mlp") if options.left_to_xla else empty_DF)[None], in_one


def _shaped_as(batch: Chunks, tree: Any) -> Any:
    """Returns the leaves, R and chunks in front, with the B and M of the batch in front."""
    return jax.tree.map(lambda x: x.reshape(*batch.keep_M.shape, *x.shape[2:]), tree)


def exclusive_scan(
    keep_B: Array, own_BDF: Array, first_BDF: Array | None, *, reverse: bool = False
) -> tuple[Array, Array]:
    """Inside ``per_device``: the segmented exclusive sum over shards in the order of the row, or from its end.

    Args:
      keep_B: whether the shard carries on what it receives; 0 or 1.
      own_BDF: what the shard adds.
      first_BDF: what the first shard in the direction of the scan receives, the same on all; ``None`` for nothing.
      reverse: from the last shard to the first.

    Returns:
      What this shard receives, and what the last one in that direction hands on (the same on all).
    """
    shards = axis_size(AXIS)
    rows, width, d_ff = own_BDF.shape
    own_nBdF = jax.lax.all_to_all(own_BDF.reshape(rows, shards, width // shards, d_ff), AXIS, 1, 0)
    keep_nB = jax.lax.all_gather(keep_B, AXIS)
    if first_BDF is None:
        first_BdF = jnp.zeros_like(own_nBdF[0])
    else:
        start = jax.lax.axis_index(AXIS) * (width // shards)
        first_BdF = jax.lax.dynamic_slice_in_dim(first_BDF, start, width // shards, axis=1)

    def step(carried_BdF: Array, shard: tuple[Array, Array]) -> tuple[Array, Array]:
        keep_B, own_BdF = shard
        return keep_B[:, None, None] * carried_BdF + own_BdF, carried_BdF

    last_BdF, received_nBdF = jax.lax.scan(step, first_BdF, (keep_nB, own_nBdF), reverse=reverse)
    received_BDF = jax.lax.all_to_all(received_nBdF, AXIS, 0, 1).reshape(rows, width, d_ff)
    return received_BDF, jax.lax.all_gather(last_BdF, AXIS, axis=1, tiled=True)
