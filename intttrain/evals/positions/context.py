"""What more context is worth: the loss of a fixed last block as the text before it grows.

The same tokens are predicted each time, so nothing but the context differs (In-Place TTT, arXiv 2604.06169, calls this
sliding-window perplexity). Documents are read chunk by chunk, so memory grows with their keys only, which a sliding
window bounds too.

Letters: N documents, T tokens, L tokens of one length (context and block), P tokens that were read (all L), B rows of
one call, Q lengths.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intttrain import ttt
from intttrain.config import EvalConfig, ModelConfig
from intttrain.config.errors import UserError
from intttrain.config.registry import EVAL_TASKS
from intttrain.data import Batch
from intttrain.evals.batches import full_batches
from intttrain.evals.bootstrap import (
    FEW_DOCUMENTS,
    INTERVAL,
    Estimate,
    bootstrap_difference,
    bootstrap_level,
    few_warning,
)
from intttrain.evals.conditions import Condition
from intttrain.evals.run import EvalRun
from intttrain.evals.tables import aligned, estimate_json, with_interval
from intttrain.layout.sharding import constrain, using_mesh
from intttrain.model import Params, Reading, bind, piece_tokens, read_documents


@dataclasses.dataclass(frozen=True)
class ContextReport:
    """Losses of the last block, one column per length.

    Attributes:
      name: of the run.
      unit: ``bits per byte`` or ``bits per token``.
      lengths: Q, tokens that were read.
      block_tokens: of which the last so many are predicted.
      documents: N.
      levels: by condition; differences: ``FIRST - OTHER`` of the same documents.
    """

    name: str
    unit: str
    lengths: tuple[int, ...]
    block_tokens: int
    documents: int
    levels: dict[str, Estimate]
    differences: dict[str, Estimate]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before the numbers are believed, one line each."""
        return (few_warning(f"{self.documents} documents"),) if self.documents < FEW_DOCUMENTS else ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain containers."""
        columns = [
            {
                "length": length,
                "levels": {name: estimate_json(level, q) for name, level in self.levels.items()},
                "differences": {name: estimate_json(x, q) for name, x in self.differences.items()},
            }
            for q, length in enumerate(self.lengths)
        ]
        return {
            "name": self.name, "unit": self.unit, "block_tokens": self.block_tokens, "documents": self.documents,
            "interval": INTERVAL, "columns": columns, "warnings": list(self.warnings),
        }  # fmt: skip

    def table(self) -> str:
        """Returns the result as text for a terminal, ending in a newline."""
        cells = [["tokens read", *self.levels, *self.differences]]
        for q, length in enumerate(self.lengths):
            levels = (with_interval(level, q, interval_digits=2) for level in self.levels.values())
            cells.append([str(length), *levels, *(with_interval(x, q, signed=True) for x in self.differences.values())])
        head = (
            f"{self.name}: loss of the last {self.block_tokens} tokens of {self.documents} documents, {self.unit}, by "
            f"how much was read\n[ ]: {INTERVAL:.0%} interval over documents"
        )
        return "\n".join([head, "", *aligned(cells), *(f"warning: {warning}" for warning in self.warnings)]) + "\n"


@EVAL_TASKS.register("context")
def evaluate_context(run: EvalRun) -> None:
    """Reports what more context is worth to a checkpoint, under each of its conditions."""
    longest = max(run.config.eval.context.lengths)
    result = evaluate_contexts(
        run.conditions(), run.heldout(longest, longest), run.config.eval, name=run.config.name,
        unit=run.config.prepare.tokenizer.loss_unit, report=run.report, mesh=run.mesh,
    )  # fmt: skip
    run.finish(result)


def evaluate_contexts(
    conditions: Mapping[str, Condition],
    rows: Sequence[Batch],
    config: EvalConfig,
    *,
    name: str,
    unit: str,
    report: Callable[[str], None],
    mesh: jax.sharding.Mesh | None = None,
) -> ContextReport:
    """Reads the end of every document with each length of context.

    Args:
      conditions: by name; the report compares the first with each other one.
      rows: documents of at least the longest length, all ending there.
      config: ``context``, ``batch_rows`` and the bootstrap are used.
      name, unit: for the report.
      report: receives progress lines.
      mesh: rows are cut over ``data`` and ``fsdp``.

    Raises:
      UserError: a block that is longer than a length, or lengths that are not whole chunks.
    """
    lengths, block = config.context.lengths, config.context.block_tokens
    for condition in conditions.values():
        _check(condition.model, lengths, block)
    tokens_NT = np.stack([np.asarray(row.tokens_BT, np.int32) for row in rows])
    sums: dict[str, np.ndarray] = {}
    for label, condition in conditions.items():
        report(f"{label}: the last {block} tokens of {len(rows)} documents after reading {list(lengths)}")
        sums[label] = np.stack(
            [_last_block(condition, tokens_NT[:, -length:], block, config.batch_rows, mesh) for length in lengths],
            axis=1,
        )
    weight_NQ = np.full((len(rows), len(lengths)), float(block))
    options: dict[str, int] = {"samples": config.bootstrap_samples, "seed": config.seed}
    first, *others = sums
    return ContextReport(
        name=name,
        unit=unit,
        lengths=lengths,
        block_tokens=block,
        documents=len(rows),
        levels={label: bootstrap_level(nll_NQ, weight_NQ, **options) for label, nll_NQ in sums.items()},
        differences={
            f"{first} - {other}": bootstrap_difference(sums[first], sums[other], weight_NQ, **options)
            for other in others
        },
    )


def _check(model: ModelConfig, lengths: tuple[int, ...], block: int) -> None:
    piece = model.ttt.chunk_tokens if model.ttt is not None else 1
    for length in lengths:
        if length % piece or length <= block:
            longest = max(piece, -(-(block + 1) // piece) * piece)
            raise UserError(
                f"eval.context.lengths={list(lengths)}: {length} must be a multiple of {piece} and more than "
                f"eval.context.block_tokens={block}; use for example {max(longest, round(length / piece) * piece)}"
            )


def _last_block(
    condition: Condition, tokens_NL: np.ndarray, block: int, batch_rows: int, mesh: jax.sharding.Mesh | None
) -> np.ndarray:
    """Returns the summed loss of the last ``block`` tokens of every document, nats."""
    parts = []
    for count, padded in full_batches(len(tokens_NL), batch_rows):
        settings = jax.tree.map(jnp.asarray, condition.settings)
        nll_B = _read(
            condition.model, mesh, condition.gate, block, condition.params, tokens_NL[padded], padded,
            jnp.float32(condition.eta), settings,
        )  # fmt: skip
        parts.append(np.asarray(nll_B, np.float64)[:count])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _read(
    model: ModelConfig, mesh: jax.sharding.Mesh | None, gate: ttt.GateRule, block: int, params: Params,
    tokens_BL: jax.Array, document_B: jax.Array, eta: jax.Array, settings: ttt.GateSettings,
) -> jax.Array:  # fmt: skip
    rows, length = tokens_BL.shape
    reading = Reading(piece_tokens(model, length), length, gate, wants_nll=True)
    with using_mesh(mesh):
        tokens_BL = constrain(tokens_BL, "batch", None)
        lengths_B = jnp.full((rows,), length)
        read, _ = read_documents(bind(model, params), reading, tokens_BL, lengths_B, document_B, eta=eta, gate=settings)
        assert read.nll_BP is not None
        return constrain(jnp.sum(read.nll_BP[:, -block:], axis=1), None)
