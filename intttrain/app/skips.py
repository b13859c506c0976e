"""Steps that were not applied: which rows to look at, when to pass over them, and when to give up.

A step whose loss, gradient or outcome is not finite, or whose loss is a spike, changes nothing (``train/step.py``). So
there is nothing to undo: the run goes on behind its rows.

Letters: B rows of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from intttrain.config.errors import UserError
from intttrain.config.run_stages import Stage
from intttrain.config.training import SkipConfig
from intttrain.data import describe_rows
from intttrain.train import StepMetrics


class UnhealthyStepsError(UserError):
    """Too many steps were not applied. The state before them is saved."""

    status = 3


@dataclasses.dataclass(frozen=True)
class BadStep:
    """A step that was not applied.

    Attributes:
      stage: to which it belongs.
      step: the number that it would have had.
      cursor: the data cursor before it.
      rows: the global rows to look at.
      loss, grad_norm, loss_limit: its numbers; without a limit that is infinite.
      not_finite: the parts of what the step would have made that are not finite.
    """

    stage: Stage
    step: int
    cursor: int
    rows: list[int]
    loss: float
    grad_norm: float
    loss_limit: float
    not_finite: tuple[str, ...]

    @property
    def reason(self) -> str:
        """What is wrong with its numbers."""
        numbers = f"loss={self.loss:.4g} grad_norm={self.grad_norm:.4g}"
        if not (np.isfinite(self.loss) and np.isfinite(self.grad_norm)):
            return f"{numbers} is not finite"
        if self.loss > self.loss_limit:
            return f"loss={self.loss:.4g} is above {self.loss_limit:.4g}, a spike"
        return f"{numbers}, but the new {' and '.join(self.not_finite)} would not be finite"

    @property
    def places(self) -> str:
        """Its rows with their documents."""
        rows = "; ".join(describe_rows(self.stage.config.data, self.rows[:3], self.stage.block_tokens))
        return f"rows {self.rows[0]} to {self.rows[-1]} ({rows})"


def find_bad_step(stage: Stage, step: int, cursor: int, metrics: StepMetrics) -> BadStep | None:
    """Returns the step if it was not applied. The rows are those whose loss is not finite or a spike, else all."""
    if bool(metrics.healthy):
        return None
    limit = float("inf") if metrics.loss_limit is None else float(metrics.loss_limit)
    row_loss_B = np.asarray(metrics.row_loss_B)
    suspects = np.flatnonzero(~(np.isfinite(row_loss_B) & (row_loss_B <= limit)))
    first = stage.first_row(cursor)
    rows = [first + int(row) for row in (suspects if len(suspects) else range(len(row_loss_B)))]
    numbers = float(metrics.loss), float(metrics.grad_norm), limit, metrics.finite.broken
    return BadStep(stage, step, cursor, rows, *numbers)


class Skips:
    """The batches that a run did not learn from.

    Args:
      config: when to give up.
      batches: (step, data cursor) of those before this process.
      report: receives a line for each.
    """

    def __init__(self, config: SkipConfig, batches: Sequence[Sequence[int]], report: Callable[[str], None]) -> None:
        self._config, self._report = config, report
        self.batches = [(step, cursor) for step, cursor in batches]

    def pass_over(self, bad: BadStep, save: Callable[[], None]) -> int:
        """Returns the data cursor to go on from, behind the rows of ``bad``.

        Args:
          bad: the step.
          save: called if it is one too many, with the run back before it.

        Raises:
          UnhealthyStepsError: it is one too many; what is before it is saved.
        """
        good = bad.step - 1
        in_a_row = 1 + sum(step == good for step, _ in self.batches)
        total = 1 + len(self.batches)
        if in_a_row >= self._config.max_in_a_row or total >= self._config.max_total:
            save()
            raise self._too_many(bad, in_a_row, total)
        self.batches.append((good, bad.cursor))
        self._report(
            f"warning: step {bad.step}: {bad.reason}; the update was not applied, {bad.places} are skipped "
            f"({in_a_row} in a row, {total} in all)"
        )
        return bad.stage.cursor_after(bad.cursor)

    def _too_many(self, bad: BadStep, in_a_row: int, total: int) -> UnhealthyStepsError:
        good = bad.step - 1
        earlier = [cursor for step, cursor in self.batches if step == good]
        before = f"; skipped before it: batches at data cursor {', '.join(map(str, earlier))}" if earlier else ""
        return UnhealthyStepsError(
            f"step {bad.step}: {bad.reason}; the update was not applied and step {good} is saved. "
            f"Look at {bad.places}{before}. That makes {in_a_row} in a row (train.skip.max_in_a_row="
            f"{self._config.max_in_a_row}) and {total} in all (train.skip.max_total={self._config.max_total}): raise "
            "the one that was reached to skip more, or start another --workdir with a lower "
            "train.schedule.peak_learning_rate or model.ttt.eta"
        )
