"""Scores of RULER with intervals, differences between conditions, JSON and a table.

Letters: N samples of a task, T tasks (not tokens), Q = T + 1 columns: the tasks and, last, their average. Samples are
what is resampled, and sample n of every task and condition is drawn together: differences are paired, and the niah
tasks, which share their needles, do not count as independent.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intttrain.config import EvalConfig
from intttrain.config.evaluation import RulerTask
from intttrain.evals.bootstrap import FEW_DOCUMENTS, INTERVAL, Estimate, bootstrap_scores, few_warning
from intttrain.evals.ruler.tasks import ALL_TASKS, RulerSet, new_tokens, score_answer
from intttrain.evals.tables import aligned, estimate_json, with_interval


@dataclasses.dataclass(frozen=True)
class LengthScores:
    """Scores of one length, 0 to 100.

    Attributes:
      length: tokens of prompt and answer together.
      tasks: of the columns; the last column has no task but their average.
      prompt_tokens: mean over the samples of each task.
      levels: by condition.
      differences: ``"on - off"`` and so on, paired over samples; positive means that the first is better.
      empty: answers without text, by condition and task.
    """

    length: int
    tasks: tuple[RulerTask, ...]
    prompt_tokens: tuple[float, ...]
    levels: dict[str, Estimate]
    differences: dict[str, Estimate]
    empty: dict[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        """Returns plain containers; an interval of fewer than two samples is ``None``."""
        columns = [self._column(q) for q in range(len(self.tasks) + 1)]
        for q, column in enumerate(columns[:-1]):
            column["prompt_tokens"] = self.prompt_tokens[q]
            column["empty"] = {condition: counts[q] for condition, counts in self.empty.items()}
        return {
            "length": self.length,
            "tasks": dict(zip(self.tasks, columns[:-1], strict=True)),
            "average": columns[-1],
        }

    def _column(self, q: int) -> dict[str, Any]:
        return {
            "levels": {name: estimate_json(estimate, q) for name, estimate in self.levels.items()},
            "differences": {name: estimate_json(estimate, q) for name, estimate in self.differences.items()},
        }

    def table(self) -> list[str]:
        """Returns the lines of one block."""
        names = [*self.tasks, f"average of {len(self.tasks)}"]
        tokens = [*(f"{count:.0f}" for count in self.prompt_tokens), f"{np.mean(self.prompt_tokens):.0f}"]
        cells = [[f"{self.length} tokens", "prompt", *self.levels, *self.differences]]
        for q, name in enumerate(names):
            levels = [with_interval(estimate, q, digits=1) for estimate in self.levels.values()]
            differences = [with_interval(e, q, signed=True, digits=1) for e in self.differences.values()]
            cells.append([name, tokens[q], *levels, *differences])
        return aligned(cells)


@dataclasses.dataclass(frozen=True)
class RulerReport:
    """Scores of every length; made by ``make_ruler_report``."""

    name: str
    samples: int  # of each task and length
    lengths: tuple[LengthScores, ...]
    bootstrap_samples: int
    bootstrap_seed: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain containers."""
        return {
            "name": self.name,
            "samples": self.samples,
            "interval": INTERVAL,
            "bootstrap_samples": self.bootstrap_samples,
            "bootstrap_seed": self.bootstrap_seed,
            "lengths": [scores.to_json() for scores in self.lengths],
            "warnings": list(self.warnings),
        }

    def table(self) -> str:
        """Returns the result as text for a terminal, ending in a newline."""
        lines = [
            f"{self.name}: RULER, 0 to 100, higher is better",
            f"{self.samples} samples of each task; [ ]: {INTERVAL:.0%} interval over samples "
            f"({self.bootstrap_samples} resamples), not over training seeds",
        ]
        for scores in self.lengths:
            lines += ["", *scores.table()]
        lines += ["", *(f"warning: {warning}" for warning in self.warnings)] if self.warnings else []
        return "\n".join(lines) + "\n"


def make_ruler_report(
    sets: Sequence[RulerSet], texts: Mapping[str, Sequence[Sequence[str]]], config: EvalConfig, *, name: str
) -> RulerReport:
    """Returns the report of the answers in ``texts``: by condition, for every set and every sample of it.

    Every length has the same tasks, and every set the same number of samples.
    """
    lengths = []
    for length in dict.fromkeys(ruler_set.length for ruler_set in sets):
        chosen = [i for i, ruler_set in enumerate(sets) if ruler_set.length == length]
        answers = {condition: [given[i] for i in chosen] for condition, given in texts.items()}
        lengths.append(_scores_of_length([sets[i] for i in chosen], answers, config))
    return RulerReport(
        name=name,
        samples=len(sets[0].samples),
        lengths=tuple(lengths),
        bootstrap_samples=config.bootstrap_samples,
        bootstrap_seed=config.seed,
        warnings=tuple(_warnings(sets)),
    )


def _scores_of_length(
    sets: Sequence[RulerSet], texts: Mapping[str, Sequence[Sequence[str]]], config: EvalConfig
) -> LengthScores:
    score_NQ = {condition: _with_average(_scores(sets, given)) for condition, given in texts.items()}
    pairs = itertools.combinations(score_NQ, 2)
    levels, differences = bootstrap_scores(score_NQ, pairs, samples=config.bootstrap_samples, seed=config.seed)
    return LengthScores(
        length=sets[0].length,
        tasks=tuple(ruler_set.task for ruler_set in sets),
        prompt_tokens=tuple(float(np.mean([x.prompt_tokens for x in ruler_set.samples])) for ruler_set in sets),
        levels=levels,
        differences=differences,
        empty={
            condition: tuple(sum(not text.strip() for text in of_set) for of_set in given)
            for condition, given in texts.items()
        },
    )


def _scores(sets: Sequence[RulerSet], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns samples x tasks."""
    columns = [
        [score_answer(s.task, text, sample.answers) for sample, text in zip(s.samples, given, strict=True)]
        for s, given in zip(sets, texts, strict=True)
    ]
    return np.array(columns, np.float64).T


def _with_average(score_NT: np.ndarray) -> np.ndarray:
    return np.concatenate([score_NT, score_NT.mean(axis=1, keepdims=True)], axis=1)


def _warnings(sets: Sequence[RulerSet]) -> list[str]:
    lines = []
    tasks = {ruler_set.task for ruler_set in sets}
    if len(tasks) < len(ALL_TASKS):
        lines.append(f"{len(tasks)} of {len(ALL_TASKS)} tasks: published averages are over all of them")
    samples = len(sets[0].samples)
    if samples < FEW_DOCUMENTS:
        lines.append(few_warning(f"{samples} samples of each task"))
    for ruler_set in sets:
        allowed = new_tokens(ruler_set.task)
        cut = sum(sample.answer_tokens > allowed for sample in ruler_set.samples)
        if cut:
            lines.append(
                f"{ruler_set.task} of {ruler_set.length} tokens: {cut} of {samples} answers need more than the "
                f"{allowed} tokens that the task allows, so 100 is out of reach with this tokenizer"
            )
    return lines
