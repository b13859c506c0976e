"""Estimates as JSON and as lines of a table.

Letters: P columns of an ``Estimate``.
"""

from __future__ import annotations

import math

from intttrain.evals.bootstrap import Estimate


def finite(value: float) -> float | None:
    """Returns a float that JSON can hold; ``None`` for one that is not finite."""
    return float(value) if math.isfinite(value) else None


def estimate_json(estimate: Estimate, q: int) -> dict[str, float | None]:
    """Returns column ``q`` as plain numbers."""
    return {
        "value": finite(estimate.value_P[q]),
        "low": finite(estimate.low_P[q]),
        "high": finite(estimate.high_P[q]),
    }


def number(value: float, *, signed: bool = False, digits: int = 3) -> str:
    """Returns ``digits`` decimals, ``n/a`` for a number that is not finite."""
    if not math.isfinite(value):
        return "n/a"
    # Adding 0.0 after rounding turns -0.0 into 0.0, so that "no difference" has no sign of its own.
    rounded = round(float(value), digits) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}"


def with_interval(
    estimate: Estimate, q: int, *, signed: bool = False, digits: int = 3, interval_digits: int | None = None
) -> str:
    """Returns for example ``2.250 [2.20, 2.30]``; ``interval_digits`` default to ``digits``."""
    inner = digits if interval_digits is None else interval_digits
    value = number(estimate.value_P[q], signed=signed, digits=digits)
    low, high = (number(x[q], signed=signed, digits=inner) for x in (estimate.low_P, estimate.high_P))
    return value if low == "n/a" else f"{value} [{low}, {high}]"


def aligned(cells: list[list[str]]) -> list[str]:
    """Returns one line per row of cells: the first column left, the others right aligned."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    ]
