"""Intervals: exact where that is known, and right about as often as they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest

from intttrain.evals import bootstrap, bootstrap_difference, bootstrap_level

LN2 = math.log(2.0)


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
    """Against a loop that redoes every resample from the same draws."""
    nll_NP, _, weight_NP = documents(0, 0.0, count=9)
    estimate = bootstrap_level(nll_NP, weight_NP, samples=300, seed=5)
    drawn_SN = np.random.default_rng(5).integers(9, size=(300, 9))
    ratios = [nll_NP[drawn].sum() / weight_NP[drawn].sum() / LN2 for drawn in drawn_SN]
    np.testing.assert_allclose([estimate.low_P[0], estimate.high_P[0]], np.percentile(ratios, [2.5, 97.5]))


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
    # Percentile intervals from 40 documents fall a little short of 95 %; 400 trials have a standard error of 1.1 %.
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
