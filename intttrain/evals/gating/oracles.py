"""Decisions that are made with the loss in view: how much better could a gate choose?

The update of one chunk changes what the updates of others are worth, so decisions are judged together: J is the loss
of a document under all of its decisions. Every oracle here decides for all TTT layers at once. None is a rule: a
document is read, sometimes many times, before the first decision about it is made.

A gate is *live* if a later chunk of its document holds a prediction. The last gate of a document writes what nobody
reads; it is left at 0 and counts nowhere.

Letters: N documents, M chunks of a document, n TTT layers, R rows of one call (numbers of documents, which may repeat),
P patterns of decisions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np

MAX_TREE_GATES = 7  # M = 8 chunks: 128 patterns


# The model under forced decisions: (documents [R], gates) -> nll_RM, the summed NLL of every chunk in nats, which is
# ignored where a chunk has no predictions. No document occurs twice in one call. Gates are float64: [R, M] where the
# TTT layers share them, [R, M, n] where each has its own; 1 commits the update of the chunk and 0 skips it.
Losses = Callable[[np.ndarray, np.ndarray], np.ndarray]

# The same with gates that multiply updates: (documents [R], gates [R, M]) -> nll_RM and dJ/dgate_RM, J being the sum
# over the chunks of a row.
GateGradients = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Decisions about all documents and what the model makes of them.

    Attributes:
      gates_NMn: float64 in 0..1; n is 1 for decisions that the layers share. Averages over draws lie between.
      nll_NM: summed NLL of every chunk in nats, float64; 0 without predictions, inf where it is not a number.
    """

    gates_NMn: np.ndarray
    nll_NM: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tree:
    """The losses of all documents under every pattern of decisions; made by ``enumerate_decisions``.

    Attributes:
      patterns_PM: 0 or 1; patterns with fewer updates come first.
      tried_PN: whether the pattern belongs to the document; those with an update at a dead gate do not.
      nll_PNM: as in ``Outcome``; 0 where nothing was tried.
    """

    patterns_PM: np.ndarray
    tried_PN: np.ndarray
    nll_PNM: np.ndarray

    def best(self, counts_N: np.ndarray | None = None) -> Outcome:
        """Returns the exact minimum of J per document; of equal ones that with the fewest updates.

        Args:
          counts_N: minimise over the decisions with this number of updates only.

        Raises:
          ValueError: a document has fewer live gates than updates are asked for.
        """
        allowed_PN = self.tried_PN
        if counts_N is not None:
            allowed_PN = allowed_PN & (self.patterns_PM.sum(axis=1)[:, None] == counts_N[None, :])
            missing_N = ~allowed_PN.any(axis=0)
            if missing_N.any():
                n = int(np.argmax(missing_N))
                raise ValueError(f"document {n} has fewer live gates than {counts_N[n]} updates")
        # Sorted instead of masked by inf: an allowed pattern whose loss is not finite still precedes a forbidden one.
        best_N = np.lexsort((self.nll_PNM.sum(axis=2), ~allowed_PN), axis=0)[0]
        return Outcome(self.patterns_PM[best_N][:, :, None], self.nll_PNM[best_N, np.arange(len(best_N))])


def live_gates(weights_NM: np.ndarray) -> np.ndarray:
    """Returns N x M: whether a later chunk of the document holds a prediction.

    Args:
      weights_NM: number of predictions of every chunk.
    """
    held_or_later_NM = np.logical_or.accumulate(weights_NM[:, ::-1] > 0, axis=1)[:, ::-1]
    return np.concatenate([held_or_later_NM[:, 1:], np.zeros((len(weights_NM), 1), bool)], axis=1)


def make_outcome(gates_NMn: np.ndarray, nll_NM: np.ndarray, weights_NM: np.ndarray) -> Outcome:
    """Returns decisions and losses, dead gates at 0 and losses without predictions at 0, whatever stood there."""
    counted_NM = np.where(np.isfinite(nll_NM), nll_NM, np.inf).astype(np.float64)
    live_NM1 = live_gates(weights_NM)[:, :, None]
    return Outcome(np.where(live_NM1, gates_NMn, 0.0), np.where(weights_NM > 0, counted_NM, 0.0))


def force_gates(losses: Losses, gates_NMn: np.ndarray, weights_NM: np.ndarray) -> Outcome:
    """Returns what the model makes of given decisions about all documents; dead gates are set to 0."""
    gates_NMn = np.where(live_gates(weights_NM)[:, :, None], gates_NMn, 0.0)
    return Outcome(gates_NMn, _ask(losses, np.arange(len(weights_NM)), gates_NMn, weights_NM))


def highest_gates(score_NM: np.ndarray, counts_N: np.ndarray, live_NM: np.ndarray) -> np.ndarray:
    """Returns float64 N x M: 1 at the ``counts_N`` live gates of each document with the highest scores.

    Of equal scores the earlier gate comes first, a score that is not a number comes last.

    Raises:
      ValueError: a document has fewer live gates than that.
    """
    if (counts_N > live_NM.sum(axis=1)).any():
        n = int(np.argmax(counts_N > live_NM.sum(axis=1)))
        raise ValueError(f"document {n} has {live_NM[n].sum()} live gates, fewer than {counts_N[n]} updates")
    rank_NM = np.argsort(np.lexsort((-score_NM, np.isnan(score_NM), ~live_NM), axis=1), axis=1)
    return (rank_NM < counts_N[:, None]).astype(np.float64)


def enumerate_decisions(
    losses: Losses, weights_NM: np.ndarray, *, on_pattern: Callable[[int], None] | None = None
) -> Tree:
    """Tries all decisions about every document: one call for each of up to 2^(M - 1) patterns.

    Args:
      losses: the model.
      weights_NM: number of predictions of every chunk.
      on_pattern: called with 1 after each pattern.

    Raises:
      ValueError: more than ``MAX_TREE_GATES`` gates are live.
    """
    live_NM = live_gates(weights_NM)
    places = np.flatnonzero(live_NM.any(axis=0))
    if len(places) > MAX_TREE_GATES:
        raise ValueError(f"{len(places)} live gates are too many to try all decisions; at most {MAX_TREE_GATES}")
    patterns_PM = np.zeros((2 ** len(places), weights_NM.shape[1]))
    patterns_PM[:, places] = sorted(itertools.product((0.0, 1.0), repeat=len(places)), key=sum)
    tried_PN = ~(patterns_PM.astype(bool)[:, None, :] & ~live_NM[None, :, :]).any(axis=2)
    nll_PNM = np.zeros((*tried_PN.shape, weights_NM.shape[1]))
    for p, pattern_M in enumerate(patterns_PM):
        documents_R = np.flatnonzero(tried_PN[p])
        gates_RM1 = np.tile(pattern_M[None, :, None], (len(documents_R), 1, 1))
        nll_PNM[p, documents_R] = _ask(losses, documents_R, gates_RM1, weights_NM)
        if on_pattern is not None:
            on_pattern(1)
    return Tree(patterns_PM, tried_PN, nll_PNM)


def rollout(losses: Losses, weights_NM: np.ndarray, *, base: Literal["always", "never"]) -> Outcome:
    """Decides from the first gate to the last, each time for the smaller J if ``base`` decides everything later.

    The first candidate is the base itself and another one is taken only if its J is smaller, so the result is never
    worse than the base. One call for the base and one for each live position, all documents side by side.
    """
    start_NM = live_gates(weights_NM) * (1.0 if base == "always" else 0.0)
    return _decide_in_order(losses, weights_NM, start_NM, lambda nll_RM, _: nll_RM.sum(axis=1))


def greedy(losses: Losses, weights_NM: np.ndarray) -> Outcome:
    """Decides from the first gate to the last, each time for the smaller loss of the next chunk alone.

    Not a bound: what helps the next chunk can harm all that follow, so it can lose to ``never``.
    """
    start_NM = np.zeros(weights_NM.shape)
    return _decide_in_order(losses, weights_NM, start_NM, lambda nll_RM, chunk: nll_RM[:, chunk + 1])


def first_order(
    losses: Losses, gradients: GateGradients, weights_NM: np.ndarray, counts_N: np.ndarray
) -> tuple[Outcome, np.ndarray]:
    """Keeps the ``counts_N`` updates with the largest -dJ/dg at g = 1, and returns dJ/dg [N, M] beside the outcome.

    Exact if J is linear in the gates. It is not, so this is a good guess and no bound. About the cost of three
    evaluations: one with gradients, one of the decisions.
    """
    live_NM = live_gates(weights_NM)
    _, slope_NM = gradients(np.arange(len(weights_NM)), live_NM.astype(np.float64))
    gates_NM = highest_gates(-slope_NM, counts_N, live_NM)
    return force_gates(losses, gates_NM[:, :, None], weights_NM), np.where(live_NM, slope_NM, 0.0)


def _decide_in_order(
    losses: Losses,
    weights_NM: np.ndarray,
    start_NM: np.ndarray,
    objective: Callable[[np.ndarray, int], np.ndarray],
) -> Outcome:
    """Flips each decision of ``start_NM``, in order and given those before, where that makes the objective smaller."""
    live_NM = live_gates(weights_NM)
    start = force_gates(losses, start_NM[:, :, None], weights_NM)
    gates_NM1, nll_NM = start.gates_NMn.copy(), start.nll_NM.copy()
    for chunk in map(int, np.flatnonzero(live_NM.any(axis=0))):
        documents_R = np.flatnonzero(live_NM[:, chunk])
        flipped_RM1 = gates_NM1[documents_R]
        flipped_RM1[:, chunk] = 1.0 - flipped_RM1[:, chunk]
        flipped_RM = _ask(losses, documents_R, flipped_RM1, weights_NM)
        better_R = objective(flipped_RM, chunk) < objective(nll_NM[documents_R], chunk)
        gates_NM1[documents_R[better_R]] = flipped_RM1[better_R]
        nll_NM[documents_R[better_R]] = flipped_RM[better_R]
    return Outcome(gates_NM1, nll_NM)


def _ask(losses: Losses, documents_R: np.ndarray, gates_RMn: np.ndarray, weights_NM: np.ndarray) -> np.ndarray:
    """Returns the losses, 0 without predictions and inf where the model failed: worse than everything, and equal."""
    gates = gates_RMn[:, :, 0] if gates_RMn.shape[2] == 1 else gates_RMn
    nll_RM = np.asarray(losses(documents_R, gates), np.float64)
    if nll_RM.shape != gates_RMn.shape[:2]:
        raise ValueError(f"losses of shape {nll_RM.shape} for {gates_RMn.shape[:2]} rows and chunks")
    nll_RM = np.where(np.isfinite(nll_RM), nll_RM, np.inf)
    return np.where(weights_NM[documents_R] > 0, nll_RM, 0.0)
