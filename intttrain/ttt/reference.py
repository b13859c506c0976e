"""The definition, one token after the other: slow, obvious, differentiated by plain autodiff.

    o_t = (W0 + S_t) z_t
    S_t = the state that the chunks before t's leave to its document, chunk after chunk by the update rule:
          S <- r S + g_c delta(v_s, z_s for s in chunk c with doc(s) = doc(t), not padding)

The rule itself (delta and r) is in ``rules.py``, once for all implementations; here it is applied to each token's
document by itself, without masks that are carried, scans or pieces.

Letters: B row, T tokens, C tokens per chunk, M chunks, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from intttrain.ttt.layout import FastWeightState
from intttrain.ttt.rules import UpdateRule

Array = jax.Array


def project_reference(
    z_BTF: Array,
    v_BTD: Array,
    w_down_DF: Array,
    segment_ids_BT: Array,
    chunk_tokens: int,
    eta: Array,
    gates_BM: Array,
    state: FastWeightState,
    update: UpdateRule,
) -> tuple[Array, FastWeightState]:
    """Returns ``o_BTD`` and the state after the last chunk; memory and time grow with T * M * D * F."""
    chunk_of_T = jnp.arange(z_BTF.shape[1]) // chunk_tokens

    def state_of(row: _Row, document: Array, chunk: Array) -> Array:
        """Returns S as ``document`` sees it at the start of ``chunk``."""
        s_DF = jnp.where(document == row.document, row.s_DF, jnp.zeros_like(row.s_DF))
        for c in range(gates_BM.shape[1]):
            here = slice(c * chunk_tokens, (c + 1) * chunk_tokens)
            ids_C = row.segment_ids_T[here]
            written_C = ((ids_C == document) & (ids_C > 0)).astype(jnp.float32)
            delta_DF = row.gates_M[c] * update.delta(row.v_TD[here], row.z_TF[here], written_C, eta)
            after_DF = update.combine(update.carry(jnp.float32(1.0)), s_DF, delta_DF)
            s_DF = jnp.where(c < chunk, after_DF, s_DF)
        return s_DF

    def one_row(row: _Row) -> tuple[Array, Array, Array]:
        def one_token(t: Array) -> Array:
            s_DF = state_of(row, row.segment_ids_T[t], chunk_of_T[t])
            w_DF = w_down_DF.astype(jnp.float32) + s_DF
            scale_D = update.row_scale(s_DF, w_down_DF)
            if scale_D is not None:
                w_DF = w_DF * scale_D[:, None]
            return (w_DF @ row.z_TF[t].astype(jnp.float32)).astype(z_BTF.dtype)

        last = row.segment_ids_T[-1]
        chunks = jnp.asarray(gates_BM.shape[1])
        return jax.lax.map(one_token, jnp.arange(z_BTF.shape[1])), state_of(row, last, chunks), last

    rows = _Row(z_BTF, v_BTD, segment_ids_BT, gates_BM, state.s_BDF, state.document_B)
    o_BTD, s_BDF, document_B = jax.vmap(one_row)(rows)
    return o_BTD, FastWeightState(s_BDF, document_B)


class _Row(NamedTuple):
    """The inputs of one row; ``vmap`` splits the batch over its leaves."""

    z_TF: Array
    v_TD: Array
    segment_ids_T: Array
    gates_M: Array
    s_DF: Array
    document: Array
