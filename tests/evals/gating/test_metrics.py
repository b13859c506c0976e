"""Controls that match counts, recoveries that keep silent inside the noise, selectivity, and gates nobody reads."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from intttrain.config import EvalConfig
from intttrain.evals.bootstrap import widening
from intttrain.evals.gating.metrics import (
    LEAST_SPAN,
    Controls,
    count_updates,
    first_gates,
    last_gates,
    measure_rule,
    measure_shuffled,
    periodic_gates,
    random_gates,
    score_bases,
    score_controls,
    shared_counts,
)
from intttrain.evals.gating.oracles import Outcome, enumerate_decisions, live_gates, make_outcome
from tests.evals.gating.gating_world import random_world

CONFIG = EvalConfig(seq_len=8, documents=9, min_document_tokens=4, position_edges=(8,), bootstrap_samples=200, seed=0)
VALID = (6, 4, 2, 1, 6)
SEEDS = tuple(range(10))
LN2 = math.log(2.0)


def decisions(seed, world, layers=1):
    return np.random.default_rng(seed).integers(0, 2, (*world.weights_NM.shape, layers)).astype(float)


def measured(world, gates_NMn, *, oracles=None, signal_NMn=None, losses=None):
    losses = losses or world
    rule = make_outcome(
        gates_NMn, losses(np.arange(len(gates_NMn)), gates_NMn[:, :, 0] if gates_NMn.shape[2] == 1 else gates_NMn),
        world.weights_NM,
    )  # fmt: skip
    return measure_rule(
        rule,
        references=score_bases(losses, world.weights_NM),
        controls=score_controls(losses, gates_NMn, world.weights_NM, seeds=SEEDS),
        oracles=oracles or {},
        weights_NM=world.weights_NM,
        signal_NMn=signal_NMn,
        eval_config=CONFIG,
    )


# --- controls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_controls_have_the_counts_of_the_rule_in_every_document_and_layer(layers):
    world = random_world(0, valid=VALID, layers=layers)
    gates_NMn = decisions(1, world, layers)
    counts_Nn = (gates_NMn * live_gates(world.weights_NM)[:, :, None]).sum(axis=1)
    world.calls.clear()
    score_controls(world, gates_NMn, world.weights_NM, seeds=SEEDS)
    assert len(world.calls) == len(SEEDS) + 3
    for _, gates in world.calls:
        assert set(np.unique(gates)) <= {0.0, 1.0}
        np.testing.assert_array_equal(gates.reshape(5, 6, layers).sum(axis=1), counts_Nn)
        assert not (gates.reshape(5, 6, layers)[~live_gates(world.weights_NM)]).any()
    assert len({gates.tobytes() for _, gates in world.calls[:10]}) > 5  # seeds differ


def test_random_gates_are_equally_likely_and_layers_differ():
    weights_NM = np.ones((400, 6))
    gates_NMn = np.mean([random_gates(np.full((400, 2), 2), weights_NM, seed=seed) for seed in range(10)], axis=0)
    np.testing.assert_allclose(gates_NMn.mean(axis=0)[:5], 0.4, atol=0.05)
    np.testing.assert_array_equal(gates_NMn[:, 5], 0.0)
    assert (gates_NMn[:, :, 0] != gates_NMn[:, :, 1]).any()


def test_first_last_and_periodic_stand_where_their_names_say():
    weights_NM = np.ones((1, 10))
    weights_NM[0, 9] = 0.0  # nine chunks, eight live gates

    def places(make, count):
        return list(np.flatnonzero(make(np.array([[count]]), weights_NM)[0, :, 0]))

    assert places(first_gates, 3) == [0, 1, 2]
    assert places(last_gates, 3) == [5, 6, 7]
    assert places(periodic_gates, 4) == [0, 2, 4, 6]
    assert places(periodic_gates, 2) == [1, 5]
    assert places(periodic_gates, 1) == [3]
    for count in range(9):
        found = places(periodic_gates, count)
        assert len(found) == count
        assert not count or np.diff(found, prepend=found[0] - 8 // count).min() >= 8 // count


def test_random_is_the_average_over_its_seeds():
    world = random_world(1, valid=VALID)
    gates_NMn = decisions(2, world)
    controls = score_controls(world, gates_NMn, world.weights_NM, seeds=SEEDS)
    counts_Nn = count_updates(gates_NMn, world.weights_NM)
    each = [random_gates(counts_Nn, world.weights_NM, seed=seed) for seed in SEEDS]
    nll = [np.nan_to_num(world(np.arange(5), gates[:, :, 0])) for gates in each]
    np.testing.assert_allclose(controls.random_nll_SNM, nll)
    np.testing.assert_allclose(controls.outcomes["random"].nll_NM, np.mean(nll, axis=0))
    np.testing.assert_allclose(controls.outcomes["random"].gates_NMn, np.mean(each, axis=0))
    metrics = measured(world, gates_NMn)
    assert metrics.random_S == pytest.approx([x.sum() / world.weights_NM.sum() / LN2 for x in nll])
    assert metrics.levels["random"].value_P[0] == pytest.approx(metrics.random_S.mean())


def test_too_few_seeds_and_soft_decisions_are_refused():
    world = random_world(0)
    with pytest.raises(ValueError, match="9 different random seeds are fewer than 10"):
        score_controls(world, decisions(0, world), world.weights_NM, seeds=(*range(9), 8))
    with pytest.raises(ValueError, match="decisions are 0 or 1"):
        count_updates(np.full((5, 6, 1), 0.5), world.weights_NM)


# --- the dead gates ------------------------------------------------------------------------------------------------


def test_gates_that_nobody_reads_count_nowhere():
    """Two rules that differ there only have the same numbers, all of them."""
    world = random_world(2, valid=VALID)
    gates_NMn = decisions(3, world)
    other_NMn = np.where(live_gates(world.weights_NM)[:, :, None], gates_NMn, 1.0 - gates_NMn)
    signal_NMn = np.random.default_rng(0).normal(size=gates_NMn.shape)
    shifted_NMn = np.where(live_gates(world.weights_NM)[:, :, None], signal_NMn, 1e6)
    oracles = {"tree": enumerate_decisions(world, world.weights_NM).best()}
    one = measured(world, gates_NMn, oracles=oracles, signal_NMn=signal_NMn)
    two = measured(world, other_NMn, oracles=oracles, signal_NMn=shifted_NMn)
    np.testing.assert_equal(dataclasses.asdict(one), dataclasses.asdict(two))
    for made in (gates_NMn, other_NMn):
        counts_Nn = (gates_NMn * live_gates(world.weights_NM)[:, :, None]).sum(axis=1)
        np.testing.assert_array_equal(count_updates(made, world.weights_NM), counts_Nn)
    everything = np.ones_like(gates_NMn)
    np.testing.assert_array_equal(count_updates(everything, world.weights_NM)[:, 0], np.array(VALID) - 1)
    assert measured(world, everything).rate == 1.0


def test_rate_and_map_by_hand():
    world = random_world(0, documents=2, chunks=4, valid=(4, 2))
    gates_NMn = np.array([[1, 0, 1, 1], [1, 1, 1, 1]], float)[:, :, None]
    metrics = measured(world, gates_NMn)
    assert metrics.rate == pytest.approx(3 / 4)  # of 3 + 1 live gates
    np.testing.assert_array_equal(metrics.gate_map_Mn[:, 0], [1.0, 0.0, 1.0, np.nan])
    np.testing.assert_array_equal(shared_counts(gates_NMn, world.weights_NM), [2, 1])


# --- recovery ------------------------------------------------------------------------------------------------------


def outcomes_with(effects, *, documents=30, noise=0.02, seed=0):
    """Outcomes of one chunk pair per document whose levels lie ``effects`` (bits per token) from that of ``never``."""
    generator = np.random.default_rng(seed)
    level_N1 = generator.normal(3.0, 0.8, (documents, 1))
    made = {}
    for name, effect in effects.items():
        nll_NM = (level_N1 + effect + noise * generator.normal(size=(documents, 1))) * np.full((1, 2), 50.0) * LN2
        made[name] = Outcome(np.zeros((documents, 2, 1)), nll_NM)
    return made


def recoveries(effects, **options):
    made = outcomes_with({"never": 0.0, "always": 0.0} | effects, **options)
    weights_NM = np.full(made["rule"].nll_NM.shape, 50.0)
    controls = dict.fromkeys(("random", "first", "last", "periodic"), made["random"])
    return measure_rule(
        made["rule"],
        references={name: made[name] for name in ("never", "always")},
        controls=Controls(controls, made["random"].nll_NM[None]),
        oracles={"tree": made["tree"]},
        weights_NM=weights_NM,
        signal_NMn=None,
        eval_config=CONFIG,
    ).recoveries["tree"]


def test_recovery_is_the_ratio_of_gains_with_an_interval():
    found = recoveries({"random": -0.1, "rule": -0.25, "tree": -0.4})
    for control, wanted in (("random", 0.5), ("never", 0.625)):
        share = found[control].share
        assert share.value_P[0] == pytest.approx(wanted, abs=0.03)
        assert share.low_P[0] < share.value_P[0] < share.high_P[0]
        assert share.high_P[0] - share.low_P[0] < 0.15
    assert found["random"].span.value_P[0] == pytest.approx(0.3, abs=0.02)
    assert found["random"].gain.value_P[0] == pytest.approx(0.15, abs=0.02)


def test_recovery_interval_is_that_of_a_loop_over_resamples():
    made = outcomes_with({"never": 0.0, "random": -0.1, "rule": -0.2, "tree": -0.4})
    share = recoveries({"random": -0.1, "rule": -0.2, "tree": -0.4}, seed=3)["never"].share
    made = outcomes_with({"never": 0.0, "always": 0.0, "random": -0.1, "rule": -0.2, "tree": -0.4}, seed=3)
    total = {name: outcome.nll_NM.sum(axis=1) for name, outcome in made.items()}
    drawn_SN = np.random.default_rng(CONFIG.seed).integers(30, size=(CONFIG.bootstrap_samples, 30))
    ratios = [
        (total["never"] - total["rule"])[d].sum() / (total["never"] - total["tree"])[d].sum() for d in drawn_SN
    ]  # fmt: skip
    value = share.value_P[0]
    ends = value + widening(30) * (np.percentile(ratios, [2.5, 97.5]) - value)
    np.testing.assert_allclose([share.low_P[0], share.high_P[0]], ends)


@pytest.mark.parametrize(
    ("random", "noise"), [(-0.4, 0.02), (-0.398, 0.2), (-0.5, 0.02)], ids=["equal", "noisy", "oracle worse"]
)
def test_recovery_keeps_silent_where_the_oracle_gains_nothing(random, noise):
    """A rule far below both would have any share whatever; against ``never`` there is something to share."""
    found = recoveries({"random": random, "rule": -1.0, "tree": -0.4}, noise=noise)
    assert found["random"].share is None
    assert found["random"].span.low_P[0] <= LEAST_SPAN
    assert found["never"].share.value_P[0] > 1.5


def test_a_gain_of_rounding_is_noise():
    """A minimum over many decisions that all do the same is below their average in every document."""
    assert recoveries({"random": 0.0, "rule": -1e-6, "tree": -2e-5}, noise=1e-9)["random"].share is None
    assert recoveries({"random": 0.0, "rule": -0.0, "tree": -2e-3}, noise=1e-9)["random"].share is not None


def test_the_oracle_itself_recovers_everything_and_random_nothing():
    world = random_world(4, documents=20)
    tree = enumerate_decisions(world, world.weights_NM)
    best = tree.best()
    share = measured(world, best.gates_NMn, oracles={"tree": best}).recoveries["tree"]["random"].share
    assert (share.low_P[0], share.value_P[0], share.high_P[0]) == pytest.approx((1.0, 1.0, 1.0))
    blind = random_gates(best.gates_NMn.sum(axis=1).astype(int), world.weights_NM, seed=99)
    share = measured(world, blind, oracles={"tree": best}).recoveries["tree"]["random"].share
    assert share.low_P[0] < 0.0 < share.high_P[0]


def test_a_failed_rule_has_no_numbers_and_stops_nothing():
    world = random_world(5)

    def failing(documents, gates):
        return np.where(gates[:, :1] > 0, np.inf, world(documents, gates))

    tree = enumerate_decisions(failing, world.weights_NM).best()
    metrics = measured(world, np.ones((5, 6, 1)), losses=failing, oracles={"tree": tree})
    assert np.isnan(metrics.levels["rule"].value_P[0])
    assert np.isfinite(metrics.levels["never"].value_P[0])
    assert np.isnan(metrics.recoveries["tree"]["never"].share.value_P[0])


# --- selectivity ---------------------------------------------------------------------------------------------------


def test_selectivity_by_hand():
    """Centred, the documents are (-1, 1) and (-3, 3, 0) over 2; the last gate is dead."""
    world = random_world(0, documents=2, chunks=4, valid=(3, 4))
    signal_NMn = np.array([[1.0, 3.0, 99.0, 99.0], [3.0, 9.0, 6.0, 99.0]])[:, :, None]
    metrics = measured(world, np.array([[0, 1, 1, 1], [0, 1, 0, 1]], float)[:, :, None], signal_NMn=signal_NMn)
    assert metrics.selectivity.value_P[0] == pytest.approx(((1 + 3) / 2 - (-1 - 3 + 0) / 3) / 2)


def test_a_rule_that_keeps_its_rate_and_chooses_at_random_has_no_selectivity():
    """Documents differ in level and in rate, which is no choice between chunks."""
    world = random_world(0, documents=60, chunks=6)
    generator = np.random.default_rng(1)
    signal_NMn = generator.normal(size=(60, 6, 1)) + 0.5 * generator.normal(size=(60, 1, 1))
    chosen_NMn = (signal_NMn > np.median(signal_NMn[:, :5])).astype(float)
    blind_NMn = random_gates(chosen_NMn[:, :5].sum(axis=1).astype(int), world.weights_NM, seed=0)
    chosen, blind = (measured(world, gates, signal_NMn=signal_NMn) for gates in (chosen_NMn, blind_NMn))
    assert chosen.rate == blind.rate
    assert chosen.selectivity.low_P[0] > 1.0
    assert blind.selectivity.low_P[0] < 0.0 < blind.selectivity.high_P[0]
    assert blind.selectivity.high_P[0] < 0.5
    flipped = measured(world, 1.0 - chosen_NMn, signal_NMn=signal_NMn)
    assert flipped.selectivity.value_P[0] == pytest.approx(-chosen.selectivity.value_P[0])


def test_layers_are_standardised_by_themselves():
    """A second layer with other units and the same order changes nothing."""
    world = random_world(0, layers=2)
    signal_NM1, gates_NM1 = np.random.default_rng(1).normal(size=(5, 6, 1)), decisions(0, world)
    one = measured(world, gates_NM1, signal_NMn=signal_NM1)
    gates_NM2 = np.repeat(gates_NM1, 2, axis=2)
    two = measured(world, gates_NM2, signal_NMn=np.concatenate([signal_NM1, 7.0 + 1000.0 * signal_NM1], axis=2))
    assert two.selectivity.value_P[0] == pytest.approx(one.selectivity.value_P[0])


def test_selectivity_without_both_kinds_or_values():
    world = random_world(0, valid=VALID)
    signal_NMn = np.random.default_rng(1).normal(size=(5, 6, 1))
    assert np.isnan(measured(world, np.ones((5, 6, 1)), signal_NMn=signal_NMn).selectivity.value_P[0])
    assert measured(world, np.ones((5, 6, 1))).selectivity is None
    holes_NMn = signal_NMn.copy()
    holes_NMn[:, 0] = np.nan  # a signal that the first chunk does not have
    late_NMn = np.where(np.arange(6)[None, :, None] == 0, 1.0, decisions(3, world))
    assert np.isfinite(measured(world, late_NMn, signal_NMn=holes_NMn).selectivity.value_P[0])


def test_shuffled_chunks_are_compared_with_themselves():
    """Two layers, chunks 1 and 3: 4 places in each of three documents, in which 0, 1 and 2 less are written."""
    own_NMn = np.ones((3, 5, 2))
    seen_NMn = own_NMn.copy()
    seen_NMn[1, 1, 0] = seen_NMn[2, 1, 1] = seen_NMn[2, 3, 0] = 0
    seen_NMn[:, 4] = 0  # not shuffled, does not count
    found = measure_shuffled(own_NMn, seen_NMn, np.array([False, True, False, True, False]), CONFIG)
    assert found.value_P[0] == pytest.approx(-3 / 12)
    assert -1.0 <= found.low_P[0] < -0.5 < -0.25 < found.high_P[0] < 1.0
