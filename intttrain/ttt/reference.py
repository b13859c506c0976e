"""The definition, token by token: slow, obvious, differentiated by plain autodiff. Nothing else defines the method.

    o_t = (W0 + S_t) z_t
    S_t = S_in [doc(t) carried in] + sum over chunks c < chunk(t) of
          g_c bound(eta * sum over s in chunk c with doc(s) = doc(t), not padding, of v_s z_s^T)

Letters: B row, T tokens, C tokens per chunk, M chunks, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from intttrain.ttt.layout import FastWeightState
from intttrain.ttt.transforms import DeltaTransform, bound_delta, row_scale

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
    transform: DeltaTransform,
) -> tuple[Array, FastWeightState]:
    """Returns ``o_BTD`` and the state after the last chunk; memory and time grow with T * M * D * F."""
    chunk_of_T = jnp.arange(z_BTF.shape[1]) // chunk_tokens

    def state_of(row: _Row, document: Array, chunk: Array) -> Array:
        """Returns S as ``document`` sees it at the start of ``chunk``."""
        s_DF = jnp.where(document == row.document, row.s_DF, jnp.zeros_like(row.s_DF))
        for c in range(gates_BM.shape[1]):
            written_T = (chunk_of_T == c) & (row.segment_ids_T == document) & (row.segment_ids_T > 0)
            update_DF = jnp.zeros_like(s_DF)
            for t in range(c * chunk_tokens, (c + 1) * chunk_tokens):
                outer_DF = jnp.outer(row.v_TD[t].astype(jnp.float32), row.z_TF[t].astype(jnp.float32))
                update_DF += jnp.where(written_T[t], eta * outer_DF, jnp.zeros_like(outer_DF))
            update_DF = row.gates_M[c] * bound_delta(update_DF[None], transform)[0]
            s_DF = s_DF + jnp.where(c < chunk, update_DF, jnp.zeros_like(update_DF))
        return s_DF

    def one_row(row: _Row) -> tuple[Array, Array, Array]:
        def one_token(t: Array) -> Array:
            s_DF = state_of(row, row.segment_ids_T[t], chunk_of_T[t])
            w_DF = w_down_DF.astype(jnp.float32) + s_DF
            if transform.preserve_row_norm:
                w_DF = w_DF * row_scale(s_DF[None], w_down_DF)[0][:, None]
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
