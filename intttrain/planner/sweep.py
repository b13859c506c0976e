"""Plans of one configuration with some values changed: ``model.remat=full,qkv train.microbatches=1,2``."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intttrain.config import Config, as_dict, override
from intttrain.config.dotted import flatten
from intttrain.config.errors import UserError, did_you_mean
from intttrain.planner.plan import Plan, make_plan


def parse_sweep(text: str, config: Config) -> list[dict[str, Any]]:
    """Returns the changes of every point, all combinations in order.

    Args:
      text: "KEY=VALUE,VALUE KEY=VALUE,..." with the dotted keys of the configuration.
      config: has these keys.

    Raises:
      UserError: not of that form, or an unknown key.
    """
    known = flatten(as_dict(config))
    choices: dict[str, list[Any]] = {}
    for part in text.split():
        key, equals, values = part.partition("=")
        if not equals or not values.strip(","):
            raise UserError(f"--sweep: {part!r} is not KEY=VALUE,VALUE; for example model.remat=full,qkv")
        if key not in known:
            raise UserError(f"--sweep: unknown configuration key {key}{did_you_mean(key, known)}")
        choices[key] = [_value(value) for value in values.split(",") if value]
    if not choices:
        raise UserError("--sweep is empty; write for example model.remat=full,qkv train.microbatches=1,2")
    return [dict(zip(choices, point, strict=True)) for point in itertools.product(*choices.values())]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_plans(
    config: Config, topology: str, points: list[dict[str, Any]], *, hlo: Path | None, report: Callable[[str], None]
) -> list[tuple[str, Plan]]:
    """Returns the plans of all points that are possible, each with its label.

    Args:
      config: with the values that do not change.
      topology: as in ``make_plan``.
      points: from ``parse_sweep``.
      hlo: a folder for the texts, one subfolder a point.
      report: receives a line before every compilation, and the reason why a point is left out.

    Raises:
      UserError: no point is possible.
    """
    plans = []
    for number, changes in enumerate(points, start=1):
        label = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
        report(f"{number}/{len(points)} {label}: compiling")
        try:
            folder = None if hlo is None else hlo / label.replace(" ", ",").replace("/", "-")
            plans.append((label, make_plan(override(config, changes), topology, hlo=folder)))
        except UserError as error:
            report(f"{number}/{len(points)} {label}: left out: {error}")
    if not plans:
        raise UserError("--sweep: no combination is possible on this topology; the reasons are above")
    return plans
