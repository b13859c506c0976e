"""The rows of a batch, whole or cut over devices: what each device runs, and what devices tell each other.

A device that holds whole rows runs them one after the other as one long row, in which each is a document of its own:
nothing is transposed and there is one state at a time.

Where the mesh axis ``context`` cuts rows, every shard holds a stretch of whole, consecutive chunks, or two where rows
are stored balanced (``layout/row_order.py``). The recurrence is a segmented sum, so a stretch needs of the chunks
before it one state only. Every shard sums up what its own stretches write, an exclusive scan over stretches in the
order of the row turns the sums into incoming states, and each shard then runs its chunks. The gradient is the mirror
image: what the reads of a stretch want of its incoming state, scanned from the last stretch to the first, gives each
one the gradient of its last state. No shard ever holds the states of the others: they exchange slices, 1 / n of every
state to each, and back.

Letters: B row, C tokens per chunk, M chunks, D model width, F feed-forward width, n shards, P stretches per shard,
d = D / n, R stretches or rows that run one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from intttrain.layout.axes import ROW_AXIS, RULES
from intttrain.layout.scan import scan
from intttrain.layout.sharding import (
    constrain,
    differing,
    gather_pieces,
    per_device,
    pieces_of,
    position_on,
    sum_gradient,
)
from intttrain.ttt import chunked, kernel_scans
from intttrain.ttt.chunked import Chunks, Forward, Gradients, empty_state, read_back, read_scale, written_state
from intttrain.ttt.kernel_blocks import Kernels
from intttrain.ttt.layout import ChunkLayout
from intttrain.ttt.rules import UpdateRule

Array = jax.Array

STATE_NAME = "incoming_state"  # for remat policies: with it the backward pass needs no second exchange

# Logical names of dims, in the place of arrays. F is left to XLA, which sums over its pieces where that is needed.
_LEFT = RULES["mlp"]
_CHUNKS, _STATE, _WEIGHT = ("batch", "tokens"), ("batch",), ("embed",)
_STATES = ("tokens", "batch")  # one of every shard
_FORWARD: Any = Forward(_CHUNKS, _CHUNKS, _CHUNKS, _CHUNKS)  # type: ignore[arg-type]
_BATCH: Any = Chunks(*(_CHUNKS,) * len(Chunks._fields))  # type: ignore[arg-type]


class Options(NamedTuple):
    """What is static.

    Attributes:
      update: the rule.
      gradient_dtype: in which the gradient of W0 is summed over devices.
      kernels: that run the scans; ``None`` for XLA.
      stretches: P, 1 where no context axis cuts the rows.
    """

    update: UpdateRule
    gradient_dtype: str
    kernels: Kernels | None
    stretches: int

    @property
    def left_to_xla(self) -> tuple[str, ...]:
        """Mesh axes over which XLA divides the work of a device: kernels are not divided."""
        return _LEFT if self.kernels is None else ()

    def forward_scan(self, *arguments: Any) -> tuple[Array, Forward]:
        """``chunked.forward_scan`` without its first argument."""
        if self.kernels is None:
            return chunked.forward_scan(self.update, *arguments)
        return kernel_scans.forward_scan(self.kernels, *arguments)

    def backward_scans(self, *arguments: Any) -> tuple[Array, Gradients]:
        """``chunked.backward_scans`` without its first argument."""
        if self.kernels is None:
            return chunked.backward_scans(self.update, *arguments)
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
        w_DF = differing(gather_pieces(w_dF, *_WEIGHT, 0).astype(jnp.float32), *_CHUNKS)
        eta = differing(eta, *_CHUNKS)
        given, last_BDF = s_in_BDF is not None, None
        s_in_RDF, rows = s_in_BDF, batch
        if pieces_of(None, "tokens") > 1:
            rows = _as_stretches(options, batch)
            own_RDF = jax.lax.map(lambda chunks: written_state(options.update, eta, chunks), rows)
            s_in_RDF, last_BDF = exclusive_scan(options, _carried(options, rows), own_RDF, s_in_BDF)
        kept_nRDF = None if s_in_RDF is None else s_in_RDF[None]
        s_in_RDF, rows = _as_rows(options, s_in_RDF, rows)

        def run(_: None, row: tuple[Array, Chunks]) -> tuple[None, tuple[Array, Forward]]:
            return None, options.forward_scan(w_DF, eta, *row)

        _, (s_end_RDF, found) = scan(run, None, (s_in_RDF, rows), s_in_RDF.shape[0])
        s_end_BDF = s_end_RDF if last_BDF is None else last_BDF
        return _shaped_as(batch, options, found), s_end_BDF if given else None, kept_nRDF

    in_axes, out_axes = (_WEIGHT, (), _STATE, _BATCH), (_FORWARD, _STATE, _STATES)
    run_local = _per_device(options, local, in_axes, out_axes, with_states=s_in_BDF is not None)
    read, s_end_BDF, s_in_nRDF = run_local(w_DF, eta, s_in_BDF, batch)
    if pieces_of(None, "tokens") > 1:
        s_in_nRDF = checkpoint_name(s_in_nRDF, STATE_NAME)
    return Scanned(read, s_end_BDF), (w_DF, eta, s_in_nRDF, batch, read.scale_MD)


def _backward(options: Options, residuals: tuple[Any, ...], cotangents: Scanned) -> tuple[Any, ...]:
    def local(
        w_dF: Array, eta: Array, s_in_nRDF: Array | None, batch: Chunks, scale_BMD: Array | None, do_BMCD: Array,
        g_end_BDF: Array | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        w_DF = differing(gather_pieces(w_dF, *_WEIGHT, 0).astype(jnp.float32), *_CHUNKS)
        eta = differing(eta, *_CHUNKS)
        if scale_BMD is not None:
            scaled_BMCD = do_BMCD.astype(jnp.float32) * read_scale(scale_BMD, batch.reads_MC)
            do_BMCD = scaled_BMCD.astype(do_BMCD.dtype)
        given, ds_first_BDF = g_end_BDF is not None, None
        rows, do_RMCD, g_end_RDF = batch, do_BMCD, g_end_BDF
        if pieces_of(None, "tokens") > 1:
            rows, do_RMCD = _as_stretches(options, (batch, do_BMCD))
            own_RDF = jax.lax.map(lambda pair: read_back(options.update, *pair), (rows, do_RMCD))
            g_end_RDF, ds_first_BDF = exclusive_scan(options, _carried(options, rows), own_RDF, g_end_BDF, reverse=True)
        s_in_RDF, (rows, do_RMCD) = _as_rows(options, None if s_in_nRDF is None else s_in_nRDF[0], (rows, do_RMCD))

        def run(dw_DF: Array, row: tuple[Any, ...]) -> tuple[Array, Gradients]:
            return options.backward_scans(w_DF, eta, dw_DF, *row)

        inputs = (s_in_RDF, rows, do_RMCD, g_end_RDF)
        dw_DF, found = scan(run, empty_state(*w_DF.shape), inputs, s_in_RDF.shape[0])
        dw_dF = sum_gradient(dw_DF.astype(options.gradient_dtype), *_WEIGHT)
        deta = sum_gradient(jnp.sum(found.deta))
        ds_BDF = found.ds_in_DF if ds_first_BDF is None else ds_first_BDF
        dbatch = _shaped_as(batch, options, (found.dz_MCF, found.dv_MCD, found.dgate_M))
        return dw_dF.astype(w_dF.dtype), deta, ds_BDF if given else None, *dbatch

    in_axes = (_WEIGHT, (), _STATES, _BATCH, _CHUNKS, _CHUNKS, _STATE)
    out_axes = (_WEIGHT, (), _STATE, _CHUNKS, _CHUNKS, _CHUNKS)
    run_local = _per_device(options, local, in_axes, out_axes, with_states=cotangents.s_end_BDF is not None)
    dw_DF, deta, ds_BDF, dz_BMCF, dv_BMCD, dgates_BM = run_local(
        *residuals, cotangents.read.o_MCD, cotangents.s_end_BDF
    )
    return dw_DF, deta, ds_BDF, Chunks(dz_BMCF, dv_BMCD, None, None, None, dgates_BM)  # type: ignore[arg-type]


_scan_rows.defvjp(_forward, _backward)


def _per_device(options: Options, local: Callable[..., Any], in_axes: Any, out_axes: Any, *, with_states: bool) -> Any:
    """Returns ``local`` for every device, checked by JAX when plain updates are trained without kernels.

    Not with kernels, because JAX wants every ``pallas_call`` to say along which axes its results differ, and these do
    not know. Not with states that come in and go out: all shards of a row end with the same state, but it comes from an
    ``all_gather``, whose results JAX takes for different ones. Nor with other rules (bounds, row norms), of which JAX
    derives gradients inside of ``local``: checked, it turns their constants into arrays that the scan carries.
    """
    checked = options.kernels is None and not with_states and options.update == UpdateRule()
    return per_device(local, in_axes, out_axes, left_to_xla=options.left_to_xla, checked=checked)


def _as_rows(options: Options, s_in_BDF: Array | None, tree: Any) -> tuple[Array, Any]:
    """Returns what runs one after the other, R in front: rows with their states, or all as one with an empty state."""
    if s_in_BDF is not None:
        return s_in_BDF, tree
    chunks = tree if isinstance(tree, Chunks) else tree[0]
    empty_DF = empty_state(chunks.v_MCD.shape[-1], chunks.z_MCF.shape[-1])
    in_one = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), tree)
    return (constrain(empty_DF, None, "mlp") if options.left_to_xla else empty_DF)[None], in_one


def _as_stretches(options: Options, tree: Any) -> Any:
    """Returns leaves (B M ...) as (P B) (M / P) ...: first the first stretches of all rows."""

    def cut(x: Array) -> Array:
        by_stretch = x.reshape(x.shape[0], options.stretches, -1, *x.shape[2:])
        return jnp.swapaxes(by_stretch, 0, 1).reshape(-1, *by_stretch.shape[2:])

    return jax.tree.map(cut, tree)


def _carried(options: Options, rows: Chunks) -> Array:
    """Returns what a state is multiplied by over each stretch (R)."""
    return jnp.prod(options.update.carry(rows.keep_M), axis=1)


def _shaped_as(batch: Chunks, options: Options, tree: Any) -> Any:
    """Returns the leaves, R and chunks in front, with the B and M of the batch in front."""
    rows, chunks = batch.keep_M.shape

    def join(x: Array) -> Array:
        by_row = jnp.swapaxes(x.reshape(options.stretches, rows, -1, *x.shape[2:]), 0, 1)
        return by_row.reshape(rows, chunks, *x.shape[2:])

    return jax.tree.map(join, tree)


def exclusive_scan(
    options: Options, carry_R: Array, own_RDF: Array, first_BDF: Array | None, *, reverse: bool = False
) -> tuple[Array, Array]:
    """Inside ``per_device``: the segmented exclusive sum over stretches in the order of the row, or from its end.

    Args:
      options: how many stretches a shard has.
      carry_R: what the stretch multiplies by what it receives. R = P B.
      own_RDF: what the stretch adds.
      first_BDF: what the first stretch in the direction of the scan receives, the same on all; ``None`` for nothing.
      reverse: from the last stretch to the first.

    Returns:
      What the stretches of this shard receive, and what the last one in that direction hands on (the same on all).
    """
    shards, stretches = pieces_of(None, "tokens"), options.stretches
    rows, (width, d_ff) = own_RDF.shape[0] // stretches, own_RDF.shape[1:]
    own_nRdF = jax.lax.all_to_all(own_RDF.reshape(-1, shards, width // shards, d_ff), ROW_AXIS, 1, 0)
    carry_nR = jax.lax.all_gather(carry_R, ROW_AXIS)
    carry, own = (x.reshape(shards, stretches, rows, *x.shape[2:]) for x in (carry_nR, own_nRdF))
    if first_BDF is None:
        first_BdF = jnp.zeros_like(own_nRdF[0, :rows])
    else:
        start = position_on("tokens") * (width // shards)
        first_BdF = jax.lax.dynamic_slice_in_dim(first_BDF, start, width // shards, axis=1)

    def step(carried_BdF: Array, stretch: tuple[Array, Array]) -> tuple[Array, Array]:
        carry_B, own_BdF = stretch
        return options.update.combine(carry_B[:, None, None], carried_BdF, own_BdF), carried_BdF

    last_BdF, received = jax.lax.scan(step, first_BdF, (_in_row_order(carry), _in_row_order(own)), reverse=reverse)
    received_nRdF = _by_shard(received, stretches).reshape(own_nRdF.shape)
    received_RDF = jax.lax.all_to_all(received_nRdF, ROW_AXIS, 0, 1).reshape(own_RDF.shape)
    return received_RDF, jax.lax.all_gather(last_BdF, ROW_AXIS, axis=1, tiled=True)


def _in_row_order(x_nP: Array) -> Array:
    """Returns the stretches of all shards as they follow each other: second ones come back from the last shard."""
    return x_nP[:, 0] if x_nP.shape[1] == 1 else jnp.concatenate([x_nP[:, 0], x_nP[::-1, 1]])


def _by_shard(x: Array, stretches: int) -> Array:
    """Returns what ``_in_row_order`` was given."""
    if stretches == 1:
        return x[:, None]
    first, second = jnp.split(x, 2)
    return jnp.stack([first, second[::-1]], axis=1)
