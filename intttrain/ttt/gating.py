"""Whether a finished chunk is written: signals of a chunk, and rules that decide from them.

Everything is known before the chunk would be written and touches only later chunks, so every rule is causal. The state
of a rule belongs to one sequence and one TTT layer: neither neighbours in a batch nor padding nor the mesh change it.

Letters: B row (a sequence), C tokens per chunk, D model width, F feed-forward width, M chunks, n TTT layers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from intttrain.ttt.targets import CONV_TAPS

Signal = Literal["reconstruction", "loss", "redundancy", "delta_norm", "nll", "entropy"]
Rule = Literal[
    "always", "never", "random", "periodic", "threshold", "forced", "ponder_ema", "ponder_ema_code", "online"
]

OF_THE_MODEL: tuple[Signal, ...] = ("nll", "entropy")  # of the whole model's predictions: known to all layers alike
WITH_SIGNAL: tuple[Rule, ...] = ("threshold", "ponder_ema", "ponder_ema_code", "online")
STATISTICS_RATE = 0.02  # of the running mean and variance of ``online``
PONDER_RATE, CODE_LEAST_STEP, CODE_FLOOR = 0.1, 0.1, 0.01  # PonderTTT (arXiv 2601.00894) and its published code


@dataclasses.dataclass(frozen=True)
class GateRule:
    """How chunks are chosen. Hashable, so it is a static argument: one compilation per choice.

    Attributes:
      rule: see ``docs/gating.md``.
      signal: what the rules of ``WITH_SIGNAL`` look at.
      update_on: whether a high signal or a low one makes a chunk worth writing.
      shared: one decision for all TTT layers, from the mean of their signals.
    """

    rule: Rule = "always"
    signal: Signal = "reconstruction"
    update_on: Literal["high", "low"] = "high"
    shared: bool = False

    @property
    def uses_signal(self) -> bool:
        """Whether decisions depend on the signal."""
        return self.rule in WITH_SIGNAL

    def problem(self) -> str | None:
        """Returns in one line why rule and signal cannot work together, ``None`` if they can."""
        if self.rule.startswith("ponder_ema") and (self.signal == "loss" or self.update_on == "low"):
            what = "signal='loss'" if self.signal == "loss" else "update_on='low'"
            return (
                f"rule={self.rule!r} moves its threshold by a multiple of itself and cannot follow a signal below "
                f"zero, as with {what}; use signal='reconstruction' and update_on='high', or rule='online'"
            )
        return None


Number = Array | np.ndarray | float | int  # a scalar


class GateSettings(NamedTuple):
    """Numbers of a rule, all traced.

    Attributes:
      rate: wanted fraction of chunks that are written (random, periodic, ponder_ema, online).
      threshold_n: by layer: the bound (threshold), or the one to begin with (ponder_ema).
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
      level: threshold of ponder_ema; of ``online`` the quantile q in standard deviations.
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
      layer: number of the TTT layer, from 0.
      chunk_B: number of the chunk in its sequence.
      sequence_B: number of the sequence, which makes the draws of ``random``.
    """
    start = _start(rule, settings, layer, signal_B)
    fresh = GateState(*(jnp.where(state.decided == 0, x, y) for x, y in zip(start, state, strict=True)))
    sign = 1.0 if rule.update_on == "high" else -1.0
    signed_B = sign * signal_B
    unknown_B = jnp.full(signal_B.shape, jnp.nan, jnp.float32)
    after = fresh
    if rule.rule == "threshold":
        assert settings.threshold_n is not None
        margin_B = signed_B - sign * settings.threshold_n[layer]
    elif rule.rule == "online":
        z_B = (signed_B - fresh.mean) * jax.lax.rsqrt(jnp.maximum(fresh.variance, 1e-12))
        z_B = jnp.where(fresh.decided == 0, 0.0, z_B)
        margin_B = z_B - fresh.level
        after = _follow(fresh, signed_B, (margin_B > 0).astype(jnp.float32), settings)
    elif rule.rule.startswith("ponder_ema"):
        margin_B = signed_B - fresh.level
        after = _ponder(rule, fresh, (margin_B > 0).astype(jnp.float32), settings)
    else:
        gate_B = _without_signal(rule, settings, layer, chunk_B, sequence_B)
        counted = fresh._replace(decided=fresh.decided + 1)
        return Decision(gate_B, unknown_B, unknown_B), counted
    return Decision((margin_B > 0).astype(jnp.float32), signal_B, margin_B), after._replace(decided=fresh.decided + 1)


def _start(rule: GateRule, settings: GateSettings, layer: Array | int, signal_B: Array) -> GateState:
    """Returns the state with which a rule meets its first chunk."""
    level = jnp.float32(0.0)
    if rule.rule == "online":  # the quantile of a normal distribution
        level = jax.scipy.special.ndtri(1.0 - jnp.clip(jnp.float32(settings.rate), 0.01, 0.99))
    elif rule.rule.startswith("ponder_ema"):
        assert settings.threshold_n is not None
        level = settings.threshold_n[layer]
    sign = 1.0 if rule.update_on == "high" else -1.0
    values = (level, sign * signal_B, 0.0, settings.rate, 0.0)
    return GateState(*(jnp.broadcast_to(jnp.asarray(x, jnp.float32), signal_B.shape) for x in values))


def _follow(state: GateState, signed_B: Array, gate_B: Array, settings: GateSettings) -> GateState:
    """``online``: q rises where more chunks are written than wanted; early statistics are plain means."""
    step_B = jnp.maximum(STATISTICS_RATE, 1.0 / (state.decided + 1.0))
    away_B = signed_B - state.mean
    return GateState(
        level=state.level + settings.gamma * (gate_B - settings.rate),
        mean=state.mean + step_B * away_B,
        variance=(1.0 - step_B) * (state.variance + step_B * jnp.square(away_B)),
        rate=state.rate + step_B * (gate_B - state.rate),
        decided=state.decided,
    )


def _ponder(rule: GateRule, state: GateState, gate_B: Array, settings: GateSettings) -> GateState:
    """PonderTTT: the paper's equations, or those of its published code."""
    rate_B = (1.0 - PONDER_RATE) * state.rate + PONDER_RATE * gate_B
    if rule.rule == "ponder_ema":
        level_B = state.level + PONDER_RATE * (state.rate - settings.rate) * jnp.abs(state.level)
    else:
        scale_B = jnp.maximum(CODE_LEAST_STEP, jnp.abs(state.level))
        level_B = jnp.maximum(CODE_FLOOR, state.level + PONDER_RATE * (rate_B - settings.rate) * scale_B)
    return state._replace(level=level_B, rate=rate_B)


def _without_signal(
    rule: GateRule, settings: GateSettings, layer: Array | int, chunk_B: Array, sequence_B: Array
) -> Array:
    if rule.rule == "random":
        number = jnp.asarray(0 if rule.shared else layer)

        def draw(sequence: Array, chunk: Array) -> Array:
            key = jax.random.key(settings.seed)
            for part in (sequence, number, chunk):
                key = jax.random.fold_in(key, part)
            return jax.random.uniform(key)

        return (jax.vmap(draw)(sequence_B, chunk_B) < settings.rate).astype(jnp.float32)
    if rule.rule == "periodic":
        before_B, after_B = (jnp.floor(n.astype(jnp.float32) * settings.rate + 1e-4) for n in (chunk_B, chunk_B + 1))
        return (after_B > before_B).astype(jnp.float32)
    if rule.rule == "forced":
        assert settings.forced_nBM is not None
        forced_BM = settings.forced_nBM[layer]
        known = forced_BM.shape[1]
        gate_B = jnp.take_along_axis(forced_BM, jnp.minimum(chunk_B, known - 1)[:, None], axis=1)[:, 0]
        return jnp.where(chunk_B < known, gate_B, 0.0).astype(jnp.float32)
    return jnp.full(chunk_B.shape, 1.0 if rule.rule == "always" else 0.0, jnp.float32)


def measured_tokens(chunk_tokens: int, has_conv: bool) -> int:
    """Returns how many tokens of a chunk a signal covers: those whose target sees all of its window."""
    return max(1, chunk_tokens - (CONV_TAPS // 2 if has_conv else 1))


def own_signal(
    signal: Signal,
    read_BCD: Float[Array, "B C D"],
    v_BCD: Float[Array, "B C D"],
    measured_BC: Bool[Array, "B C"] | Float[Array, "B C"],
) -> Float[Array, "B"]:
    """Returns a signal of the layer itself, fp32.

    Args:
      signal: ``loss``: ``-<O, V> / tokens``; ``reconstruction``: ``1 - max(0, cos(O, V))^2``, the relative error of the
        best multiple of O; ``redundancy``: the same with what only the state adds to O.
      read_BCD: O, what the layer read; for ``redundancy`` without W0's part.
      v_BCD: what would be written.
      measured_BC: which tokens count.
    """
    weight_BC1 = measured_BC.astype(jnp.float32)[..., None]
    o_BCD, v_BCD = (x.astype(jnp.float32) * weight_BC1 for x in (read_BCD, v_BCD))
    inner_B = jnp.sum(o_BCD * v_BCD, axis=(1, 2))
    if signal == "loss":
        return -inner_B / jnp.maximum(jnp.sum(weight_BC1, axis=(1, 2)), 1.0)
    sizes_B = jnp.sum(jnp.square(o_BCD), axis=(1, 2)) * jnp.sum(jnp.square(v_BCD), axis=(1, 2))
    cosine_B = inner_B * jax.lax.rsqrt(jnp.maximum(sizes_B, 1e-30))
    return 1.0 - jnp.square(jnp.maximum(cosine_B, 0.0))
