"""Held-out loss by position in the document, with the update on, off, or for a model without one.

Everything leaves this module as (sum, weight) per document and bucket, so levels, differences and their bootstrap
intervals are plain arithmetic later.

Letters: N documents, P position buckets, B rows of one device batch, T tokens in a row, C tokens per chunk,
M = T / C chunks, n TTT layers, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from intttrain.config import EvalConfig, ModelConfig
from intttrain.config.errors import UserError
from intttrain.data import Batch, blank_row, stack_rows
from intttrain.layout.row_order import is_balanced, stored_units
from intttrain.layout.sharding import constrain, partition_spec, pieces_of, using_mesh
from intttrain.model import Params, Reading, bind, piece_tokens, read_documents, token_nll


@dataclasses.dataclass(frozen=True)
class PositionLosses:
    """Summed losses of one condition.

    Bucket p holds the predictions made from the tokens at positions ``edges[p - 1] <= position < edges[p]``
    (0 before the first edge). The position is the one in ``Batch.positions_BT`` of the token that predicts, so the
    prediction of a document's second token counts at position 0.

    Attributes:
      edges: right edges of the buckets, increasing.
      nll_NP: float64, sum of the negative log-likelihoods in nats.
      weight_NP: float64, number of predictions.
      state_norm_NP: float64, the largest |S|/|W0| (Frobenius) over the TTT layers with which a prediction of the bucket
        was made; 0 in the first chunk, NaN where there is no prediction; ``None`` for a model without TTT.
    """

    edges: tuple[int, ...]
    nll_NP: np.ndarray
    weight_NP: np.ndarray
    state_norm_NP: np.ndarray | None = None


def evaluate_positions(
    model_config: ModelConfig,
    params: Params,
    rows: Sequence[Batch],
    eval_config: EvalConfig,
    *,
    eta: float | None = None,
    mesh: jax.sharding.Mesh | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> PositionLosses:
    """Returns the loss of every document by position.

    ``eta`` is traced, so all calls with one ``model_config`` share one compiled program.

    Args:
      model_config: ``ttt=None`` for a dense model.
      params: its parameters, sharded or not.
      rows: one document each, arrays [T] from ``data.document_rows``, with T = ``eval_config.seq_len``.
      eval_config: ``position_edges`` and ``batch_rows`` are used.
      eta: size of an update in place of ``model_config.ttt.eta``; 0 switches the update off. ``None`` for dense.
      mesh: cuts rows over ``data`` and ``fsdp`` and their tokens over ``context``; every process gets all results.
      on_rows: called with the number of documents finished since the call before.

    Raises:
      UserError: a token id is outside the model's vocabulary.
      ValueError: no rows, a row of another length, or an ``eta`` for a dense model.
    """
    _check(model_config, rows, eval_config, eta)
    if model_config.ttt is not None and eta is None:
        eta = model_config.ttt.eta
    traced_eta = jnp.asarray(0.0 if eta is None else eta, jnp.float32)
    parts: list[PositionLosses] = []
    for start in range(0, len(rows), eval_config.batch_rows):
        chosen = rows[start : start + eval_config.batch_rows]
        # Blank rows keep the shape, hence the compiled program; they are cut off again below.
        blanks = [blank_row(eval_config.seq_len, 0)] * (eval_config.batch_rows - len(chosen))
        batch = stack_rows([*chosen, *blanks])
        if eval_config.reading == "chunks":
            score, placed = _score_in_chunks, batch
        else:
            score, placed = _score, _placed(model_config, batch, mesh)
        nll_BT, norm_BM = jax.device_get(score(model_config, mesh, params, placed, traced_eta))
        real = stack_rows(chosen)
        norms = None if norm_BM is None else norm_BM[: len(chosen)]
        parts.append(sum_by_position(nll_BT[: len(chosen)], real, eval_config.position_edges, norms))
        if on_rows is not None:
            on_rows(len(chosen))
    return join_documents(parts)


def sum_by_position(
    nll_BT: np.ndarray, batch: Batch, edges: tuple[int, ...], state_norm_BM: np.ndarray | None = None
) -> PositionLosses:
    """Returns float64 sums over the positions that carry a loss weight.

    Args:
      nll_BT: loss of every token in nats; ignored, whatever it is, where the weight is 0.
      batch: B documents, arrays [B, T].
      edges: right edges of the buckets.
      state_norm_BM: |S|/|W0| that each chunk reads.
    """
    rows, seq_len = nll_BT.shape
    weight_BT = np.asarray(batch.loss_weights_BT, np.float64)
    counted_BT = weight_BT > 0
    weighted_BT = np.where(counted_BT, nll_BT.astype(np.float64), 0.0) * weight_BT
    bucket_BT = np.searchsorted(np.asarray(edges), np.asarray(batch.positions_BT), side="right")
    nll_BP, weight_BP, norm_BP = (np.zeros((rows, len(edges))) for _ in range(3))
    if state_norm_BM is not None:
        norm_BT = np.repeat(state_norm_BM.astype(np.float64), seq_len // state_norm_BM.shape[1], axis=1)
    for p in range(len(edges)):
        inside_BT = counted_BT & (bucket_BT == p)
        nll_BP[:, p] = np.where(inside_BT, weighted_BT, 0.0).sum(axis=1)
        weight_BP[:, p] = np.where(inside_BT, weight_BT, 0.0).sum(axis=1)
        if state_norm_BM is not None:
            largest_B = np.where(inside_BT, norm_BT, -np.inf).max(axis=1)
            norm_BP[:, p] = np.where(inside_BT.any(axis=1), largest_B, np.nan)
    return PositionLosses(tuple(edges), nll_BP, weight_BP, None if state_norm_BM is None else norm_BP)


def join_documents(parts: Sequence[PositionLosses]) -> PositionLosses:
    """Returns the documents of all parts, in order; the parts have equal edges and there is at least one."""
    norms = [part.state_norm_NP for part in parts if part.state_norm_NP is not None]
    return PositionLosses(
        edges=parts[0].edges,
        nll_NP=np.concatenate([part.nll_NP for part in parts]),
        weight_NP=np.concatenate([part.weight_NP for part in parts]),
        state_norm_NP=np.concatenate(norms) if norms else None,
    )


def _placed(model_config: ModelConfig, batch: Batch, mesh: jax.sharding.Mesh | None) -> Batch:
    """Returns the batch, which every process has whole, in pieces on the devices of the mesh."""
    if mesh is None:
        return batch
    rows = NamedSharding(mesh, partition_spec(("batch", "tokens")))
    order_T = _stored(model_config, mesh, batch.tokens_BT.shape[1], 1)

    def place(x: np.ndarray) -> jax.Array:
        stored = x[:, order_T]
        return jax.make_array_from_callback(x.shape, rows, lambda index: stored[index])

    return cast(Batch, jax.tree.map(place, batch))


def _stored(model_config: ModelConfig, mesh: jax.sharding.Mesh | None, seq_len: int, unit: int) -> np.ndarray:
    """Returns the numbers of the tokens (or chunks of ``unit``) of a row in the order in which they are stored."""
    context, tensor = (1, 1) if mesh is None else (pieces_of(mesh, "tokens"), pieces_of(mesh, "heads"))
    balanced = is_balanced(model_config, seq_len, context, tensor)
    return stored_units(seq_len, context, unit, balanced=balanced)


@functools.partial(jax.jit, static_argnames=("model_config", "mesh"))
def _score(
    model_config: ModelConfig, mesh: jax.sharding.Mesh | None, params: Params, batch: Batch, eta: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the loss of every token and the largest relative state norm that each chunk reads, on all devices."""
    with using_mesh(mesh):
        decoder = bind(model_config, params)
        output = decoder(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, eta=eta)
        nll_BT = token_nll(output.hidden_BTD, decoder.output_weight(), batch.labels_BT, model_config.loss_chunk_tokens)
        nll_BT = _as_read(constrain(nll_BT, None, None), _stored(model_config, mesh, nll_BT.shape[1], 1))
        if output.ttt is None or model_config.ttt is None:
            return nll_BT, None
        chunks_M = _stored(model_config, mesh, nll_BT.shape[1], model_config.ttt.chunk_tokens)
        return nll_BT, _read_norm(_as_read(constrain(output.ttt.state_norm_nBM, None, None, None), chunks_M))


@functools.partial(jax.jit, static_argnames=("model_config", "mesh"))
def _score_in_chunks(
    model_config: ModelConfig, mesh: jax.sharding.Mesh | None, params: Params, batch: Batch, eta: jax.Array
) -> tuple[jax.Array, None]:
    """Returns the loss of every token, read chunk by chunk; the norms of states are not watched."""
    seq_len = batch.tokens_BT.shape[1]
    with using_mesh(mesh):
        decoder = bind(model_config, params)
        tokens_BT = constrain(batch.tokens_BT, "batch", None)
        length_B = jnp.sum(batch.segment_ids_BT > 0, axis=1)
        read, state = read_documents(
            decoder,
            Reading(piece_tokens(model_config, seq_len), seq_len, wants_nll=True),
            tokens_BT,
            length_B,
            jnp.arange(tokens_BT.shape[0]),
            eta=eta,
        )
        assert read.nll_BP is not None
        # The label of a row that is cut is the token after it.
        last_B1 = token_nll(state.hidden_BD[:, None], decoder.output_weight(), batch.labels_BT[:, -1:], 1)
        return constrain(jnp.concatenate([read.nll_BP[:, 1:], last_B1], axis=1), None, None), None


def _as_read(x: jax.Array, stored: np.ndarray) -> jax.Array:
    """Returns ``x``, of which the last dim is stored in this order, in the order of the row."""
    return x if np.all(np.diff(stored) == 1) else x[..., np.argsort(stored)]


def _read_norm(after_nBM: jax.Array) -> jax.Array:
    """Returns B x M: a chunk reads what the chunks before it left, the first one nothing."""
    after_BM = jnp.max(after_nBM, axis=0)
    return jnp.concatenate([jnp.zeros_like(after_BM[:, :1]), after_BM[:, :-1]], axis=1)


def _check(model_config: ModelConfig, rows: Sequence[Batch], eval_config: EvalConfig, eta: float | None) -> None:
    if not rows:
        raise ValueError("evaluate_positions needs at least one row")
    if model_config.ttt is None and eta is not None:
        raise ValueError(f"eta={eta} was given for a model with ttt=None")
    shapes = {np.shape(row.tokens_BT) for row in rows}
    if shapes != {(eval_config.seq_len,)}:
        raise ValueError(f"rows of shape {sorted(shapes)} instead of ({eval_config.seq_len},), eval.seq_len")
    largest = max(max(int(np.max(row.tokens_BT)), int(np.max(row.labels_BT))) for row in rows)
    if largest >= model_config.vocab_size:  # a gather outside the embedding is silent on devices
        raise UserError(
            f"the held-out documents hold token id {largest} but model.vocab_size={model_config.vocab_size} ends at "
            f"{model_config.vocab_size - 1}; use a store made by the tokenizer of the model"
        )
