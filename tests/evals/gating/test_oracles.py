"""Oracles against brute force, finite differences and worlds made so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from intttrain.evals.gating.oracles import (
    MAX_TREE_GATES,
    enumerate_decisions,
    first_order,
    force_gates,
    greedy,
    highest_gates,
    live_gates,
    rollout,
)
from tests.evals.gating.gating_world import World, random_world

VALID = (6, 4, 2, 1, 6)  # chunks with predictions; a document of one chunk has nothing to decide


def total(outcome):
    return outcome.nll_NM.sum(axis=1)


def brute_force(world, document, count=None):
    """The best (J, number) over binary numbers, independent of how the tree orders or skips them."""
    live = int(world.weights_NM[document].astype(bool).sum()) - 1
    best = (np.inf, None)
    for number in range(2**live):
        gates = np.array([number >> i & 1 for i in range(live)] + [0] * (world.chunks - live), float)
        if count is None or gates.sum() == count:
            nll = world(np.array([document]), gates[None])[0]
            best = min(best, (nll[world.weights_NM[document] > 0].sum(), tuple(gates)))
    return best


def test_live_gates_are_those_that_a_later_prediction_reads():
    weights_NM = np.array([[2.0, 2, 2, 1], [3, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]])
    wanted = [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(live_gates(weights_NM), np.array(wanted, bool))


@pytest.mark.parametrize("seed", range(5))
def test_tree_is_brute_force(seed):
    world = random_world(seed, valid=VALID)
    tree = enumerate_decisions(world, world.weights_NM)
    best, pair = tree.best(), tree.best(np.array([2, 2, 1, 0, 3]))
    for d, count in enumerate((2, 2, 1, 0, 3)):
        for outcome, wanted in ((best, brute_force(world, d)), (pair, brute_force(world, d, count))):
            assert total(outcome)[d] == pytest.approx(wanted[0], rel=1e-12)
            assert tuple(outcome.gates_NMn[d, :, 0]) == wanted[1]
    np.testing.assert_array_equal(pair.gates_NMn.sum(axis=(1, 2)), (2, 2, 1, 0, 3))
    assert (total(best) <= total(pair)).all()


def test_tree_tries_every_decision_once():
    world = random_world(0, valid=VALID)
    enumerate_decisions(world, world.weights_NM)
    tried = [(d, *g) for documents, gates in world.calls for d, g in zip(documents, gates, strict=True)]
    assert len(world.calls) == 2**5
    assert len(tried) == len(set(tried)) == sum(2 ** (valid - 1) for valid in VALID)


def test_tree_refuses_long_documents_and_counts_that_do_not_exist():
    world = random_world(0, chunks=MAX_TREE_GATES + 2)
    with pytest.raises(ValueError, match="8 live gates are too many to try all decisions; at most 7"):
        enumerate_decisions(world, world.weights_NM)
    short = random_world(0, valid=VALID)
    with pytest.raises(ValueError, match="document 2 has fewer live gates than 2 updates"):
        enumerate_decisions(short, short.weights_NM).best(np.array([2, 2, 2, 0, 2]))


def test_equal_losses_mean_fewer_updates():
    world = random_world(0, eta=0.0)
    assert enumerate_decisions(world, world.weights_NM).best().gates_NMn.sum() == 0


@pytest.mark.parametrize("base", ["always", "never"])
def test_rollout_is_never_worse_than_its_base_and_never_better_than_the_tree(base):
    improved = 0
    for seed in range(40):
        world = random_world(seed, valid=VALID, eta=(0.1, 0.3, 1.0, 3.0)[seed % 4])
        start = force_gates(world, np.full((5, 6, 1), float(base == "always")), world.weights_NM)
        found = rollout(world, world.weights_NM, base=base)
        np.testing.assert_allclose(
            total(found), total(force_gates(world, found.gates_NMn, world.weights_NM)), rtol=1e-12
        )
        assert (total(found) <= total(start)).all()
        assert (total(found) >= total(enumerate_decisions(world, world.weights_NM).best()) * (1 - 1e-12)).all()
        improved += (total(found) < total(start)).sum()
    assert improved > 40  # it does something


@pytest.mark.parametrize("base", ["always", "never"])
def test_rollout_is_a_loop_over_gates(base):
    """One document at a time, both decisions tried, whatever was known before forgotten."""
    world = random_world(3, valid=VALID)
    found = rollout(world, world.weights_NM, base=base)
    assert len(world.calls) == 1 + 5
    for d, valid in enumerate(VALID):
        gates = np.zeros(6)
        gates[: valid - 1] = float(base == "always")
        for i in range(valid - 1):
            tries = []
            for choice in (gates[i], 1 - gates[i]):  # of equal ones the base's
                gates[i] = choice
                tries.append((np.nansum(world(np.array([d]), gates[None])), len(tries), choice))
            gates[i] = min(tries)[2]
        np.testing.assert_array_equal(found.gates_NMn[d, :, 0], gates)


def one_feature(writes, wants, eta=1.0):
    """One document, one token per chunk, one number: chunk i writes and wants a number each."""
    v, y = (np.array(x, float).reshape(1, -1, 1, 1) for x in (writes, wants))
    return World(np.ones((1, *v.shape)), v, y, [len(writes)], eta=eta)


def test_greedy_can_lose_to_never():
    """The first update helps the next chunk and harms all later ones, and none of those can undo it."""
    world = one_feature(writes=[1, 0, 0, 0, 0], wants=[0, 1, -1, -1, -1])
    never = force_gates(world, np.zeros((1, 5, 1)), world.weights_NM)
    found = greedy(world, world.weights_NM)
    np.testing.assert_array_equal(found.gates_NMn[0, :, 0], [1, 0, 0, 0, 0])
    assert total(found)[0] > total(never)[0]
    np.testing.assert_array_equal(rollout(world, world.weights_NM, base="never").gates_NMn, 0.0)


def test_rollouts_of_two_bases_differ_where_updates_are_good_together_only():
    """3 and -2 add up to the 1 that is wanted; each alone is worse than nothing."""
    world = one_feature(writes=[3, -2, 0, 0, 0, 0], wants=[0, 1, 1, 1, 1, 1])
    never, always = (rollout(world, world.weights_NM, base=base) for base in ("never", "always"))
    np.testing.assert_array_equal(never.gates_NMn[0, :, 0], [0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(always.gates_NMn[0, :, 0], [1, 1, 1, 1, 1, 0])
    assert total(always) == total(enumerate_decisions(world, world.weights_NM).best()) < total(never)


def test_greedy_minimises_the_next_chunk_given_what_it_decided():
    world = random_world(4, valid=VALID)
    found = greedy(world, world.weights_NM)
    for d, valid in enumerate(VALID):
        gates = np.zeros(6)
        for i in range(valid - 1):
            losses = [world(np.array([d]), np.where(np.arange(6) == i, g, gates)[None])[0, i + 1] for g in (0.0, 1.0)]
            gates[i] = float(losses[1] < losses[0])
        np.testing.assert_array_equal(found.gates_NMn[d, :, 0], gates)


def test_first_order_ranks_by_finite_differences():
    world = random_world(5, valid=VALID)
    counts_N = np.array([2, 1, 1, 0, 3])
    found, slope_NM = first_order(world, world.gradients, world.weights_NM, counts_N)
    live_NM, h = live_gates(world.weights_NM), 1e-4
    for d, valid in enumerate(VALID):
        numeric = np.zeros(6)
        for i in range(valid - 1):
            ends = [np.nansum(world(np.array([d]), (live_NM[d] + s * h * (np.arange(6) == i))[None])) for s in (1, -1)]
            numeric[i] = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(slope_NM[d], numeric, atol=1e-6)
        wanted = np.zeros(6)
        wanted[np.argsort(numeric[: valid - 1])[: counts_N[d]]] = 1.0
        np.testing.assert_array_equal(found.gates_NMn[d, :, 0], wanted)
    np.testing.assert_array_equal(found.nll_NM, force_gates(world, found.gates_NMn, world.weights_NM).nll_NM)


def test_first_order_is_exact_where_decisions_do_not_interact():
    """In a linear world it is the tree at the same count; with interactions it is somewhere not."""
    counts_N, missed = np.full(5, 2), 0
    for seed in range(10):
        for linear in (True, False):
            world = random_world(seed, linear=linear)
            found, _ = first_order(world, world.gradients, world.weights_NM, counts_N)
            best = enumerate_decisions(world, world.weights_NM).best(counts_N)
            if linear:
                np.testing.assert_array_equal(found.gates_NMn, best.gates_NMn)
            missed += (found.gates_NMn != best.gates_NMn).any()
    assert missed > 0


def test_highest_gates_know_ties_nan_and_limits():
    live_NM = np.array([[True, True, True, True, False]])
    score_NM = np.array([[1.0, np.nan, 2.0, 2.0, 9.0]])
    for count, wanted in ((1, [0, 0, 1, 0, 0]), (3, [1, 0, 1, 1, 0]), (4, [1, 1, 1, 1, 0])):
        np.testing.assert_array_equal(highest_gates(score_NM, np.array([count]), live_NM), [wanted])
    with pytest.raises(ValueError, match="document 0 has 4 live gates, fewer than 5 updates"):
        highest_gates(score_NM, np.array([5]), live_NM)


def test_a_model_that_fails_under_some_decisions_is_avoided():
    """Updating the first chunk gives NaN: worse than everything, from either base."""
    world = random_world(6)

    def failing(documents, gates):
        return np.where(gates[:, :1] > 0, np.nan, world(documents, gates))

    tree = enumerate_decisions(failing, world.weights_NM).best()
    for found in (tree, *(rollout(failing, world.weights_NM, base=base) for base in ("always", "never"))):
        assert np.isfinite(found.nll_NM).all()
        assert not found.gates_NMn[:, 0].any()
    always = force_gates(failing, np.ones((5, 6, 1)), world.weights_NM)
    assert np.isinf(always.nll_NM).all()


def test_layers_that_decide_for_themselves_reach_the_model():
    world = random_world(7, layers=2, valid=VALID)
    gates_NMn = np.random.default_rng(0).integers(0, 2, (5, 6, 2)).astype(float)
    found = force_gates(world, gates_NMn, world.weights_NM)
    live_NM1 = live_gates(world.weights_NM)[:, :, None]
    np.testing.assert_array_equal(found.gates_NMn, gates_NMn * live_NM1)
    np.testing.assert_array_equal(world.calls[-1][1], gates_NMn * live_NM1)
    shared = force_gates(world, gates_NMn[:, :, :1], world.weights_NM)
    assert world.calls[-1][1].shape == (5, 6)
    assert (shared.nll_NM != found.nll_NM).any()


def test_losses_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"losses of shape \(5, 5\) for \(5, 6\) rows and chunks"):
        force_gates(lambda documents, gates: gates[:, 1:], np.zeros((5, 6, 1)), np.ones((5, 6)))
