"""The result of an evaluation: bits per token by position, differences between conditions, JSON and a table.

Letters: N documents, P position buckets, Q = P + 1 columns: the buckets and, last, all positions together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intttrain.config import EvalConfig
from intttrain.evals.bootstrap import (
    FEW_DOCUMENTS,
    INTERVAL,
    Estimate,
    bootstrap_difference,
    bootstrap_level,
    few_warning,
)
from intttrain.evals.positions.losses import PositionLosses
from intttrain.evals.tables import aligned, estimate_json, finite, number, with_interval

CONDITIONS = ("on", "off", "dense")
BASELINES = ("unigram", "bigram")
DIFFERENCES = (("on", "off"), ("on", "dense"), ("off", "dense"))
LARGE_STATE_NORM = 10.0  # |S|/|W0|; healthy runs stay below about 4


@dataclasses.dataclass(frozen=True)
class PositionReport:
    """Losses by position; made by ``make_report``.

    Attributes:
      name: of the run.
      unit: ``bits per byte`` or ``bits per token``.
      edges: right edges of the buckets, exclusive.
      num_documents: N.
      documents_Q, tokens_Q: documents that reach a column, and predictions in it.
      levels: ``on`` (update as configured), ``off`` (same parameters, no update), ``dense`` (another model, trained
        without TTT), ``unigram``, ``bigram``, as far as given, in this order.
      differences: ``"on - off"`` and so on, paired over documents; negative means that the first is better.
      state_norm_Q: largest |S|/|W0| that a prediction was made with; ``None`` without ``on``.
      bootstrap_samples, bootstrap_seed: of all intervals.
      warnings: one line each.
    """

    name: str
    unit: str
    edges: tuple[int, ...]
    num_documents: int
    documents_Q: np.ndarray
    tokens_Q: np.ndarray
    levels: dict[str, Estimate]
    differences: dict[str, Estimate]
    state_norm_Q: np.ndarray | None
    bootstrap_samples: int
    bootstrap_seed: int
    warnings: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """Names of the columns: ``0-255``, ..., ``all``; the last position is included."""
        return [f"{begin}-{end - 1}" for begin, end in self._bounds()[:-1]] + ["all"]

    def _bounds(self) -> list[tuple[int, int]]:
        """Half-open position ranges of the columns."""
        return [*zip((0, *self.edges[:-1]), self.edges, strict=True), (0, self.edges[-1])]

    def to_json(self) -> dict[str, Any]:
        """Returns plain containers; a number that is unknown or not finite is ``None``, never NaN."""
        columns = [self._column_json(q, *bounds) for q, bounds in enumerate(self._bounds())]
        return {
            "name": self.name,
            "unit": self.unit,
            "documents": self.num_documents,
            "interval": INTERVAL,
            "bootstrap_samples": self.bootstrap_samples,
            "bootstrap_seed": self.bootstrap_seed,
            "buckets": columns[:-1],
            "all": columns[-1],
            "warnings": list(self.warnings),
        }

    def _column_json(self, q: int, begin: int, end: int) -> dict[str, Any]:
        return {
            "begin": begin,  # first position
            "end": end,  # one past the last
            "documents": int(self.documents_Q[q]),
            "tokens": int(self.tokens_Q[q]),
            "state_norm": None if self.state_norm_Q is None else finite(self.state_norm_Q[q]),
            "levels": {name: estimate_json(estimate, q) for name, estimate in self.levels.items()},
            "differences": {name: estimate_json(estimate, q) for name, estimate in self.differences.items()},
        }

    def scalars(self) -> dict[str, float]:
        """Returns bits by metric name: ``on`` and ``on-off`` over all positions, ``on/0-255`` in a bucket.

        Buckets that no document reaches are left out.
        """
        return {
            name.replace(" ", "") + ("" if column == "all" else f"/{column}"): float(estimate.value_P[q])
            for name, estimate in (self.levels | self.differences).items()
            for q, column in enumerate(self.columns)
            if self.tokens_Q[q] > 0
        }

    def table(self) -> str:
        """Returns the result as text for a terminal, ending in a newline."""
        lines = [
            f"{self.name}: held-out loss by position in the document, {self.unit}, lower is better",
            f"{self.num_documents} documents, {int(self.tokens_Q[-1])} predicted tokens; [ ]: {INTERVAL:.0%} interval "
            f"over documents ({self.bootstrap_samples} resamples), not over training seeds",
            "",
            *self._level_lines(),
        ]
        if self.differences:
            lines += ["", *self._difference_lines(), "", self._meaning()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines) + "\n"

    def _level_lines(self) -> list[str]:
        header = ["position", "docs", "tokens", *self.levels]
        if self.state_norm_Q is not None:
            header.append("max |S|/|W0|")
        cells = [header]
        for q, column in enumerate(self.columns):
            line = [column, str(int(self.documents_Q[q])), str(int(self.tokens_Q[q]))]
            for name, estimate in self.levels.items():
                # Documents differ so much that the third digit of a level's interval is noise.
                baseline = name in BASELINES
                line.append(number(estimate.value_P[q]) if baseline else with_interval(estimate, q, interval_digits=2))
            if self.state_norm_Q is not None:
                line.append(number(self.state_norm_Q[q], digits=2))
            cells.append(line)
        return aligned(cells)

    def _difference_lines(self) -> list[str]:
        cells = [["position", *self.differences]]
        for q, column in enumerate(self.columns):
            cells.append([column, *(with_interval(e, q, signed=True) for e in self.differences.values())])
        return aligned(cells)

    def _meaning(self) -> str:
        parts = {
            "on - dense": "on - dense < 0: the update helps",
            "on - off": "on - off < 0: this model relies on it",
            "off - dense": "off - dense > 0: without it this model is worse than one trained without TTT",
        }
        return "; ".join(text for name, text in parts.items() if name in self.differences) + "."

    def plot(self, path: Path | str) -> None:
        """Draws levels and differences into a PNG file, which appears whole or not at all.

        Raises:
          UserError: the file exists and is not empty, or cannot be written.
        """
        from intttrain.evals.positions.figure import save_figure  # loads matplotlib, which the table does not need

        save_figure(
            Path(path),
            title=f"{self.name}: {self.num_documents} held-out documents",
            unit=self.unit,
            edges=self.edges,
            levels=self.levels,
            differences=self.differences,
        )


def make_report(
    losses: Mapping[str, PositionLosses], eval_config: EvalConfig, *, name: str, unit: str
) -> PositionReport:
    """Returns the report of the conditions in ``losses`` (keys: any of ``on off dense unigram bigram``).

    Raises:
      ValueError: nothing or an unknown key is given, or the conditions were not scored on the same tokens.
    """
    unknown = set(losses) - {*CONDITIONS, *BASELINES}
    if unknown or not losses:
        raise ValueError(f"conditions {sorted(losses)} must be some of {(*CONDITIONS, *BASELINES)}")
    first = next(iter(losses.values()))
    for key, other in losses.items():
        if other.edges != first.edges or not np.array_equal(other.weight_NP, first.weight_NP):
            raise ValueError(f"condition {key!r} was not scored on the same tokens as {next(iter(losses))!r}")
    weight_NQ = with_total(first.weight_NP)
    options: dict[str, int] = {"samples": eval_config.bootstrap_samples, "seed": eval_config.seed}
    levels = {
        key: bootstrap_level(with_total(losses[key].nll_NP), weight_NQ, **options)
        for key in (*CONDITIONS, *BASELINES)
        if key in losses
    }
    differences = {
        f"{a} - {b}": bootstrap_difference(
            with_total(losses[a].nll_NP), with_total(losses[b].nll_NP), weight_NQ, **options
        )
        for a, b in DIFFERENCES
        if a in losses and b in losses
    }
    report = PositionReport(
        name=name,
        unit=unit,
        edges=first.edges,
        num_documents=len(weight_NQ),
        documents_Q=(weight_NQ > 0).sum(axis=0),
        tokens_Q=weight_NQ.sum(axis=0),
        levels=levels,
        differences=differences,
        state_norm_Q=_state_norms(losses["on"]) if "on" in losses else None,
        bootstrap_samples=eval_config.bootstrap_samples,
        bootstrap_seed=eval_config.seed,
        warnings=(),
    )
    return dataclasses.replace(report, warnings=tuple(_warnings(report)))


def with_total(sum_NP: np.ndarray) -> np.ndarray:
    """Returns N x Q: the columns and their sum."""
    with np.errstate(invalid="ignore"):  # inf - inf in a model that failed
        return np.concatenate([sum_NP, sum_NP.sum(axis=1, keepdims=True)], axis=1)


def _state_norms(losses: PositionLosses) -> np.ndarray | None:
    """Returns the largest norm over documents; NaN in a bucket without predictions or if it is not known."""
    if losses.state_norm_NP is None:
        return None
    counted_NP = losses.weight_NP > 0
    largest_P = np.where(counted_NP, losses.state_norm_NP, -np.inf).max(axis=0)
    largest_P[~counted_NP.any(axis=0)] = np.nan
    overall = largest_P[counted_NP.any(axis=0)].max() if counted_NP.any() else np.nan
    return np.append(largest_P, overall)


def _warnings(report: PositionReport) -> list[str]:
    lines = []
    names, documents_P = report.columns[:-1], report.documents_Q[:-1]
    if "on - off" in report.differences and "dense" not in report.levels:
        lines.append(
            "no dense model was given: off can be worse than a model trained without TTT, "
            "so on - off overstates the gain"
        )
    for key, estimate in report.levels.items():
        broken_P = ~np.isfinite(estimate.value_P[:-1]) & (documents_P > 0)
        if broken_P.any():
            lines.append(f"the loss of {key!r} is not finite at {_where(names, broken_P)}")
    if report.state_norm_Q is not None:
        large_P = report.state_norm_Q[:-1] > LARGE_STATE_NORM
        if large_P.any():
            lines.append(
                f"the state grows to {report.state_norm_Q[-1]:.4g} times |W0| (healthy up to about 4; above "
                f"{LARGE_STATE_NORM:g} at {_where(names, large_P)}): use a smaller model.ttt.eta or bound the update"
            )
    few_P = (documents_P < FEW_DOCUMENTS) & (documents_P > 0)
    if few_P.any():
        lines.append(few_warning(f"{int(documents_P[few_P].min())} documents at {_where(names, few_P)}"))
    if (documents_P == 0).any():
        lines.append(f"no document reaches {_where(names, documents_P == 0)}")
    return lines


def _where(names: Sequence[str], chosen_P: np.ndarray) -> str:
    """Returns the chosen positions in few words."""
    if chosen_P.all():
        return "all positions"
    chosen = [name for name, taken in zip(names, chosen_P, strict=True) if taken]
    return f"positions {', '.join(chosen[:3])}" + (f" and {len(chosen) - 3} more buckets" if len(chosen) > 3 else "")
