"""What flags may hold: every number has its range, no value is empty, and nothing is given twice."""

from __future__ import annotations

import math
import re

from absl import flags

from intttrain.config.errors import UserError
from intttrain.config.literals import LARGEST


class NumberParser(flags.FloatParser):
    """A finite number from ``lower`` to ``upper``; absl's own bounds let nan through."""

    def __init__(self, lower: float, upper: float) -> None:
        super().__init__(lower, upper)
        self.syntactic_help = f"a number from {lower:g} to {upper:g}"

    def is_outside_bounds(self, val: float) -> bool:
        """Answers for nan as for any number out of range."""
        return not math.isfinite(val) or bool(super().is_outside_bounds(val))


def define_number(
    name: str, default: float, help_text: str, values: flags.FlagValues, *, lower: float = 0.0, upper: float = LARGEST
) -> None:
    """Defines a flag that holds a finite number."""
    parser = NumberParser(lower, upper)
    flags.DEFINE(parser, name, default, help_text, values, flags.ArgumentSerializer())


def split_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Returns the arguments without ``--config.KEY=TEXT``, and those as (key, text)."""
    rest, overrides = [], []
    for argument in arguments:
        if match := re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL):
            negated, key, text = match.groups()
            if negated and text is not None:
                raise UserError(f"{argument}: --noconfig.{key} takes no value")
            overrides.append((key, "false" if negated else text))
        else:
            rest.append(argument)
    return rest, overrides


def check_given(values: flags.FlagValues) -> None:
    """Raises ``UserError`` for a flag that is empty, or given more than once although it holds one value."""
    for name in values:
        flag = values[name]
        if flag.present > 1 and not isinstance(flag, flags.MultiFlag):
            raise UserError(f"--{name} is given {flag.present} times; give it once")
        if flag.value == "":
            raise UserError(f"--{name}= is empty; give it a value or leave it out")
