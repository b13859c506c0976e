"""Intervals: exact where that is known, and right about as often as they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest

from intttrain.evals import bootstrap, bootstrap_difference, bootstrap_level

LN2 = math.log(2.0)
_OPTIONS = {"samples": 400, "seed": 0}


def documents(seed, effect, count=40):
    """Two conditions: easy and hard documents of different length, and an effect with noise (bits per token)."""
    generator = np.random.default_rng(seed)
    weight_NP = generator.integers(20, 200, size=(count, 1)).astype(float)
    level_NP = generator.normal(3.0, 0.8, (count, 1))
    other_NP = level_NP + effect + generator.normal(0.0, 0.1, (count, 1))
    return weight_NP * other_NP * LN2, weight_NP * level_NP * LN2, weight_NP


def test_value_is_the_ratio_of_sums_in_bits():
    nll_NP = np.array([[2.0, 1.0], [6.0, 0.0]]) * LN2
    weight_NP = np.array([[1.0, 4.0], [3.0, 0.0]])
    estimate = bootstrap_level(nll_NP, weight_NP, samples=200, seed=0)
    np.testing.assert_allclose(estimate.value_P, [2.0, 0.25])
    np.testing.assert_allclose([estimate.low_P[0], estimate.high_P[0]], 2.0)  # both documents are at 2 bits
    assert np.isnan(estimate.low_P[1])  # one document alone has no spread to learn from
    assert np.isnan(estimate.high_P[1])


def test_resamples_are_documents_drawn_with_replacement():
    """Against a loop that redoes every resample from the same draws; ends are moved away from the value."""
    nll_NP, _, weight_NP = documents(0, 0.0, count=9)
    estimate = bootstrap_level(nll_NP, weight_NP, samples=300, seed=5)
    drawn_SN = np.random.default_rng(5).integers(9, size=(300, 9))
    ratios = [nll_NP[drawn].sum() / weight_NP[drawn].sum() / LN2 for drawn in drawn_SN]
    value = nll_NP.sum() / weight_NP.sum() / LN2
    factor = math.sqrt(9 / 8) * 2.306004 / 1.959964  # Student's t with 8 degrees of freedom, from a table
    wanted = value + factor * (np.percentile(ratios, [2.5, 97.5]) - value)
    np.testing.assert_allclose([estimate.low_P[0], estimate.high_P[0]], wanted, rtol=1e-6)


def test_the_documents_of_a_column_are_those_that_reach_it():
    """Two of nine documents reach the second column: it is as wide as if they were alone."""
    nll_NP, _, weight_NP = documents(0, 0.0, count=9)
    some_NP = weight_NP * (np.arange(9)[:, None] < 2)
    both = bootstrap_level(np.hstack([nll_NP, nll_NP * (some_NP > 0)]), np.hstack([weight_NP, some_NP]), **_OPTIONS)
    alone = bootstrap_level(nll_NP[:2], weight_NP[:2], **_OPTIONS)
    ends = [
        alone.value_P[0] + bootstrap.widening(2) * (x - alone.value_P[0])
        for x in nll_NP[:2, 0] / weight_NP[:2, 0] / LN2
    ]
    np.testing.assert_allclose([both.low_P[1], both.high_P[1]], sorted(ends), rtol=1e-9)
    np.testing.assert_allclose([alone.low_P[0], alone.high_P[0]], sorted(ends), rtol=1e-9)


def test_a_share_stays_between_its_limits():
    passed_NP = np.array([[100.0, 0.0, 100.0], [100.0, 0.0, 0.0], [0.0, 100.0, 100.0]])
    free = bootstrap.bootstrap_ratio(passed_NP, np.ones((3, 3)), **_OPTIONS)
    estimate = bootstrap.bootstrap_ratio(passed_NP, np.ones((3, 3)), **_OPTIONS, limits=(0.0, 100.0))
    assert (free.low_P < 0.0).any() and (free.high_P > 100.0).any()
    np.testing.assert_array_equal(estimate.low_P, np.maximum(free.low_P, 0.0))
    np.testing.assert_array_equal(estimate.high_P, np.minimum(free.high_P, 100.0))


def test_constant_difference_is_exact():
    """Every document is better by .25 bits per token, however different the documents are: no uncertainty is left."""
    nll_NP, _, weight_NP = documents(1, 0.0)
    estimate = bootstrap_difference(nll_NP - 0.25 * LN2 * weight_NP, nll_NP, weight_NP, samples=500, seed=0)
    for values in (estimate.value_P, estimate.low_P, estimate.high_P):
        np.testing.assert_allclose(values, -0.25, rtol=1e-9)


def test_pairing_removes_the_spread_between_documents():
    on, off, weight_NP = documents(2, -0.2)
    difference = bootstrap_difference(on, off, weight_NP, samples=500, seed=0)
    level = bootstrap_level(on, weight_NP, samples=500, seed=0)
    assert (difference.high_P - difference.low_P)[0] < 0.3 * (level.high_P - level.low_P)[0]
    assert difference.high_P[0] < 0.0


def coverage(count, *, trials, widened=True):
    """Returns how often the interval over ``count`` documents has the truth in it; every trial is a column."""
    x_NP = np.random.default_rng(count).normal(3.0, 0.8, (count, trials))
    with pytest.MonkeyPatch.context() as patch:
        if not widened:
            patch.setattr(bootstrap, "widening", lambda documents: 1.0)
        estimate = bootstrap.bootstrap_ratio(x_NP, np.ones_like(x_NP), samples=1000, seed=0)
    return float(np.mean((estimate.low_P <= 3.0) & (estimate.high_P >= 3.0)))


@pytest.mark.parametrize(("count", "percentiles"), [(4, 0.80), (16, 0.92)])
def test_few_documents_are_covered_as_often_as_said(count, percentiles):
    """Percentiles alone reach no more than ``percentiles``. 1,000 trials have a standard error of .7 %."""
    assert 0.92 <= coverage(count, trials=1000) <= 0.97
    assert coverage(count, trials=1000, widened=False) <= percentiles + 0.01


@pytest.mark.slow
def test_the_coverage_of_the_page():
    """The table of docs/intervals.md, with a standard error of .3 %; prints it with ``-s``."""
    found = {n: (coverage(n, trials=4000, widened=False), coverage(n, trials=4000)) for n in (4, 8, 16, 30, 100)}
    print("\n".join(f"{n}: {before:.3f} -> {after:.3f}" for n, (before, after) in found.items()))
    assert all(0.935 <= after <= 0.965 for _, after in found.values())
    assert [round(before, 2) for before, _ in found.values()] == pytest.approx(
        [0.79, 0.88, 0.91, 0.93, 0.94], abs=0.011
    )


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_the_truth_about_as_often_as_they_say(paired):
    truth, trials, covered = -0.03 if paired else 2.97, 400, 0
    for trial in range(trials):
        on, off, weight_NP = documents(1000 + trial, -0.03)
        options = {"samples": 300, "seed": trial}
        estimate = (
            bootstrap_difference(on, off, weight_NP, **options) if paired else bootstrap_level(on, weight_NP, **options)
        )
        covered += int(estimate.low_P[0] <= truth <= estimate.high_P[0])
    # Documents of unequal length are a little less than 40 of equal length; 400 trials have a standard error of 1.1 %.
    assert 0.90 <= covered / trials <= 0.98


def test_seeded_and_independent_of_block_size(monkeypatch):
    on, off, weight_NP = documents(3, 0.1)

    def interval(seed):
        estimate = bootstrap_difference(on, off, weight_NP, samples=101, seed=seed)
        return estimate.low_P[0], estimate.high_P[0]

    first = interval(0)
    assert interval(0) == first
    assert interval(1) != first
    monkeypatch.setattr(bootstrap, "_BLOCK_ENTRIES", 7 * 40)  # 101 = 14 blocks of 7 and a rest of 3
    np.testing.assert_allclose(interval(0), first, rtol=1e-12)


def test_resamples_without_tokens_are_left_out():
    """Two of three documents reach the second column; a resample of the third alone says nothing about it."""
    weight_NP = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    nll_NP = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 0.0]]) * LN2
    estimate = bootstrap_level(nll_NP, weight_NP, samples=500, seed=0)
    np.testing.assert_allclose(estimate.low_P, [1.0, 2.0])
    np.testing.assert_allclose(estimate.high_P, [1.0, 2.0])


def test_unknown_values_stay_in_their_column():
    weight_NP = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    nll_NP = np.array([[1.0, np.inf, 0.0], [1.0, 1.0, 0.0]])
    for estimate in (
        bootstrap_level(nll_NP, weight_NP, samples=20, seed=0),
        bootstrap_difference(nll_NP, nll_NP, weight_NP, samples=20, seed=0),
    ):
        for values in (estimate.value_P, estimate.low_P, estimate.high_P):
            np.testing.assert_array_equal(np.isnan(values), [False, True, True])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\) and weights \(2, 2\)"):
        bootstrap_level(np.zeros((2, 3)), np.zeros((2, 2)), samples=1, seed=0)
