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
    finite_P = np.isfinite(nll_NP).all(axis=0)
    bits_NP = np.where(finite_P, nll_NP, 0.0) * BITS_PER_NAT
    known_P = finite_P & (weight_NP.sum(axis=0) > 0)
    spread_P = known_P & ((weight_NP > 0).sum(axis=0) > 1)
    both_NQ = np.concatenate([bits_NP, weight_NP], axis=1)
    both_SQ = np.concatenate([counts_SN @ both_NQ for counts_SN in _resample(len(nll_NP), samples, seed)])
    sums_SP, weights_SP = np.split(both_SQ, 2, axis=1)
    value_P, low_P, high_P = (np.full(nll_NP.shape[1], np.nan) for _ in range(3))
    value_P[known_P] = bits_NP.sum(axis=0)[known_P] / weight_NP.sum(axis=0)[known_P]
    tail = 50.0 * (1.0 - INTERVAL)
    for p in np.flatnonzero(spread_P):
        kept_S = weights_SP[:, p] > 0
        if kept_S.any():
            low_P[p], high_P[p] = np.percentile(sums_SP[kept_S, p] / weights_SP[kept_S, p], [tail, 100.0 - tail])
    return Estimate(value_P, low_P, high_P)


def bootstrap_difference(
    nll_NP: np.ndarray, other_NP: np.ndarray, weight_NP: np.ndarray, *, samples: int, seed: int
) -> Estimate:
    """Returns first minus second in bits per token with its paired interval.

    Both are sums over the same tokens, so the difference of the two ratios is the ratio of the difference. Arguments
    as in ``bootstrap_level``.
    """
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is what the column becomes
        return bootstrap_level(nll_NP - other_NP, weight_NP, samples=samples, seed=seed)


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
