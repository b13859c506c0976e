"""Intervals over documents for a loss or for the difference between two losses of the same tokens.

Tokens of one document depend on each other, so documents are what is resampled: each of S resamples draws N documents
with replacement and recomputes sum / weight. Conditions and buckets see the same resamples (they are paired), which
removes the large spread between easy and hard documents from a difference. The intervals say nothing about training:
a second seed of the same run is another source of spread.

Letters: N documents, P columns (position buckets), S resamples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

BITS_PER_NAT = 1.0 / math.log(2.0)
INTERVAL = 0.95  # probability inside the reported interval
_BLOCK_ENTRIES = 1 << 22  # document counts that exist at the same time


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bits per token and the ends of the 95 % interval, float64; NaN where there is nothing to say.

    Attributes:
      value_P: sum of losses over sum of weights, all documents.
      low_P, high_P: percentile interval; NaN with fewer than two documents in the column.
    """

    value_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray


def bootstrap_level(nll_NP: np.ndarray, weight_NP: np.ndarray, *, samples: int, seed: int) -> Estimate:
    """Returns the loss in bits per token with its interval.

    A resample without any token in a column is left out of that column's interval.

    Args:
      nll_NP: sums in nats. A value that is not finite makes its column NaN.
      weight_NP: number of tokens, 0 where a document does not reach the column.
      samples: S.
      seed: of the resamples; equal for everything that is to be compared.
    """
    if nll_NP.shape != weight_NP.shape or nll_NP.ndim != 2:
        raise ValueError(f"losses {nll_NP.shape} and weights {weight_NP.shape} must be one N x P shape")
    return bootstrap_ratio(nll_NP * BITS_PER_NAT, weight_NP, samples=samples, seed=seed)


def bootstrap_difference(
    nll_NP: np.ndarray, other_NP: np.ndarray, weight_NP: np.ndarray, *, samples: int, seed: int
) -> Estimate:
    """Returns first minus second in bits per token with its paired interval.

    Both are sums over the same tokens, so the difference of the two ratios is the ratio of the difference. Arguments
    as in ``bootstrap_level``.
    """
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is what the column becomes
        return bootstrap_level(nll_NP - other_NP, weight_NP, samples=samples, seed=seed)


def bootstrap_ratio(top_NP: np.ndarray, bottom_NP: np.ndarray, *, samples: int, seed: int) -> Estimate:
    """Returns sum of the first over sum of the second with its interval.

    A column whose denominator is not above zero is NaN, and a resample in which it is not is left out. Whether the
    denominator is clear of zero at all is for the caller to find out. Arguments otherwise as in ``bootstrap_level``.
    """
    finite_P = (np.isfinite(top_NP) & np.isfinite(bottom_NP)).all(axis=0)
    top_NP, bottom_NP = (np.where(finite_P, x_NP, 0.0) for x_NP in (top_NP, bottom_NP))
    known_P = finite_P & (bottom_NP.sum(axis=0) > 0)
    spread_P = known_P & ((bottom_NP != 0).sum(axis=0) > 1)
    both_SQ = resampled_sums(np.concatenate([top_NP, bottom_NP], axis=1), samples=samples, seed=seed)
    tops_SP, bottoms_SP = np.split(both_SQ, 2, axis=1)
    value_P, low_P, high_P = (np.full(top_NP.shape[1], np.nan) for _ in range(3))
    value_P[known_P] = top_NP.sum(axis=0)[known_P] / bottom_NP.sum(axis=0)[known_P]
    for p in np.flatnonzero(spread_P):
        kept_S = bottoms_SP[:, p] > 0
        low_P[p], high_P[p] = interval(tops_SP[kept_S, p] / bottoms_SP[kept_S, p])
    return Estimate(value_P, low_P, high_P)


def resampled_sums(sum_NQ: np.ndarray, *, samples: int, seed: int) -> np.ndarray:
    """Returns S x Q: the columns summed over the documents of each resample; the same seed draws the same documents."""
    return np.concatenate([counts_SN @ sum_NQ for counts_SN in _resample(len(sum_NQ), samples, seed)])


def interval(statistic_S: np.ndarray) -> tuple[float, float]:
    """Returns the ends of the percentile interval, NaN without a value."""
    if not len(statistic_S):
        return math.nan, math.nan
    tail = 50.0 * (1.0 - INTERVAL)
    low, high = np.percentile(statistic_S, [tail, 100.0 - tail])
    return float(low), float(high)


def _resample(documents: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields blocks [s, N]: how often each document occurs in each resample."""
    generator = np.random.default_rng(seed)
    block = max(1, min(samples, _BLOCK_ENTRIES // documents))
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn_sN = generator.integers(documents, size=(size, documents))
        cell_sN = drawn_sN + documents * np.arange(size)[:, None]
        counts = np.bincount(cell_sN.ravel(), minlength=size * documents)
        yield counts.reshape(size, documents).astype(np.float64)
