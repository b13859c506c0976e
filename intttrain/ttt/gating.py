"""Whether a finished chunk is written: rules that decide, each registered with how it decides.

Everything is known before the chunk would be written and touches only later chunks, so every rule is causal. The state
of a rule belongs to one sequence and one TTT layer: neither neighbours in a batch nor padding nor the mesh change it.

A rule is an object of a class below ``Rule``, registered under its name. Nothing else lists rules: generation,
evaluation and the study ask the registry what is offered there and the rule what it needs. What rules may look at is
in ``signals``.

Letters: B row (a sequence), M chunks, n TTT layers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from intttrain.config.registry import GATE_RULES, GATE_SIGNALS

Place = Literal["generate", "evaluate", "study"]  # --gate, eval.gates, eval.gating.rules
STATISTICS_RATE = 0.02  # of the running mean and variance of ``online``
PONDER_RATE, CODE_LEAST_STEP, CODE_FLOOR = 0.1, 0.1, 0.01  # PonderTTT (arXiv 2601.00894) and its published code


@dataclasses.dataclass(frozen=True)
class GateRule:
    """How chunks are chosen. Hashable, so it is a static argument: one compilation per choice.

    Attributes:
      rule: a name of ``GATE_RULES``; see ``docs/gating.md``.
      signal: a name of ``GATE_SIGNALS``, what a rule with a signal looks at.
      update_on: whether a high signal or a low one makes a chunk worth writing.
      shared: one decision for all TTT layers, from the mean of their signals.
    """

    rule: str = "always"
    signal: str = "reconstruction"
    update_on: Literal["high", "low"] = "high"
    shared: bool = False

    @property
    def definition(self) -> Rule:
        """How the rule decides. Raises ``UserError`` if there is none of this name."""
        found: Rule = GATE_RULES[self.rule]
        return found

    @property
    def uses_signal(self) -> bool:
        """Whether decisions depend on the signal."""
        return self.definition.uses_signal

    @property
    def sign(self) -> float:
        """1 where a high signal makes a chunk worth writing, -1 where a low one does."""
        return 1.0 if self.update_on == "high" else -1.0

    def problem(self) -> str | None:
        """Returns in one line why rule and signal cannot work together, ``None`` if they can."""
        return self.definition.problem(self)


Number = Array | np.ndarray | float | int  # a scalar


class GateSettings(NamedTuple):
    """Numbers of a rule, all traced.

    Attributes:
      rate: wanted fraction of chunks that are written, for rules that have one.
      threshold_n: by layer: the bound, or the one to begin with, for rules with ``thresholds``.
      gamma: step of the quantile of ``online``, in standard deviations.
      seed: of ``random``.
      forced_nBM: decisions of ``forced``; chunks after the last one are not written.
    """

    rate: Number = 0.5
    threshold_n: Float[Array, "n"] | Float[np.ndarray, "n"] | None = None
    gamma: Number = 0.1
    seed: Number = 0
    forced_nBM: Float[Array, "n B M"] | Float[np.ndarray, "n B M"] | None = None


class GateState(NamedTuple):
    """What a rule remembers of a sequence in one layer, fp32.

    Attributes:
      level: the threshold, or whatever a rule moves.
      mean, variance: running statistics of the signal.
      rate: running fraction of written chunks.
      decided: chunks so far.
    """

    level: Float[Array, "*n B"]
    mean: Float[Array, "*n B"]
    variance: Float[Array, "*n B"]
    rate: Float[Array, "*n B"]
    decided: Float[Array, "*n B"]


class Decision(NamedTuple):
    """Of one chunk in one layer.

    Attributes:
      gate: 0 or 1, by which the update is multiplied.
      signal: what was looked at; NaN if nothing was.
      margin: how far it was from the other decision, positive if the chunk is written; NaN without a signal.
    """

    gate: Float[Array, "*n B"]
    signal: Float[Array, "*n B"]
    margin: Float[Array, "*n B"]


def init_gate_state(layers: int, rows: int) -> GateState:
    """Returns the state before the first chunk; ``decide`` fills in what depends on the settings."""
    return GateState(*(jnp.zeros((layers, rows), jnp.float32) for _ in GateState._fields))


class Chunk(NamedTuple):
    """A finished chunk of every row in one layer, as a rule sees it.

    Attributes:
      layer: number of the TTT layer, from 0.
      chunk_B: number of the chunk in its sequence.
      sequence_B: number of the sequence, which makes random draws.
      signed_B: the signal, fp32, negative where a low one makes a chunk worth writing.
    """

    layer: Int[Array, ""] | int
    chunk_B: Int[Array, "B"]
    sequence_B: Int[Array, "B"]
    signed_B: Float[Array, "B"]


class Rule:
    """A way to decide.

    Attributes:
      offered: where users may choose it; "forced", which only code chooses, is offered nowhere.
      uses_signal: whether it looks at the signal of the chunk.
      thresholds: whether it needs a number for each TTT layer, ``GateSettings.threshold_n``.
      hindsight: whether it decides after it has seen all chunks. Only a study has such rules, to compare with.
    """

    uses_signal = False
    thresholds = False
    hindsight = False

    def __init__(self, *offered: Place) -> None:
        self.offered = frozenset(offered)

    def problem(self, gate: GateRule) -> str | None:
        """Returns in one line why it cannot work with a signal, ``None`` if it can."""
        return None


class BlindRule(Rule):
    """A rule without a signal: ``gate_B`` returns 0 or 1 for every row."""

    def gate_B(self, gate: GateRule, settings: GateSettings, chunk: Chunk) -> Float[Array, "B"]:
        """Returns what is decided, fp32."""
        raise NotImplementedError


class SignalRule(Rule):
    """A rule with a signal: a chunk is written where ``margin_B`` is positive, and ``follow`` learns from that."""

    uses_signal = True

    def start(self, settings: GateSettings, layer: Int[Array, ""] | int) -> Array:
        """Returns ``GateState.level`` before the first chunk."""
        return jnp.float32(0.0)

    def margin_B(self, gate: GateRule, settings: GateSettings, state: GateState, chunk: Chunk) -> Float[Array, "B"]:
        """Returns how far the signal is on the side of writing."""
        raise NotImplementedError

    def follow(
        self, settings: GateSettings, state: GateState, signed_B: Float[Array, "B"], gate_B: Float[Array, "B"]
    ) -> GateState:
        """Returns the state after a decision; ``decided`` is counted by the caller."""
        return state


class HindsightRule(Rule):
    """A rule that chooses among all chunks of a document, when their signals are known: no rule to read with."""

    uses_signal = True
    hindsight = True

    def choose(
        self, signed_BMn: Float[np.ndarray, "B M n"], live_M: Bool[np.ndarray, "M"], rate: float
    ) -> Float[np.ndarray, "B M n"]:
        """Returns the gates, from signals with every chunk written; gates that are not live change nothing."""
        raise NotImplementedError


def decide(
    rule: GateRule,
    settings: GateSettings,
    state: GateState,
    signal_B: Float[Array, "B"],
    *,
    layer: Int[Array, ""] | int,
    chunk_B: Int[Array, "B"],
    sequence_B: Int[Array, "B"],
) -> tuple[Decision, GateState]:
    """Decides about one finished chunk of every row in one layer.

    Args:
      rule, settings: see there.
      state: of this layer.
      signal_B: of the chunk, fp32.
      layer, chunk_B, sequence_B: as in ``Chunk``.
    """
    definition = rule.definition
    chunk = Chunk(layer, chunk_B, sequence_B, rule.sign * signal_B)
    level = definition.start(settings, layer) if isinstance(definition, SignalRule) else jnp.float32(0.0)
    first = (level, chunk.signed_B, 0.0, settings.rate, 0.0)
    start = GateState(*(jnp.broadcast_to(jnp.asarray(x, jnp.float32), signal_B.shape) for x in first))
    fresh = GateState(*(jnp.where(state.decided == 0, x, y) for x, y in zip(start, state, strict=True)))
    counted_B = fresh.decided + 1
    if isinstance(definition, BlindRule):
        unknown_B = jnp.full(signal_B.shape, jnp.nan, jnp.float32)
        gate_B = definition.gate_B(rule, settings, chunk)
        return Decision(gate_B, unknown_B, unknown_B), fresh._replace(decided=counted_B)
    assert isinstance(definition, SignalRule), f"{rule.rule} decides in hindsight"
    margin_B = definition.margin_B(rule, settings, fresh, chunk)
    gate_B = (margin_B > 0).astype(jnp.float32)
    after = definition.follow(settings, fresh, chunk.signed_B, gate_B)
    return Decision(gate_B, signal_B, margin_B), after._replace(decided=counted_B)


# --- rules without a signal ----------------------------------------------------------------------------------------


class Constant(BlindRule):
    """Every chunk, or none."""

    def __init__(self, gate: float, *offered: Place) -> None:
        super().__init__(*offered)
        self.gate = gate

    def gate_B(self, gate: GateRule, settings: GateSettings, chunk: Chunk) -> Float[Array, "B"]:
        """Returns the same for all."""
        return jnp.full(chunk.chunk_B.shape, self.gate, jnp.float32)


class Random(BlindRule):
    """A draw that depends on seed, sequence, layer and chunk."""

    def gate_B(self, gate: GateRule, settings: GateSettings, chunk: Chunk) -> Float[Array, "B"]:
        """Returns the draws."""
        number = jnp.asarray(0 if gate.shared else chunk.layer)

        def draw(sequence: Array, chunk: Array) -> Array:
            key = jax.random.key(settings.seed)
            for part in (sequence, number, chunk):
                key = jax.random.fold_in(key, part)
            return jax.random.uniform(key)

        return (jax.vmap(draw)(chunk.sequence_B, chunk.chunk_B) < settings.rate).astype(jnp.float32)


class Periodic(BlindRule):
    """Evenly spread."""

    def gate_B(self, gate: GateRule, settings: GateSettings, chunk: Chunk) -> Float[Array, "B"]:
        """Returns 1 where the number of chunks that should have been written grows."""
        before_B, after_B = (
            jnp.floor(n.astype(jnp.float32) * settings.rate + 1e-4) for n in (chunk.chunk_B, chunk.chunk_B + 1)
        )
        return (after_B > before_B).astype(jnp.float32)


class Forced(BlindRule):
    """As it is told: replay, oracles, decisions in hindsight."""

    def gate_B(self, gate: GateRule, settings: GateSettings, chunk: Chunk) -> Float[Array, "B"]:
        """Returns what ``settings.forced_nBM`` says, 0 after its end."""
        assert settings.forced_nBM is not None
        forced_BM = settings.forced_nBM[chunk.layer]
        known = forced_BM.shape[1]
        gate_B = jnp.take_along_axis(forced_BM, jnp.minimum(chunk.chunk_B, known - 1)[:, None], axis=1)[:, 0]
        return jnp.where(chunk.chunk_B < known, gate_B, 0.0).astype(jnp.float32)


# --- rules with a signal -------------------------------------------------------------------------------------------


class Threshold(SignalRule):
    """Beyond a bound of the layer."""

    thresholds = True

    def margin_B(self, gate: GateRule, settings: GateSettings, state: GateState, chunk: Chunk) -> Float[Array, "B"]:
        """Returns how far beyond the bound."""
        assert settings.threshold_n is not None
        return chunk.signed_B - gate.sign * settings.threshold_n[chunk.layer]


class Online(SignalRule):
    """Beyond a running quantile, in running standard deviations from the running mean."""

    def start(self, settings: GateSettings, layer: Int[Array, ""] | int) -> Array:
        """Returns the quantile of a normal distribution."""
        return jax.scipy.special.ndtri(1.0 - jnp.clip(jnp.float32(settings.rate), 0.01, 0.99))

    def margin_B(self, gate: GateRule, settings: GateSettings, state: GateState, chunk: Chunk) -> Float[Array, "B"]:
        """Returns z - q; a first signal is its own mean."""
        z_B = (chunk.signed_B - state.mean) * jax.lax.rsqrt(jnp.maximum(state.variance, 1e-12))
        return jnp.where(state.decided == 0, 0.0, z_B) - state.level

    def follow(
        self, settings: GateSettings, state: GateState, signed_B: Float[Array, "B"], gate_B: Float[Array, "B"]
    ) -> GateState:
        """Raises q where more chunks are written than wanted; early statistics are plain means."""
        step_B = jnp.maximum(STATISTICS_RATE, 1.0 / (state.decided + 1.0))
        away_B = signed_B - state.mean
        return GateState(
            level=state.level + settings.gamma * (gate_B - settings.rate),
            mean=state.mean + step_B * away_B,
            variance=(1.0 - step_B) * (state.variance + step_B * jnp.square(away_B)),
            rate=state.rate + step_B * (gate_B - state.rate),
            decided=state.decided,
        )


class PonderEMA(SignalRule):
    """PonderTTT: beyond a threshold that follows the rate; the paper's equations."""

    thresholds = True

    def problem(self, gate: GateRule) -> str | None:
        """Refuses signals below zero."""
        signed = GATE_SIGNALS[gate.signal].signed
        if not signed and gate.update_on == "high":
            return None
        what = f"signal={gate.signal!r}" if signed else "update_on='low'"
        return (
            f"rule={gate.rule!r} moves its threshold by a multiple of itself and cannot follow a signal below "
            f"zero, as with {what}; use signal='reconstruction' and update_on='high', or rule='online'"
        )

    def start(self, settings: GateSettings, layer: Int[Array, ""] | int) -> Array:
        """Returns the threshold of the layer."""
        assert settings.threshold_n is not None
        return jnp.asarray(settings.threshold_n[layer])

    def margin_B(self, gate: GateRule, settings: GateSettings, state: GateState, chunk: Chunk) -> Float[Array, "B"]:
        """Returns how far beyond the threshold."""
        return chunk.signed_B - state.level

    def follow(
        self, settings: GateSettings, state: GateState, signed_B: Float[Array, "B"], gate_B: Float[Array, "B"]
    ) -> GateState:
        """Moves the threshold by the running rate before this decision."""
        rate_B = (1.0 - PONDER_RATE) * state.rate + PONDER_RATE * gate_B
        level_B = state.level + PONDER_RATE * (state.rate - settings.rate) * jnp.abs(state.level)
        return state._replace(level=level_B, rate=rate_B)


class PonderEMACode(PonderEMA):
    """The same as its published code has it."""

    def follow(
        self, settings: GateSettings, state: GateState, signed_B: Float[Array, "B"], gate_B: Float[Array, "B"]
    ) -> GateState:
        """Moves the threshold by the running rate after this decision, at least by a bit, and not below a floor."""
        rate_B = (1.0 - PONDER_RATE) * state.rate + PONDER_RATE * gate_B
        scale_B = jnp.maximum(CODE_LEAST_STEP, jnp.abs(state.level))
        level_B = jnp.maximum(CODE_FLOOR, state.level + PONDER_RATE * (rate_B - settings.rate) * scale_B)
        return state._replace(level=level_B, rate=rate_B)


class TopK(HindsightRule):
    """Of every document and layer, the share of live chunks whose signals stand out most."""

    def choose(
        self, signed_BMn: Float[np.ndarray, "B M n"], live_M: Bool[np.ndarray, "M"], rate: float
    ) -> Float[np.ndarray, "B M n"]:
        """Returns 1 for the first of them."""
        kept = round(rate * int(live_M.sum()))
        score_BMn = np.where(live_M[None, :, None], signed_BMn, -np.inf)
        rank_BMn = np.argsort(np.argsort(-score_BMn, axis=1, kind="stable"), axis=1, kind="stable")
        return (rank_BMn < kept).astype(np.float32)


GATE_RULES.add("always", Constant(1.0, "generate"))
GATE_RULES.add("never", Constant(0.0, "generate", "evaluate"))
GATE_RULES.add("random", Random("generate", "evaluate", "study"))
GATE_RULES.add("periodic", Periodic("generate", "evaluate", "study"))
GATE_RULES.add("online", Online("generate", "evaluate", "study"))
GATE_RULES.add("threshold", Threshold("generate", "evaluate"))
GATE_RULES.add("percentile", Threshold("study"))  # whose thresholds are quantiles of the signal on training text
GATE_RULES.add("ponder_ema", PonderEMA("study"))
GATE_RULES.add("ponder_ema_code", PonderEMACode("study"))
GATE_RULES.add("topk", TopK("study"))
GATE_RULES.add("forced", Forced())
