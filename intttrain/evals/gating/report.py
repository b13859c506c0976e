"""The result of a gating study: one row per rule, signal, sign, rate and length; JSON, tables and pictures.

Letters: as in ``metrics``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from intttrain.config import EvalConfig
from intttrain.evals.bootstrap import FEW_DOCUMENTS, INTERVAL, Estimate, few_warning
from intttrain.evals.gating.metrics import BASES, LEAST_SPAN, MATCHED, GatingMetrics, Recovery
from intttrain.evals.tables import aligned, estimate_json, finite, number, with_interval


@dataclasses.dataclass(frozen=True)
class GateSetting:
    """What a row is about.

    Attributes:
      rule: its name.
      signal: what it decides from; ``None`` for a rule that looks at nothing.
      sign: 1 updates at high values of the signal, -1 at low ones.
      rate: target share of updates; ``None`` for a rule without one.
      row_tokens: length of the rows that were read.
    """

    rule: str
    signal: str | None
    sign: Literal[1, -1] | None
    rate: float | None
    row_tokens: int

    @property
    def line(self) -> str:
        """Returns what the settings of one curve share: rule, signal and sign."""
        direction = {1: "high", -1: "low", None: ""}[self.sign]
        return " ".join(part for part in (self.rule, direction, self.signal) if part)


@dataclasses.dataclass(frozen=True)
class GateCost:
    """What the decisions of a row cost; ``None`` where it was not measured.

    Attributes:
      flops_share: counted FLOPs of a forward pass over those of ``always``.
      compiled_share: cost of the compiled program over that of ``always``, as the compiler counts.
      seconds: wall clock of the pass over all documents.
    """

    flops_share: float | None = None
    compiled_share: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class GateRow:
    """One rule at one setting.

    Attributes:
      shuffled: how much more often it writes a chunk whose tokens are shuffled (``metrics.measure_shuffled``);
        ``None`` for a rule that does not look.
    """

    setting: GateSetting
    metrics: GatingMetrics
    cost: GateCost = GateCost()
    shuffled: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class GatingReport:
    """A study; made by ``make_gating_report``.

    Attributes:
      name: of the run.
      unit: ``bits per byte`` or ``bits per token``.
      train_tokens: row length that the model was trained with.
      chunk_tokens: C.
      rows: in the order of length, otherwise as given.
      bootstrap_samples, bootstrap_seed: of all intervals.
      warnings: one line each.
    """

    name: str
    unit: str
    train_tokens: int
    chunk_tokens: int
    rows: tuple[GateRow, ...]
    bootstrap_samples: int
    bootstrap_seed: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain containers; a number that is unknown or not finite is ``None``, never NaN."""
        return {
            "name": self.name,
            "unit": self.unit,
            "train_tokens": self.train_tokens,
            "chunk_tokens": self.chunk_tokens,
            "interval": INTERVAL,
            "bootstrap_samples": self.bootstrap_samples,
            "bootstrap_seed": self.bootstrap_seed,
            "rows": [_row_json(row) for row in self.rows],
            "warnings": list(self.warnings),
        }

    def table(self) -> str:
        """Returns the result as text for a terminal, ending in a newline."""
        lines = [
            f"{self.name}: held-out loss under gate decisions, {self.unit}, lower is better",
            f"[ ]: {INTERVAL:.0%} interval over documents ({self.bootstrap_samples} resamples), not over training "
            "seeds; rates leave out gates that no later chunk reads",
        ]
        for row_tokens, rows in self.by_length().items():
            first = rows[0].metrics
            lines += [
                "",
                f"--- rows of {row_tokens} tokens, {row_tokens / self.train_tokens:g} times the training length: "
                f"{first.documents} documents, {first.tokens} predicted tokens",
                *_quality_lines(rows),
                "",
                "difference to blind decisions with as many updates in every document; how much more often a chunk is "
                "written when its tokens are shuffled:",
                *_control_lines(rows),
            ]
            if any(row.metrics.recoveries for row in rows):
                lines += ["", "share of what an oracle gains:", *_recovery_lines(rows)]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)]) + "\n"

    def by_length(self) -> dict[int, list[GateRow]]:
        """Returns the rows of every length, short lengths first."""
        lengths = sorted({row.setting.row_tokens for row in self.rows})
        return {length: [row for row in self.rows if row.setting.row_tokens == length] for length in lengths}


def make_gating_report(
    rows: Sequence[GateRow], eval_config: EvalConfig, *, name: str, unit: str, train_tokens: int, chunk_tokens: int
) -> GatingReport:
    """Returns the report of a study.

    Raises:
      ValueError: there are no rows, two have one setting, or rows of one length were scored on different documents.
    """
    settings = [row.setting for row in rows]
    if not rows or len(set(settings)) < len(settings):
        raise ValueError(f"{len(settings)} rows with {len(set(settings))} settings; there must be some, all different")
    ordered = tuple(sorted(rows, key=lambda row: row.setting.row_tokens))
    report = GatingReport(
        name=name,
        unit=unit,
        train_tokens=train_tokens,
        chunk_tokens=chunk_tokens,
        rows=ordered,
        bootstrap_samples=eval_config.bootstrap_samples,
        bootstrap_seed=eval_config.seed,
        warnings=(),
    )
    for length, same in report.by_length().items():
        if len({(row.metrics.documents, row.metrics.tokens) for row in same}) > 1:
            raise ValueError(f"rows of {length} tokens were scored on different documents")
    return dataclasses.replace(report, warnings=tuple(_warnings(report)))


def shared_names(rows: Sequence[GateRow]) -> list[str]:
    """Returns the references and oracles that are the same in all rows of a length, as those per count are not."""

    def numbers(row: GateRow, name: str) -> tuple[float, ...]:
        columns = (row.metrics.levels[name].value_P, row.metrics.rates[name].value_P)
        return tuple(np.nan_to_num(np.concatenate(columns), nan=-1.0))

    names = [name for name in rows[0].metrics.levels if name not in ("rule", *MATCHED)]
    in_all = [name for name in names if all(name in row.metrics.levels for row in rows)]
    return [name for name in in_all if len({numbers(row, name) for row in rows}) == 1]


def _warnings(report: GatingReport) -> list[str]:
    lines = []
    counts = {length: rows[0].metrics.documents for length, rows in report.by_length().items()}
    few = [f"{count} documents of {length} tokens" for length, count in counts.items() if count < FEW_DOCUMENTS]
    if few:
        lines.append(few_warning(", ".join(few)))
    for length, rows in report.by_length().items():
        broken = [row for row in rows if not np.isfinite(row.metrics.levels["rule"].value_P[0])]
        lines += [f"the loss of {_named(row)} is not finite" for row in broken]
        hidden = {
            f"{control} - {oracle}"
            for row in rows
            for oracle, recoveries in row.metrics.recoveries.items()
            for control, recovery in recoveries.items()
            if recovery.share is None
        }
        if hidden:
            lines.append(
                f"rows of {length} tokens: no share is given where the gain of an oracle is inside the noise (its "
                f"interval reaches {LEAST_SPAN:g} {report.unit} or less): {', '.join(sorted(hidden))}"
            )
    return lines


def _named(row: GateRow) -> str:
    rate = "" if row.setting.rate is None else f" at rate {row.setting.rate:.3g}"
    return f"{row.setting.line}{rate} with rows of {row.setting.row_tokens} tokens"


_KEY_HEADER = ["rule", "signal", "updates at", "target"]


def _key(row: GateRow) -> list[str]:
    """The cells that say which row it is."""
    setting = row.setting
    direction = {1: "high", -1: "low", None: "-"}[setting.sign]
    return [setting.rule, setting.signal or "-", direction, "-" if setting.rate is None else f"{setting.rate:.3g}"]


def _quality_lines(rows: Sequence[GateRow]) -> list[str]:
    header = [
        *_KEY_HEADER,
        "realised",
        "loss",
        "rule - never",
        "rule - always",
        "selectivity",
        "FLOPs",
        "compiled",
        "s",
    ]
    first = rows[0].metrics
    # What the rows of this length have in common, in brackets: it is no rule.
    shared = [
        [
            f"({name})",
            *[""] * 3,
            number(first.rates[name].value_P[0]),
            with_interval(first.levels[name], 0, interval_digits=2),
            *[""] * 6,
        ]
        for name in shared_names(rows)
    ]
    cells = [header, *shared]
    for row in rows:
        metrics, cost = row.metrics, row.cost
        selectivity = "-" if metrics.selectivity is None else with_interval(metrics.selectivity, 0, signed=True)
        cells.append(
            [
                *_key(row),
                number(metrics.rate),
                with_interval(metrics.levels["rule"], 0, interval_digits=2),
                *(with_interval(metrics.differences[f"rule - {name}"], 0, signed=True) for name in BASES),
                selectivity,
                *("-" if share is None else number(share) for share in (cost.flops_share, cost.compiled_share)),
                "-" if cost.seconds is None else number(cost.seconds, digits=2),
            ]
        )
    return aligned(cells)


def _control_lines(rows: Sequence[GateRow]) -> list[str]:
    cells = [[*_KEY_HEADER, *(f"rule - {name}" for name in MATCHED), "if shuffled"]]
    for row in rows:
        differences = (row.metrics.differences[f"rule - {name}"] for name in MATCHED)
        shuffled = "-" if row.shuffled is None else with_interval(row.shuffled, 0, signed=True)
        cells.append([*_key(row), *(with_interval(difference, 0, signed=True) for difference in differences), shuffled])
    return aligned(cells)


def _recovery_lines(rows: Sequence[GateRow]) -> list[str]:
    cells = [[*_KEY_HEADER, "oracle", "random - oracle", "share of it", "never - oracle", "share of it"]]
    for row in rows:
        for oracle, recoveries in row.metrics.recoveries.items():
            cells.append([*_key(row), oracle])
            for control in ("random", "never"):
                recovery = recoveries[control]
                share = "in the noise" if recovery.share is None else with_interval(recovery.share, 0, signed=True)
                cells[-1] += [with_interval(recovery.span, 0, signed=True), share]
    return aligned(cells)


def _row_json(row: GateRow) -> dict[str, Any]:
    metrics = row.metrics
    return {
        **dataclasses.asdict(row.setting),
        "documents": metrics.documents,
        "tokens": metrics.tokens,
        "realised_rates": {name: estimate_json(rate, 0) for name, rate in metrics.rates.items()},
        "levels": {name: estimate_json(level, 0) for name, level in metrics.levels.items()},
        "differences": {name: estimate_json(difference, 0) for name, difference in metrics.differences.items()},
        "random_seeds": [finite(level) for level in metrics.random_S],
        "recoveries": {
            oracle: {control: _recovery_json(recovery) for control, recovery in recoveries.items()}
            for oracle, recoveries in metrics.recoveries.items()
        },
        "selectivity": None if metrics.selectivity is None else estimate_json(metrics.selectivity, 0),
        "shuffled": None if row.shuffled is None else estimate_json(row.shuffled, 0),
        "cost": {name: None if x is None else finite(x) for name, x in dataclasses.asdict(row.cost).items()},
        "chunks": [
            {
                "level": estimate_json(metrics.chunk_level, chunk),
                "rule - never": estimate_json(metrics.chunk_difference, chunk),
                "mean_decision_per_layer": [finite(value) for value in metrics.gate_map_Mn[chunk]],
            }
            for chunk in range(len(metrics.gate_map_Mn))
        ],
    }


def _recovery_json(recovery: Recovery) -> dict[str, Any]:
    parts: dict[str, Estimate | None] = {"gain": recovery.gain, "span": recovery.span, "share": recovery.share}
    return {name: None if part is None else estimate_json(part, 0) for name, part in parts.items()}
