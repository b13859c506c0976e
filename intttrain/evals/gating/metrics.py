"""How good are a rule's decisions, beside decisions that know nothing and decisions that know everything?

A gate is worth something only if it chooses better than chance at the same number of updates, so every rule is scored
beside controls with exactly its number of updates in every document (and layer, if layers decide for themselves).
Dead gates (``oracles.live_gates``) count nowhere. Losses are paired: all intervals see the same resampled documents.

Letters: N documents, M chunks of a document, n TTT layers, S seeds (in ``_selectivity`` resamples), Q columns of sums,
P columns of an ``Estimate``: one, or M where that is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from intttrain.config import EvalConfig
from intttrain.evals.bootstrap import (
    BITS_PER_NAT,
    Estimate,
    bootstrap_difference,
    bootstrap_level,
    bootstrap_ratio,
    interval,
    resampled_sums,
)
from intttrain.evals.gating.oracles import Losses, Outcome, force_gates, highest_gates, live_gates

BASES = ("never", "always")
MATCHED = ("random", "first", "last", "periodic")  # controls with the number of updates of the rule
MIN_RANDOM_SEEDS = 10
LEAST_SPAN = 1e-4  # bits per token; a smaller gain may be the rounding of a forward pass


@dataclasses.dataclass(frozen=True)
class Controls:
    """Decisions that look at nothing; made by ``score_controls``.

    Attributes:
      outcomes: by name, those of ``MATCHED``; ``random`` is the average over seeds.
      random_nll_SNM: losses of the seeds one by one, nats.
    """

    outcomes: dict[str, Outcome]
    random_nll_SNM: np.ndarray


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Which part of what an oracle gains over a control a rule gains.

    Attributes:
      gain, span: control - rule and control - oracle, bits per token.
      share: gain / span with its interval, or ``None`` where the span is inside the noise: the interval of the span
        does not lie above ``LEAST_SPAN``.
    """

    gain: Estimate
    span: Estimate
    share: Estimate | None


@dataclasses.dataclass(frozen=True)
class GatingMetrics:
    """One rule in numbers; made by ``measure_rule``. Losses are in bits per token.

    Attributes:
      documents, tokens: N and the number of predictions.
      rates: updates over live gates, all layers, of ``rule``, the references, the controls and the oracles.
      levels: loss of the same.
      differences: ``rule - NAME`` for all but ``rule``; negative means that the rule is better.
      random_S: level of each random seed.
      recoveries: by oracle and control (``random`` or ``never``).
      selectivity: mean z-score (``_standardised``) of the signal of updated minus that of skipped chunks; ``None``
        without a signal, NaN without both kinds of chunks.
      chunk_level, chunk_difference: M columns: the rule, and the rule - never.
      gate_map_Mn: mean decision over the documents in which the gate is live, NaN where there is none.
    """

    documents: int
    tokens: int
    rates: dict[str, Estimate]
    levels: dict[str, Estimate]
    differences: dict[str, Estimate]
    random_S: np.ndarray
    recoveries: dict[str, dict[str, Recovery]]
    selectivity: Estimate | None
    chunk_level: Estimate
    chunk_difference: Estimate
    gate_map_Mn: np.ndarray

    @property
    def rate(self) -> float:
        """Realised rate of the rule."""
        return float(self.rates["rule"].value_P[0])


def score_bases(losses: Losses, weights_NM: np.ndarray) -> dict[str, Outcome]:
    """Returns the outcomes of ``never`` and ``always``, which all rules at one length share."""
    return {
        name: force_gates(losses, np.full((*weights_NM.shape, 1), float(name == "always")), weights_NM)
        for name in BASES
    }


def count_updates(gates_NMn: np.ndarray, weights_NM: np.ndarray) -> np.ndarray:
    """Returns int N x n: updates at live gates.

    Raises:
      ValueError: a live decision is neither 0 nor 1.
    """
    live_NMn = np.broadcast_to(live_gates(weights_NM)[:, :, None], gates_NMn.shape)
    if not np.isin(gates_NMn[live_NMn], (0, 1)).all():
        raise ValueError("decisions are 0 or 1")
    return np.where(live_NMn, gates_NMn, 0).sum(axis=1).astype(np.int64)


def shared_counts(gates_NMn: np.ndarray, weights_NM: np.ndarray) -> np.ndarray:
    """Returns int N: the number of updates for an oracle that decides for all layers, their mean to the nearest."""
    return np.rint(count_updates(gates_NMn, weights_NM).mean(axis=1)).astype(np.int64)


def score_controls(losses: Losses, gates_NMn: np.ndarray, weights_NM: np.ndarray, *, seeds: Sequence[int]) -> Controls:
    """Scores blind decisions with the number of updates that a rule made in every document and layer.

    One call of the model per seed and one for each of the other controls.

    Args:
      losses: the model.
      gates_NMn: decisions of the rule; n is 1 if the layers share them, else each layer is matched by itself.
      weights_NM: number of predictions of every chunk.
      seeds: of ``random``, at least ``MIN_RANDOM_SEEDS`` different ones.

    Raises:
      ValueError: too few seeds, or a decision that is neither 0 nor 1.
    """
    if len(set(seeds)) < MIN_RANDOM_SEEDS:
        raise ValueError(f"{len(set(seeds))} different random seeds are fewer than {MIN_RANDOM_SEEDS}")
    counts_Nn = count_updates(gates_NMn, weights_NM)
    draws = [force_gates(losses, random_gates(counts_Nn, weights_NM, seed=seed), weights_NM) for seed in seeds]
    outcomes = {"random": Outcome(*(np.mean(x, axis=0) for x in (_gates(draws), _nll(draws))))}
    for name, make in (("first", first_gates), ("last", last_gates), ("periodic", periodic_gates)):
        outcomes[name] = force_gates(losses, make(counts_Nn, weights_NM), weights_NM)
    return Controls(outcomes, _nll(draws))


def random_gates(counts_Nn: np.ndarray, weights_NM: np.ndarray, *, seed: int) -> np.ndarray:
    """Returns N x M x n: every choice of ``counts_Nn`` live gates is equally likely, layers by themselves."""
    generator = np.random.default_rng(seed)
    return _layer_by_layer(counts_Nn, weights_NM, lambda _: generator.random(weights_NM.shape))


def first_gates(counts_Nn: np.ndarray, weights_NM: np.ndarray) -> np.ndarray:
    """Returns N x M x n: the first live gates of each document."""
    return _layer_by_layer(counts_Nn, weights_NM, lambda _: -_rank(weights_NM))


def last_gates(counts_Nn: np.ndarray, weights_NM: np.ndarray) -> np.ndarray:
    """Returns N x M x n: the last live gates of each document."""
    return _layer_by_layer(counts_Nn, weights_NM, lambda _: _rank(weights_NM))


def periodic_gates(counts_Nn: np.ndarray, weights_NM: np.ndarray) -> np.ndarray:
    """Returns N x M x n: evenly spread, each update in the middle of its share of the live gates."""

    def middles(counts_N: np.ndarray) -> np.ndarray:
        live_N1 = live_gates(weights_NM).sum(axis=1, keepdims=True)
        ends = [
            ((_rank(weights_NM) + step) * 2 * counts_N[:, None] + live_N1) // np.maximum(1, 2 * live_N1)
            for step in (0, 1)
        ]
        return ends[1] - ends[0]

    return _layer_by_layer(counts_Nn, weights_NM, middles)


def measure_rule(
    rule: Outcome,
    *,
    references: Mapping[str, Outcome],
    controls: Controls,
    oracles: Mapping[str, Outcome],
    weights_NM: np.ndarray,
    signal_NMn: np.ndarray | None,
    eval_config: EvalConfig,
) -> GatingMetrics:
    """Returns a rule's numbers.

    Args:
      rule: its decisions and losses, from ``oracles.make_outcome``.
      references: those of ``score_bases`` and any other decisions to be shown beside the rule.
      controls: from ``score_controls`` with this rule's decisions.
      oracles: by name, in the order of the report; each gives recoveries, so ``greedy`` does not belong here.
      weights_NM: number of predictions of every chunk.
      signal_NMn: what the rule decided from, or ``None``; a value that is not finite stays out of the selectivity.
      eval_config: ``bootstrap_samples`` and ``seed`` are used.
    """
    options: dict[str, int] = {"samples": eval_config.bootstrap_samples, "seed": eval_config.seed}
    others = {**references, **controls.outcomes, **oracles}
    everything = {"rule": rule, **others}
    weight_N1 = weights_NM.sum(axis=1, keepdims=True)

    def difference(a: Outcome, b: Outcome) -> Estimate:
        return bootstrap_difference(_total(a), _total(b), weight_N1, **options)

    def recovery(control: Outcome, oracle: Outcome) -> Recovery:
        gain, span = difference(control, rule), difference(control, oracle)
        if not span.low_P[0] > LEAST_SPAN:
            return Recovery(gain, span, None)
        parts = _total(control) - _total(rule), _total(control) - _total(oracle)
        return Recovery(
            gain, span, bootstrap_ratio(*parts, samples=eval_config.bootstrap_samples, seed=eval_config.seed)
        )

    return GatingMetrics(
        documents=len(weights_NM),
        tokens=int(weights_NM.sum()),
        rates={name: _rate(outcome.gates_NMn, weights_NM, options) for name, outcome in everything.items()},
        levels={name: bootstrap_level(_total(outcome), weight_N1, **options) for name, outcome in everything.items()},
        differences={f"rule - {name}": difference(rule, other) for name, other in others.items()},
        random_S=controls.random_nll_SNM.sum(axis=(1, 2)) / weights_NM.sum() * BITS_PER_NAT,
        recoveries={
            name: {key: recovery(others[key], oracle) for key in ("random", "never")}
            for name, oracle in oracles.items()
        },
        selectivity=None if signal_NMn is None else _selectivity(rule.gates_NMn, signal_NMn, weights_NM, options),
        chunk_level=bootstrap_level(rule.nll_NM, weights_NM, **options),
        chunk_difference=bootstrap_difference(rule.nll_NM, references["never"].nll_NM, weights_NM, **options),
        gate_map_Mn=_gate_map(rule.gates_NMn, weights_NM),
    )


def measure_shuffled(
    own_NMn: np.ndarray, shuffled_NMn: np.ndarray, noisy_M: np.ndarray, eval_config: EvalConfig
) -> Estimate:
    """Returns how much more often a rule writes a chunk when its tokens are shuffled; a useful rule is below 0.

    Args:
      own_NMn: decisions about the documents as they are.
      shuffled_NMn: about the same documents with some chunks shuffled.
      noisy_M: which chunks are.
      eval_config: ``bootstrap_samples`` and ``seed`` are used.
    """
    more_N1 = (shuffled_NMn - own_NMn)[:, noisy_M].sum(axis=(1, 2))[:, None]
    places_N1 = np.full(more_N1.shape, float(noisy_M.sum() * own_NMn.shape[2]))
    options: dict[str, int] = {"samples": eval_config.bootstrap_samples, "seed": eval_config.seed}
    return bootstrap_ratio(more_N1, places_N1, limits=(-1.0, 1.0), **options)


def _selectivity(
    gates_NMn: np.ndarray, signal_NMn: np.ndarray, weights_NM: np.ndarray, options: Mapping[str, int]
) -> Estimate:
    """Compares means of z; the intervals keep the z of all documents."""
    counted_NMn = live_gates(weights_NM)[:, :, None] & np.isfinite(signal_NMn)
    z_NMn = _standardised(signal_NMn, counted_NMn)
    kinds = (counted_NMn * gates_NMn, counted_NMn * (1.0 - gates_NMn))
    sum_NQ = np.stack([x_NMn.sum(axis=(1, 2)) for kind in kinds for x_NMn in (z_NMn * kind, kind)], axis=1)

    def contrast(sum_SQ: np.ndarray) -> np.ndarray:
        both_S = (sum_SQ[:, 1] > 0) & (sum_SQ[:, 3] > 0)
        return sum_SQ[both_S, 0] / sum_SQ[both_S, 1] - sum_SQ[both_S, 2] / sum_SQ[both_S, 3]

    value = contrast(sum_NQ.sum(axis=0, keepdims=True))
    if not len(value):
        return Estimate(*(np.full(1, np.nan) for _ in range(3)))
    documents = int((sum_NQ[:, 1] + sum_NQ[:, 3] > 0).sum())
    ends = interval(float(value[0]), contrast(resampled_sums(sum_NQ, **options)), documents=documents)
    return Estimate(value, *(np.array([end]) for end in ends))


def _standardised(signal_NMn: np.ndarray, counted_NMn: np.ndarray) -> np.ndarray:
    """Returns z, 0 where not counted: centred in each document and layer, over the layer's deviation from that.

    Centred in the document because controls are matched there: the z of what they update is 0 on average.
    """
    kept_NMn = np.where(counted_NMn, signal_NMn, 0.0)
    mean_N1n = kept_NMn.sum(axis=1, keepdims=True) / np.maximum(counted_NMn.sum(axis=1, keepdims=True), 1)
    centred_NMn = np.where(counted_NMn, kept_NMn - mean_N1n, 0.0)
    deviation_n = np.sqrt((centred_NMn**2).sum(axis=(0, 1)) / np.maximum(counted_NMn.sum(axis=(0, 1)), 1))
    return centred_NMn / np.where(deviation_n > 0, deviation_n, 1.0)


def _rate(gates_NMn: np.ndarray, weights_NM: np.ndarray, options: Mapping[str, int]) -> Estimate:
    places_N = live_gates(weights_NM).sum(axis=1) * float(gates_NMn.shape[2])
    return bootstrap_ratio(gates_NMn.sum(axis=(1, 2))[:, None], places_N[:, None], limits=(0.0, 1.0), **options)


def _gate_map(gates_NMn: np.ndarray, weights_NM: np.ndarray) -> np.ndarray:
    documents_M1 = live_gates(weights_NM).sum(axis=0)[:, None]
    return np.where(documents_M1 > 0, gates_NMn.sum(axis=0) / np.maximum(documents_M1, 1), np.nan)


def _layer_by_layer(
    counts_Nn: np.ndarray, weights_NM: np.ndarray, score: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Stacks, for every layer, the gates with the highest scores; ``score`` is given the layer's counts."""
    live_NM = live_gates(weights_NM)
    return np.stack([highest_gates(score(counts_N), counts_N, live_NM) for counts_N in counts_Nn.T], axis=2)


def _rank(weights_NM: np.ndarray) -> np.ndarray:
    """Returns N x M: how many live gates of the document come before."""
    live_NM = live_gates(weights_NM).astype(np.int64)
    return live_NM.cumsum(axis=1) - live_NM


def _gates(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.stack([outcome.gates_NMn for outcome in outcomes])


def _nll(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.stack([outcome.nll_NM for outcome in outcomes])


def _total(outcome: Outcome) -> np.ndarray:
    return outcome.nll_NM.sum(axis=1, keepdims=True)
