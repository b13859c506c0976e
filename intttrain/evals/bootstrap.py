"""Intervals over documents for a loss or for the difference between two losses of the same tokens.

Tokens of one document depend on each other, so documents are what is resampled: each of S resamples draws N documents
with replacement and recomputes sum / weight. Conditions and buckets see the same resamples (they are paired), which
removes the large spread between easy and hard documents from a difference. The intervals say nothing about training:
a second seed of the same run is another source of spread.

Percentiles of resamples alone are too narrow. N documents drawn from N spread by sqrt((N - 1) / N) too little, and a
spread that was estimated from N values needs Student's t in the place of the normal distribution: percentiles over 4
documents would cover 80 % instead of 95 %. ``widening`` mends both; docs/intervals.md has the simulation.

Letters: N documents, P columns (position buckets), Q columns of any sums, S resamples, s resamples of one block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from scipy import special

BITS_PER_NAT = 1.0 / math.log(2.0)
INTERVAL = 0.95  # probability inside the reported interval
FEW_DOCUMENTS = 30  # below, an interval leans on the shape of Student's t more than on the documents
HIGHEST_SCORE = 100.0
_BLOCK_ENTRIES = 1 << 22  # document counts that exist at the same time


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bits per token and the ends of the 95 % interval, float64; NaN where there is nothing to say.

    Attributes:
      value_P: sum of losses over sum of weights, all documents.
      low_P, high_P: interval, see ``interval``; NaN with fewer than two documents in the column.
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


def bootstrap_ratio(
    top_NP: np.ndarray,
    bottom_NP: np.ndarray,
    *,
    samples: int,
    seed: int,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Returns sum of the first over sum of the second with its interval.

    A column whose denominator is not above zero is NaN, and a resample in which it is not is left out. Whether the
    denominator is clear of zero at all is for the caller to find out. Arguments otherwise as in ``bootstrap_level``.

    Args:
      limits: the lowest and the highest value that the ratio can have, for example 0 and 1 of a share.
    """
    finite_P = (np.isfinite(top_NP) & np.isfinite(bottom_NP)).all(axis=0)
    top_NP, bottom_NP = (np.where(finite_P, x_NP, 0.0) for x_NP in (top_NP, bottom_NP))
    known_P = finite_P & (bottom_NP.sum(axis=0) > 0)
    documents_P = (bottom_NP != 0).sum(axis=0)
    both_SQ = resampled_sums(np.concatenate([top_NP, bottom_NP], axis=1), samples=samples, seed=seed)
    tops_SP, bottoms_SP = np.split(both_SQ, 2, axis=1)
    value_P, low_P, high_P = (np.full(top_NP.shape[1], np.nan) for _ in range(3))
    value_P[known_P] = top_NP.sum(axis=0)[known_P] / bottom_NP.sum(axis=0)[known_P]
    for p in np.flatnonzero(known_P):
        kept_S = bottoms_SP[:, p] > 0
        ratio_S = tops_SP[kept_S, p] / bottoms_SP[kept_S, p]
        low_P[p], high_P[p] = interval(value_P[p], ratio_S, documents=int(documents_P[p]))
    return Estimate(value_P, *(np.clip(end_P, *limits) for end_P in (low_P, high_P)))


def bootstrap_scores(
    scores: Mapping[str, np.ndarray], pairs: Iterable[tuple[str, str]], *, samples: int, seed: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Returns the mean scores of every condition, and their paired differences, ``"a - b"``, for these pairs.

    Args:
      scores: by condition, N x P from 0 to ``HIGHEST_SCORE``; no interval goes beyond what a score can be.
      pairs: conditions to compare.
      samples, seed: as in ``bootstrap_level``.
    """

    def mean(values_NP: np.ndarray, lowest: float) -> Estimate:
        limits = (lowest, HIGHEST_SCORE)
        return bootstrap_ratio(values_NP, np.ones_like(values_NP), samples=samples, seed=seed, limits=limits)

    levels = {name: mean(score_NP, 0.0) for name, score_NP in scores.items()}
    return levels, {f"{a} - {b}": mean(scores[a] - scores[b], -HIGHEST_SCORE) for a, b in pairs}


def resampled_sums(sum_NQ: np.ndarray, *, samples: int, seed: int) -> np.ndarray:
    """Returns S x Q: the columns summed over the documents of each resample; the same seed draws the same documents."""
    return np.concatenate([counts_SN @ sum_NQ for counts_SN in _resample(len(sum_NQ), samples, seed)])


def interval(value: float, statistic_S: np.ndarray, *, documents: int) -> tuple[float, float]:
    """Returns the ends of the percentile interval, moved away from the value by ``widening``.

    Args:
      value: the statistic of the documents themselves.
      statistic_S: that of the resamples.
      documents: N, those that have a part in it; both ends are NaN with fewer than two, and without a resample.
    """
    if documents < 2 or not len(statistic_S):
        return math.nan, math.nan
    tail = 50.0 * (1.0 - INTERVAL)
    low, high = np.percentile(statistic_S, [tail, 100.0 - tail])
    factor = widening(documents)
    return float(value - factor * (value - low)), float(value + factor * (high - value))


def widening(documents: int) -> float:
    """Returns sqrt(N / (N - 1)) t(N - 1) / 1.96: by what a percentile interval over N >= 2 documents is too narrow."""
    upper = 0.5 * (1.0 + INTERVAL)
    student = special.stdtrit(documents - 1, upper) / special.ndtri(upper)
    return float(math.sqrt(documents / (documents - 1)) * student)


def few_warning(few: str) -> str:
    """Returns the one line of a report about fewer than ``FEW_DOCUMENTS``, which ``few`` counts and names."""
    return f"{few}, fewer than {FEW_DOCUMENTS}: intervals are wide for that, and rough where a few stand out"


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
