"""Held-out documents read under gates: the model's side of a gating study.

Documents are read chunk by chunk, as in generation, so a rule may look at the layer or at the whole model.

Letters: N documents, M chunks of a document, C tokens per chunk, n TTT layers, T tokens, P tokens that were
read (all T), D model width, B rows of one call, R rows that are asked for.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from intttrain import ttt
from intttrain.config import ModelConfig
from intttrain.data import Batch
from intttrain.evals.batches import full_batches
from intttrain.evals.gating.oracles import GateGradients, Losses
from intttrain.layout.sharding import constrain, using_mesh
from intttrain.model import Params, Reading, bind, read_documents, token_nll

FORCED = ttt.GateRule("forced")
SHUFFLED_EVERY, FIRST_SHUFFLED = 8, 3  # chunks of a document whose tokens are shuffled, as a control


class Gated(NamedTuple):
    """What a rule did with all documents.

    Attributes:
      nll_NM: float64, summed loss of the predictions made from each chunk, nats.
      gates_NMn, signal_NMn, margin_NMn: decisions.
      seconds: wall clock of reading them, without compilation.
    """

    nll_NM: np.ndarray
    gates_NMn: np.ndarray
    signal_NMn: np.ndarray
    margin_NMn: np.ndarray
    seconds: float


class GatedDocuments:
    """Held-out documents of one length and the model that reads them.

    Args:
      config, params: a model with TTT, its parameters on ``mesh`` if there is one.
      rows: one document each, of exactly T tokens.
      batch_rows: B.
      mesh: rows are cut over ``data`` and ``fsdp``.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        rows: Sequence[Batch],
        *,
        batch_rows: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        assert config.ttt is not None
        self._config, self._params, self._mesh, self._batch_rows = config, params, mesh, batch_rows
        self.tokens_NT = np.stack([np.asarray(row.tokens_BT, np.int32) for row in rows])
        documents, tokens = self.tokens_NT.shape
        self.chunks, self.layers = tokens // config.ttt.chunk_tokens, len(config.ttt.layers)
        self.weights_NM = np.full((documents, self.chunks), float(config.ttt.chunk_tokens))
        self.weights_NM[:, -1] -= 1  # nothing says what follows the last token
        self._eta = jnp.float32(config.ttt.eta)
        self._programs: dict[ttt.GateRule, Any] = {}

    def read(self, rule: ttt.GateRule, settings: ttt.GateSettings, documents_R: np.ndarray | None = None) -> Gated:
        """Reads documents (default: all) under a rule; ``settings.forced_nBM`` has R rows."""
        documents_R = np.arange(len(self.tokens_NT)) if documents_R is None else documents_R
        program = self._program(rule, settings)
        began, parts = time.perf_counter(), []
        for count, asked_B in full_batches(len(documents_R), self._batch_rows):
            chosen_B = documents_R[asked_B]
            found = program(self._params, self.tokens_NT[chosen_B], chosen_B, self._eta, _of_rows(settings, asked_B))
            parts.append([np.asarray(x)[:count] for x in found])
        nll_RM, gates_RMn, signal_RMn, margin_RMn = (np.concatenate(x) for x in zip(*parts, strict=True))
        seconds = time.perf_counter() - began
        return Gated(nll_RM.astype(np.float64), gates_RMn, signal_RMn, margin_RMn, seconds)

    def losses(self) -> Losses:
        """Returns the model under forced decisions, as oracles and controls ask for it."""

        def ask(documents_R: np.ndarray, gates: np.ndarray) -> np.ndarray:
            gates_RMn = np.broadcast_to(gates.reshape(*gates.shape[:2], -1), (*gates.shape[:2], self.layers))
            forced_nRM = np.moveaxis(gates_RMn, 2, 0).astype(np.float32)
            return self.read(FORCED, ttt.GateSettings(forced_nBM=forced_nRM), documents_R).nll_NM

        return ask

    def gradients(self) -> GateGradients:
        """Returns losses and their gradient with respect to gates that the layers share."""

        def ask(documents_R: np.ndarray, gates_RM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            parts = []
            for count, asked_B in full_batches(len(documents_R), self._batch_rows):
                tokens_BT, gates_BM = self.tokens_NT[documents_R[asked_B]], gates_RM[asked_B].astype(np.float32)
                found = _gradient(self._config, self._mesh, self._params, tokens_BT, gates_BM, self._eta)
                parts.append([np.asarray(x, np.float64)[:count] for x in found])
            nll_RM, slope_RM = (np.concatenate(x) for x in zip(*parts, strict=True))
            return nll_RM, slope_RM

        return ask

    def shuffled(self, seed: int) -> tuple[GatedDocuments, np.ndarray]:
        """Returns the documents with every eighth chunk in another order of its tokens, and bool M: which chunks."""
        noisy_M = np.arange(self.chunks) % SHUFFLED_EVERY == FIRST_SHUFFLED
        noisy_M[-1] = False  # nobody reads what it writes
        chunks_NMC = self.tokens_NT.reshape(len(self.tokens_NT), self.chunks, -1).copy()
        chunks_NMC[:, noisy_M] = np.random.default_rng(seed).permuted(chunks_NMC[:, noisy_M], axis=2)
        noisy = copy.copy(self)
        noisy.tokens_NT = chunks_NMC.reshape(self.tokens_NT.shape)
        return noisy, noisy_M

    def dense_nll(self, model: ModelConfig, params: Params) -> np.ndarray:
        """Returns the losses of a model without TTT by the same chunks (N M, nats)."""
        parts = []
        chunk_tokens = self.tokens_NT.shape[1] // self.chunks
        for count, asked_B in full_batches(len(self.tokens_NT), self._batch_rows):
            found_BM = _read_dense(model, self._mesh, chunk_tokens, params, self.tokens_NT[asked_B])
            parts.append(np.asarray(found_BM, np.float64)[:count])
        return np.concatenate(parts)

    def compiled_flops(self, rule: ttt.GateRule, settings: ttt.GateSettings) -> float | None:
        """Returns what the compiler counts for a call under this rule; ``None`` where it does not count."""
        cost = self._program(rule, settings).cost_analysis()
        return None if not cost else float(cost.get("flops", 0.0)) or None

    def _program(self, rule: ttt.GateRule, settings: ttt.GateSettings) -> Any:
        """Returns the compiled program of a rule, whatever its numbers."""
        if rule not in self._programs:
            rows, tokens = self._batch_rows, self.tokens_NT.shape[1]
            lowered = _read.lower(
                self._config, self._mesh, rule, self._params, jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
                np.zeros(rows, np.int64), self._eta, _of_rows(settings, np.zeros(rows, np.int64)),
            )  # fmt: skip
            self._programs[rule] = lowered.compile()
        return self._programs[rule]


def _of_rows(settings: ttt.GateSettings, asked_B: np.ndarray) -> ttt.GateSettings:
    """Returns the settings as arrays, with the forced gates of the rows of one call."""
    # A seed has 32 bits; jit itself would take a Python int below 2^31 only.
    settings = jax.tree.map(lambda x: np.asarray(x, np.uint32 if isinstance(x, int) else np.float32), settings)
    return settings if settings.forced_nBM is None else settings._replace(forced_nBM=settings.forced_nBM[:, asked_B])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    config: ModelConfig, mesh: jax.sharding.Mesh | None, rule: ttt.GateRule, params: Params, tokens_BT: jax.Array,
    document_B: jax.Array, eta: jax.Array, settings: ttt.GateSettings,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Returns the losses by chunk (B M), and gates, signals and margins (B M n)."""
    assert config.ttt is not None
    rows, tokens = tokens_BT.shape
    chunk_tokens = config.ttt.chunk_tokens
    reading = Reading(chunk_tokens, tokens, rule, wants_nll=True)
    with using_mesh(mesh):
        tokens_BT = constrain(tokens_BT, "batch", None)
        found, _ = read_documents(
            bind(config, params), reading, tokens_BT, jnp.full((rows,), tokens), document_B, eta=eta, gate=settings
        )
        assert found.nll_BP is not None and found.decision is not None
        decisions = [constrain(jnp.moveaxis(x_nBM, 0, 2), None, None, None) for x_nBM in found.decision]
        return constrain(_by_chunk(found.nll_BP[:, 1:], chunk_tokens), None, None), *decisions


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read_dense(
    config: ModelConfig, mesh: jax.sharding.Mesh | None, chunk_tokens: int, params: Params, tokens_BT: jax.Array
) -> jax.Array:
    rows, tokens = tokens_BT.shape
    with using_mesh(mesh):
        found, _ = read_documents(
            bind(config, params), Reading(chunk_tokens, tokens, wants_nll=True), constrain(tokens_BT, "batch", None),
            jnp.full((rows,), tokens), jnp.arange(rows), eta=jnp.float32(0.0),
        )  # fmt: skip
        assert found.nll_BP is not None
        return constrain(_by_chunk(found.nll_BP[:, 1:], chunk_tokens), None, None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(
    config: ModelConfig, mesh: jax.sharding.Mesh | None, params: Params, tokens_BT: jax.Array, gates_BM: jax.Array,
    eta: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns losses by chunk and their sum's gradient, of whole rows at once."""
    assert config.ttt is not None
    chunk_tokens = config.ttt.chunk_tokens

    def total(gates_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoder = bind(config, params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        hidden_BTD = decoder(tokens_BT, ids_BT, positions_BT, eta=eta, gates_BM=gates_BM).hidden_BTD
        labels_BT = jnp.roll(tokens_BT, -1, axis=1)
        nll_BT = token_nll(hidden_BTD, decoder.output_weight(), labels_BT, config.loss_chunk_tokens)
        nll_BM = _by_chunk(nll_BT[:, :-1], chunk_tokens)
        return jnp.sum(nll_BM), nll_BM

    with using_mesh(mesh):
        (_, nll_BM), slope_BM = jax.value_and_grad(total, has_aux=True)(gates_BM)
        return constrain(nll_BM, None, None), constrain(slope_BM, None, None)


def _by_chunk(nll_from_BT: jax.Array, chunk_tokens: int) -> jax.Array:
    """Returns sums over the chunks that predictions were made from; the last has one less."""
    padded_BT = jnp.pad(nll_from_BT, ((0, 0), (0, 1)))
    return jnp.sum(padded_BT.reshape(padded_BT.shape[0], -1, chunk_tokens), axis=2)
