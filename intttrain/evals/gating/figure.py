"""Pictures of a gating study: quality against rate, where updates happen, and loss by position.

Losses are drawn as differences to ``never``, paired over documents, so that easy and hard documents do not hide what a
gate does. One panel per length; a curve is a rule with its signal and sign.

Letters: M chunks of a document, n TTT layers, P columns of an ``Estimate`` (one, or M).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from intttrain.evals.bootstrap import INTERVAL, Estimate
from intttrain.evals.gating.metrics import BASES
from intttrain.evals.gating.report import GateRow, GatingReport, shared_names
from intttrain.evals.positions.figure import publish

# Okabe and Ito's colours, distinguishable without full colour vision; with more curves line styles change.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINE_STYLES = ("-", "--", ":", "-.")
_CONTROL_MARKERS = {"random": "o", "first": "<", "last": ">", "periodic": "s"}
_LEAST_SPAN = 0.02  # bits on an axis; keeps rounding from looking like an effect
_MIDDLE_RATE = 0.5  # maps and positions show each curve at the target rate nearest to this


def plot_gating(report: GatingReport, folder: Path | str) -> None:
    """Draws ``gating_quality.png``, ``gating_maps.png`` and ``gating_positions.png`` into an existing folder.

    Raises:
      UserError: a file exists and is not empty, or cannot be written.
    """
    for name, draw in (("quality", _draw_quality), ("maps", _draw_maps), ("positions", _draw_positions)):
        publish(draw(report), Path(folder) / f"gating_{name}.png")


def _draw_quality(report: GatingReport) -> Figure:
    """Draws loss against realised update rate with intervals; controls are grey, oracles stars."""
    figure, panels = _panels(report)
    styles = _styles(report)
    for axes, (length, rows) in zip(panels, report.by_length().items(), strict=True):
        axes.axhline(0.0, color="black", linewidth=0.8, label="never")
        always = _to_never(rows[0], "always")
        axes.axhline(always, color="black", linewidth=0.8, linestyle="--", label="always")
        _draw_controls(axes, rows)
        stars = [name for name in shared_names(rows) if name not in BASES]
        for place, name in enumerate(stars):
            at = (rows[0].metrics.rates[name].value_P[0], _to_never(rows[0], name))
            side = 1 if place % 2 == 0 else -1  # oracles lie close to each other
            axes.plot(*at, "*", color="#444444", markersize=8)
            axes.annotate(
                name,
                at,
                xytext=(6 * side, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
                ha="left" if side > 0 else "right",
            )
        for line, members in _curves(rows).items():
            ordered = sorted(members, key=lambda row: row.metrics.rate)
            rate = np.array([row.metrics.rate for row in ordered])
            estimates = [row.metrics.differences["rule - never"] for row in ordered]
            low, value, high = _ends(estimates)
            axes.errorbar(
                rate,
                value,
                yerr=np.maximum([value - low, high - value], 0.0),
                label=line,
                capsize=2,
                markersize=4,
                **styles[line],
            )
        axes.set_xlim(-0.02, 1.02)
        _finish(axes, report, length, "updates of live gates (realised rate)")
    _legend(figure, panels)
    figure.suptitle(f"{report.name}: loss against update rate, {INTERVAL:.0%} interval over documents", fontsize=11)
    return figure


def _draw_maps(report: GatingReport) -> Figure:
    """Draws the mean decision by chunk and layer: one line of panels per curve, one column per length."""
    lengths = report.by_length()
    lines = list(dict.fromkeys(row.setting.line for row in report.rows))
    figure = Figure(figsize=(1.5 + 3.0 * len(lengths), 1.2 + 0.95 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), len(lengths), squeeze=False)
    image = None
    for column, (length, rows) in enumerate(lengths.items()):
        chosen = {row.setting.line: row for row in _middle(rows)}
        for axes, line in zip(grid[:, column], lines, strict=True):
            axes.tick_params(labelsize=7)
            axes.set_xlabel("chunk", fontsize=7)
            if line not in chosen:
                axes.set_axis_off()
                continue
            map_nM = chosen[line].metrics.gate_map_Mn[:-1].T  # the last gate is never live
            image = axes.imshow(map_nM, aspect="auto", vmin=0.0, vmax=1.0, cmap="cividis", interpolation="nearest")
            axes.set_yticks(range(len(map_nM)))
            axes.set_ylabel("TTT layer", fontsize=7)
            title = f"{line}, rate {chosen[line].metrics.rate:.2f}, {length} tokens"
            axes.set_title(title, fontsize=7, loc="left")
    if image is not None:
        figure.colorbar(image, ax=grid, label="share of documents that update", shrink=0.8)
    figure.suptitle(f"{report.name}: where updates happen", fontsize=11)
    return figure


def _draw_positions(report: GatingReport) -> Figure:
    """Draws loss by chunk for every curve, with bands."""
    figure, panels = _panels(report)
    styles = _styles(report)
    for axes, (length, rows) in zip(panels, report.by_length().items(), strict=True):
        axes.axhline(0.0, color="black", linewidth=0.8, label="never")
        for row in _middle(rows):
            estimate, style = row.metrics.chunk_difference, styles[row.setting.line]
            at_M = (np.arange(len(estimate.value_P)) + 0.5) * report.chunk_tokens
            axes.fill_between(at_M, estimate.low_P, estimate.high_P, color=style["color"], alpha=0.12, linewidth=0)
            axes.plot(at_M, estimate.value_P, label=row.setting.line, linewidth=1.2, **{**style, "marker": ""})
        if length > report.train_tokens:
            axes.axvline(report.train_tokens, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, length)
        _finish(axes, report, length, "position in the document (tokens)")
    _legend(figure, panels)
    figure.suptitle(f"{report.name}: loss by position at the rate nearest to {_MIDDLE_RATE:g}", fontsize=11)
    return figure


def _panels(report: GatingReport) -> tuple[Figure, Sequence[Axes]]:
    """Returns one panel per length."""
    count = len(report.by_length())
    # Figure without pyplot: no window, no back end to choose, nothing global; savefig renders PNG with Agg.
    figure = Figure(figsize=(1.0 + 4.4 * count, 4.8), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _curves(rows: Sequence[GateRow]) -> dict[str, list[GateRow]]:
    """Returns the rows of every rule, signal and sign, in the order of the report."""
    lines = dict.fromkeys(row.setting.line for row in rows)
    return {line: [row for row in rows if row.setting.line == line] for line in lines}


def _middle(rows: Sequence[GateRow]) -> list[GateRow]:
    """Returns one row per curve: with the target rate, or else the realised one, nearest to the middle."""

    def distance(row: GateRow) -> float:
        rate = row.setting.rate if row.setting.rate is not None else row.metrics.rate
        return abs(rate - _MIDDLE_RATE)

    return [min(members, key=distance) for members in _curves(rows).values()]


def _to_never(row: GateRow, name: str) -> float:
    """Returns a level of the row minus that of ``never``."""
    return float(row.metrics.levels[name].value_P[0] - row.metrics.levels["never"].value_P[0])


def _draw_controls(axes: Axes, rows: Sequence[GateRow]) -> None:
    """Puts a point for each row and control at the rate of the row."""
    rates = [row.metrics.rate for row in rows]
    for name, marker in _CONTROL_MARKERS.items():
        levels = [_to_never(row, name) for row in rows]
        axes.plot(rates, levels, marker, color="#aaaaaa", markersize=3.5, label=f"{name}, same count", zorder=1)


def _ends(estimates: Sequence[Estimate]) -> np.ndarray:
    """Returns low, value and high of single-column estimates: 3 x their number."""
    return np.array([[e.low_P[0], e.value_P[0], e.high_P[0]] for e in estimates]).T


def _styles(report: GatingReport) -> dict[str, dict[str, Any]]:
    """Returns how every curve looks, in all panels."""
    return {
        line: {
            "color": _COLORS[place % len(_COLORS)],
            "linestyle": _LINE_STYLES[place // len(_COLORS) % len(_LINE_STYLES)],
            "marker": "o",
        }
        for place, line in enumerate(_curves(report.rows))
    }


def _finish(axes: Axes, report: GatingReport, length: int, label: str) -> None:
    """Sets what all panels with losses share."""
    low, high = axes.get_ylim()
    missing = max(0.0, _LEAST_SPAN - (high - low))
    axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.set_title(f"{length} tokens ({length / report.train_tokens:g} x training)", fontsize=10, loc="left")
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel(f"{report.unit} minus never  (below 0: better)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Puts one legend for all panels below them."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
