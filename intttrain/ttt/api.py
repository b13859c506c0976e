"""The door of the method: one signature, several implementations that agree in value and gradient.

Letters: B row, T tokens, C tokens per chunk, M = T / C chunks, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from intttrain.config.errors import UserError
from intttrain.layout.row_order import stored_units
from intttrain.layout.sharding import constrain, pieces_of
from intttrain.ttt.kernel_blocks import Kernels, choose_kernels, pays, supports
from intttrain.ttt.layout import FastWeightState, init_state, make_layout
from intttrain.ttt.reference import project_reference
from intttrain.ttt.rules import UpdateRule
from intttrain.ttt.shards import Options, scan_rows

Implementation = Literal["auto", "chunked", "pallas", "reference"]


class FastWeightOutput(NamedTuple):
    """Result of ``fast_weight_projection``.

    Attributes:
      o_BTD: what the down projection hands to the residual stream, dtype of z.
      state: the state after the last chunk, for the next piece of the row; ``None`` if none came in.
      delta_norm_BM: Frobenius norm of each committed update, relative to that of W0; carries no gradient.
      state_norm_BM: the same for the state after each chunk. Healthy up to about 4.
    """

    o_BTD: Float[Array, "B T D"]
    state: FastWeightState | None
    delta_norm_BM: Float[Array, "B M"]
    state_norm_BM: Float[Array, "B M"]


def project(z_BTF: Float[Array, "B T F"], w_down_DF: Float[Array, "D F"]) -> Float[Array, "B T D"]:
    """Returns ``W0 z`` with fp32 accumulation and fp32 result: the plain down projection."""
    return jnp.einsum("btf,df->btd", z_BTF, w_down_DF.astype(z_BTF.dtype), preferred_element_type=jnp.float32)


def fast_weight_projection(
    z_BTF: Float[Array, "B T F"],
    v_BTD: Float[Array, "B T D"],
    w_down_DF: Float[Array, "D F"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    chunk_tokens: int,
    eta: Float[Array, ""],
    gates_BM: Float[Array, "B M"] | None = None,
    state: FastWeightState | None = None,
    gradient_dtype: str = "float32",
    update: UpdateRule = UpdateRule(),
    balanced: bool = False,
    implementation: Implementation = "auto",
) -> FastWeightOutput:
    """Applies a fast down projection to a row: every chunk is read with what the chunks before it wrote.

    Args:
      z_BTF: activations of the MLP block, in the compute dtype.
      v_BTD: values to write, from ``make_targets``.
      w_down_DF: the initial weight W0 (D x F), fp32.
      segment_ids_BT: documents of the row; 0 is padding, which is never written.
      chunk_tokens: C, divides T.
      eta: size of an update, traced; 0 switches updates off and leaves exactly the plain projection.
      gates_BM: multiplies each chunk's update, traced; default 1.
      state: what is carried in from the piece before (``init_state`` at the first). Without it rows begin with nothing
        and no state is returned, which takes less memory.
      gradient_dtype: in which the gradient of W0 is summed over devices.
      update: what a chunk writes and what becomes of what was written before, static.
      balanced: a context axis cuts the rows into two pieces a shard (``layout/row_order.py``), and all arrays with T or
        M have that order.
      implementation: ``reference`` (the definition, for tests), ``chunked`` (XLA), ``pallas`` (kernels for TPUs), or
        ``auto``: kernels where they run and are faster, else XLA.

    Returns:
      The projected row, the state to carry on, and the size of what was written.

    Raises:
      ValueError: ``chunk_tokens`` does not divide T, or the implementation does not exist or knows no balanced rows.
      UserError: kernels were asked for and cannot run here.

    Source: In-Place TTT (arXiv 2604.06169), equations restated in ``docs/method.md``.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r} does not exist; use one of {get_args(Implementation)}")
    if implementation == "reference" and balanced:
        raise ValueError('implementation="reference" knows no balanced rows; use "chunked"')
    rows, seq_len, d_ff = z_BTF.shape
    shards = pieces_of(None, "tokens")
    chunks_M = stored_units(seq_len, shards, chunk_tokens, balanced=balanced)
    layout = make_layout(segment_ids_BT, chunk_tokens, None if state is None else state.document_B, chunks_M)
    chunks = seq_len // chunk_tokens
    if gates_BM is None:
        gates_BM = jnp.ones((rows, chunks), jnp.float32)
    eta = jnp.asarray(eta, jnp.float32)
    if implementation == "reference":
        start = init_state(rows, w_down_DF.shape[0], d_ff) if state is None else state
        o_BTD, end = project_reference(
            z_BTF, v_BTD, w_down_DF, segment_ids_BT, chunk_tokens, eta, gates_BM, start, update
        )
        unknown_BM = jnp.full((rows, chunks), jnp.nan, jnp.float32)
        return FastWeightOutput(o_BTD, None if state is None else end, unknown_BM, unknown_BM)

    z_BMCF = z_BTF.reshape(rows, chunks, chunk_tokens, d_ff)
    v_BMCD = v_BTD.reshape(rows, chunks, chunk_tokens, -1)
    shape = (w_down_DF.shape[0], d_ff)
    kernels = _kernels(implementation, update, chunk_tokens, shape, z_BTF.dtype.itemsize)
    options = Options(update, gradient_dtype, kernels, 2 if balanced and shards > 1 else 1)
    with jax.named_scope("ttt_scan"):
        s_in_BDF = None if state is None else constrain(state.s_BDF, "batch", "width", "mlp")
        read, s_end_BDF = scan_rows(options, z_BMCF, v_BMCD, w_down_DF, layout, gates_BM, eta, s_in_BDF)
    last = (int(np.argmax(chunks_M)) + 1) * chunk_tokens - 1
    frozen_DF = jax.lax.stop_gradient(w_down_DF).astype(jnp.float32)
    w_norm = jnp.sqrt(jnp.sum(jnp.square(frozen_DF))) + 1e-12
    return FastWeightOutput(
        o_BTD=read.o_MCD.reshape(rows, seq_len, -1),
        state=None if s_end_BDF is None else FastWeightState(s_end_BDF, segment_ids_BT[:, last]),
        delta_norm_BM=jax.lax.stop_gradient(read.delta_norm_M / w_norm),
        state_norm_BM=jax.lax.stop_gradient(read.state_norm_M / w_norm),
    )


def _kernels(
    implementation: Implementation, update: UpdateRule, chunk_tokens: int, shape: tuple[int, int], itemsize: int
) -> Kernels | None:
    """Returns the kernels that run the scans, ``None`` for XLA."""
    if implementation == "chunked":
        return None
    found = supports(update) or choose_kernels(chunk_tokens, *shape, itemsize)
    if implementation == "pallas" and isinstance(found, str):
        raise UserError(f'model.ttt.implementation="pallas": {found}; or use "auto" or "chunked"')
    if isinstance(found, str) or (implementation == "auto" and not pays(chunk_tokens, *shape)):
        return None
    return found
