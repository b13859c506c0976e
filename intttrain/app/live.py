"""Held-out loss of the live parameters while they are trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import jax

from intttrain.config import Config
from intttrain.data import TokenStore, document_rows
from intttrain.evals import evaluate_run
from intttrain.logs.progress import human_duration
from intttrain.model import Params

PREFIX = "eval/"  # of the metrics


class LiveEvaluation:
    """What ``intttrain eval`` measures by position, at multiples of ``eval.every_steps`` and at the last step."""

    def __init__(self, config: Config, report: Callable[[str], None]) -> None:
        """Reads the held-out documents, which every process has whole.

        Args:
          config: of the run, whose stores have been checked against its tokenizer and vocabulary.
          report: receives a line for each evaluation.

        Raises:
          UserError: no held-out document is long enough.
        """
        self._every_steps, self._last_step = config.eval.every_steps, config.train.num_steps
        self._report = report
        self._evaluated = -1, math.nan  # step and loss of the last evaluation
        if config.eval.every_steps is not None and config.data.heldout is not None:
            self._rows = document_rows(
                TokenStore.open(config.data.heldout), seq_len=config.eval.seq_len,
                min_document_tokens=config.eval.min_document_tokens, max_documents=config.eval.documents,
                seed=config.eval.seed,
            ).rows  # fmt: skip

    def is_due(self, step: int) -> bool:
        """Returns whether the state after ``step`` is to be evaluated."""
        return self._every_steps is not None and (step % self._every_steps == 0 or step == self._last_step)

    def evaluate(self, step: int, config: Config, params: Params, mesh: jax.sharding.Mesh) -> dict[str, float]:
        """Returns metrics (``PositionReport.scalars``); all processes call it together and get the same.

        Args:
          step: completed steps, for the report.
          config: of the stage that made the step; its model may differ from that of other stages.
          params: of the live state, which are read where they lie.
          mesh: of the stage.
        """
        began_s = time.monotonic()
        result = evaluate_run(
            config, params, dense=None, heldout_rows=self._rows, train_store=None, report=lambda _: None, mesh=mesh
        )
        scalars = result.scalars()
        levels = ", ".join(f"{name} {scalars[name]:.4f}" for name in result.levels)
        seconds = human_duration(time.monotonic() - began_s)
        self._report(f"step {step}: held out {levels} {result.unit}, {result.num_documents} documents in {seconds}")
        self._evaluated = step, scalars["on" if config.model.ttt is not None else "dense"]
        return {PREFIX + name: value for name, value in scalars.items()}

    def loss_after(self, step: int) -> float | None:
        """Returns the loss, with the update on, of the state after ``step`` if that was the last to be evaluated."""
        evaluated, loss = self._evaluated
        return loss if evaluated == step and math.isfinite(loss) else None
