"""The picture of a report: levels on the left, paired differences on the right.

Letters: P position buckets. Buckets are drawn equally wide whatever their length: bucket p lies between the ticks p
and p + 1, which carry its two ends. Arrays have Q = P + 1 columns as in the report; the last is not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from intttrain.config.errors import UserError
from intttrain.evals.bootstrap import INTERVAL, Estimate
from intttrain.storage.partial import partial_file

# Okabe and Ito's colours, distinguishable without full colour vision; line styles keep equal curves visible.
_STYLES: dict[str, dict[str, Any]] = {
    "on": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "off": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "dense": {"color": "#444444", "linestyle": ":", "marker": "^"},
    "unigram": {"color": "#999999", "linestyle": "-."},
    "bigram": {"color": "#999999", "linestyle": "-"},
    "on - off": {"color": "#009E73", "linestyle": "--", "marker": "s"},
    "on - dense": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "off - dense": {"color": "#D55E00", "linestyle": ":", "marker": "^"},
}
_NAMES = {"on": "on (update as trained)", "off": "off (same model, no update)", "dense": "dense (trained without TTT)"}
_BASELINES = ("unigram", "bigram")
_MAX_TICKS = 12
_LEAST_SPAN = 0.02  # bits on an axis; keeps rounding from looking like an effect
_REACH = 0.75  # a baseline is drawn if it is nearer to the curves than this share of their span


def save_figure(
    path: Path,
    *,
    title: str,
    unit: str,
    edges: tuple[int, ...],
    levels: Mapping[str, Estimate],
    differences: Mapping[str, Estimate],
) -> None:
    """Draws a PNG; without differences only the left half.

    Args:
      path: the file, which appears whole or not at all.
      title, unit: texts.
      edges: right edges of the buckets.
      levels, differences: by name, in the order of the legend.

    Raises:
      UserError: the file exists and is not empty, or cannot be written.
    """
    halves = 2 if differences else 1
    # Figure without pyplot: no window, no back end to choose, nothing global; savefig renders PNG with Agg.
    figure = Figure(figsize=(5.6 * halves, 4.0), layout="constrained")
    axes = figure.subplots(1, halves, squeeze=False)[0]
    _draw_levels(axes[0], unit, edges, levels)
    if differences:
        _draw_differences(axes[1], unit, edges, differences)
    figure.suptitle(title, fontsize=11)
    publish(figure, path)


def _draw_levels(axes: Axes, unit: str, edges: tuple[int, ...], levels: Mapping[str, Estimate]) -> None:
    curves = {name: estimate for name, estimate in levels.items() if name not in _BASELINES}
    at_P = np.arange(len(edges)) + 0.5
    for name, estimate in curves.items():
        axes.plot(at_P, estimate.value_P[:-1], label=_NAMES[name], markersize=4, **_STYLES[name])
    shown = np.concatenate([estimate.value_P[:-1] for estimate in curves.values()] or [np.zeros(0)])
    far = []
    for name in (name for name in _BASELINES if name in levels):
        value_P = levels[name].value_P[:-1]
        if _near(value_P, shown):
            axes.plot(at_P, value_P, label=name, linewidth=1.0, **_STYLES[name])
        else:
            far.append(f"{name} {levels[name].value_P[-1]:.2f}")
    low, high = axes.get_ylim()
    missing = max(0.0, _LEAST_SPAN - (high - low))
    axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.set_title("Held-out loss" + (f"   (off the scale: {', '.join(far)})" if far else ""), fontsize=10, loc="left")
    _finish(axes, unit, edges)


def _draw_differences(axes: Axes, unit: str, edges: tuple[int, ...], differences: Mapping[str, Estimate]) -> None:
    at_P = np.arange(len(edges)) + 0.5
    axes.axhline(0.0, color="black", linewidth=0.8)
    for place, (name, estimate) in enumerate(differences.items()):
        color, low_P, high_P = _STYLES[name]["color"], estimate.low_P[:-1], estimate.high_P[:-1]
        if len(edges) > 1:
            axes.fill_between(at_P, low_P, high_P, color=color, alpha=0.18, linewidth=0)
        else:  # a band needs two points; bars stand side by side
            at_P = np.array([(place + 1) / (len(differences) + 1)])
            axes.vlines(at_P, low_P, high_P, color=color, alpha=0.4, linewidth=4)
        axes.plot(at_P, estimate.value_P[:-1], label=name, markersize=4, **_STYLES[name])
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -_LEAST_SPAN / 2), max(high, _LEAST_SPAN / 2))
    axes.set_title(f"Paired differences, {INTERVAL:.0%} interval over documents", fontsize=10, loc="left")
    _finish(axes, f"{unit}  (below 0: the first is better)", edges)


def _finish(axes: Axes, label: str, edges: tuple[int, ...]) -> None:
    """Sets what both halves share."""
    ends = (0, *edges)
    step = -(-len(ends) // _MAX_TICKS)
    ticks = sorted({*range(0, len(ends) - step, step), len(ends) - 1} if step > 1 else range(len(ends)))
    axes.set_xticks(ticks, [str(ends[tick]) for tick in ticks], fontsize=8, rotation=30 if len(ticks) > 6 else 0)
    axes.set_xlim(0, len(edges))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("position in the document (tokens)", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _near(value_P: np.ndarray, shown: np.ndarray) -> bool:
    """Whether a baseline can be drawn without squeezing the curves."""
    finite, curves = value_P[np.isfinite(value_P)], shown[np.isfinite(shown)]
    if not len(finite) or not len(curves):
        return False
    slack = _REACH * (curves.max() - curves.min())
    return bool(finite.min() <= curves.max() + slack and finite.max() >= curves.min() - slack)


def publish(figure: Figure, path: Path) -> None:
    """Writes a PNG file, which appears whole or not at all: a hidden sibling is renamed.

    Raises:
      UserError: the file exists and is not empty, or cannot be written.
    """
    if path.is_dir() or (path.exists() and path.stat().st_size > 0):
        raise UserError(f"figure {path} exists and is never overwritten; choose another path or remove it first")
    try:
        with partial_file(path) as partial:
            figure.savefig(partial, format="png", dpi=160)
            partial.replace(path)
    except OSError as error:
        raise UserError(f"figure {path} cannot be written ({error.strerror}); choose a writable path") from None
