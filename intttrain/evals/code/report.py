"""pass@k and its intervals, as JSON and as a table.

Letters: N problems, K values of k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from intttrain.evals.bootstrap import FEW_DOCUMENTS, INTERVAL, Estimate, bootstrap_scores, few_warning
from intttrain.evals.code.sandbox import Outcome, Verdict
from intttrain.evals.tables import aligned, estimate_json, with_interval


@dataclasses.dataclass(frozen=True)
class CodeReport:
    """Made by ``make_code_report``.

    Attributes:
      name: of the run.
      problems, samples: N, and completions of each.
      pass_at: the K values of k.
      levels: by condition, pass@k in percent.
      differences: ``"on - off"`` and so on, the first condition and each other one, paired over problems.
      outcomes: by condition, how many programs ended in which way.
      bootstrap_samples, bootstrap_seed: of all intervals.
      warnings: one line each.
    """

    name: str
    problems: int
    samples: int
    pass_at: tuple[int, ...]
    levels: dict[str, Estimate]
    differences: dict[str, Estimate]
    outcomes: dict[str, dict[str, int]]
    bootstrap_samples: int
    bootstrap_seed: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain containers; an end of an interval that is unknown is ``None``."""
        return {
            "name": self.name,
            "benchmark": "HumanEval",
            "unit": "percent",
            "problems": self.problems,
            "samples": self.samples,
            "interval": INTERVAL,
            "bootstrap_samples": self.bootstrap_samples,
            "bootstrap_seed": self.bootstrap_seed,
            "levels": {name: self._by_k(estimate) for name, estimate in self.levels.items()},
            "differences": {name: self._by_k(estimate) for name, estimate in self.differences.items()},
            "outcomes": self.outcomes,
            "warnings": list(self.warnings),
        }

    def _by_k(self, estimate: Estimate) -> dict[str, Any]:
        return {f"pass@{k}": estimate_json(estimate, i) for i, k in enumerate(self.pass_at)}

    def table(self) -> str:
        """Returns the result as text for a terminal, ending in a newline."""
        kinds = get_args(Outcome)
        cells = [["", *(f"pass@{k}" for k in self.pass_at), *(kind.replace("_", " ") for kind in kinds)]]
        for name, estimate in self.levels.items():
            rates = [with_interval(estimate, i, digits=1) for i in range(len(self.pass_at))]
            cells.append([name, *rates, *(str(self.outcomes[name][kind]) for kind in kinds)])
        for name, estimate in self.differences.items():
            rates = [with_interval(estimate, i, signed=True, digits=1) for i in range(len(self.pass_at))]
            cells.append([name, *rates, *("" for _ in kinds)])
        lines = [
            f"{self.name}: HumanEval, pass@k in percent, higher is better",
            f"{self.problems} problems, {self.samples} completions of each; [ ]: {INTERVAL:.0%} interval over problems "
            f"({self.bootstrap_samples} resamples), not over training seeds",
            "",
            *aligned(cells),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines) + "\n"


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Returns the probability that at least one of ``k`` of the samples, drawn without replacement, is correct.

    1 - C(samples - correct, k) / C(samples, k) as a product, which does not overflow (arXiv 2107.03374, figure 3).
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must be from 1 to samples={samples}")
    return float(
        1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)) if samples - correct >= k else 1.0
    )


def make_code_report(
    verdicts: Mapping[str, Sequence[Sequence[Verdict]]],
    pass_at: Sequence[int],
    *,
    name: str,
    bootstrap_samples: int,
    bootstrap_seed: int,
) -> CodeReport:
    """Returns the report of ``verdicts``: by condition, for every problem, one for each of its completions."""
    first = next(iter(verdicts))
    problems, samples = len(verdicts[first]), len(verdicts[first][0])
    percent_NK = {
        condition: np.array([[100.0 * pass_at_k(samples, _passed(of), k) for k in pass_at] for of in by_problem])
        for condition, by_problem in verdicts.items()
    }
    pairs = [(first, other) for other in verdicts if other != first]
    levels, differences = bootstrap_scores(percent_NK, pairs, samples=bootstrap_samples, seed=bootstrap_seed)
    return CodeReport(
        name=name,
        problems=problems,
        samples=samples,
        pass_at=tuple(pass_at),
        levels=levels,
        differences=differences,
        outcomes={condition: _counts(by_problem) for condition, by_problem in verdicts.items()},
        bootstrap_samples=bootstrap_samples,
        bootstrap_seed=bootstrap_seed,
        warnings=(few_warning(f"{problems} problems"),) if problems < FEW_DOCUMENTS else (),
    )


def _passed(verdicts: Sequence[Verdict]) -> int:
    return sum(verdict.outcome == "passed" for verdict in verdicts)


def _counts(by_problem: Sequence[Sequence[Verdict]]) -> dict[str, int]:
    found = [verdict.outcome for verdicts in by_problem for verdict in verdicts]
    return {kind: found.count(kind) for kind in get_args(Outcome)}
