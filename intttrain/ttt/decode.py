"""The same layer a few tokens at a time: for prompts, generation and rows too long for one pass.

Reading and writing are apart. ``read`` computes tokens with the state as it is, ``remember`` keeps them in the buffers
of the open chunk, and ``commit`` writes chunks that have become full, after all layers were read: so a gate may ask
what the whole model made of the chunk. An open chunk never updates. Rows of a batch may be at different places.

Letters: B row, P tokens of a piece, C tokens per chunk, D model width, F feed-forward width,
L layers, n TTT layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from intttrain.config.registry import GATE_SIGNALS
from intttrain.ttt.gating import Decision, GateRule, GateSettings, GateState, decide, init_gate_state
from intttrain.ttt.rules import UpdateRule, matmul
from intttrain.ttt.signals import LayerChunk, LayerSignal


class FastWeightCache(NamedTuple):
    """State of all TTT layers while they read one document per row.

    Attributes:
      s_nBDF: fp32 sums of the written updates.
      z_nBCF, x_nBCD, o_nBCD: activations, target source and result of the tokens in the open chunk.
      written_nB: int32, updates written so far; where it is 0 the state is empty and W0 alone is read.
      gate: what the rule remembers.
    """

    s_nBDF: Float[Array, "n B D F"]
    z_nBCF: Float[Array, "n B C F"]
    x_nBCD: Float[Array, "n B C D"]
    o_nBCD: Float[Array, "n B C D"]
    written_nB: Int[Array, "n B"]
    gate: GateState


@dataclasses.dataclass(frozen=True)
class FastWeights:
    """What ``commit`` has to know of the model's TTT layers.

    Attributes:
      w_down_LDF: W0 of all layers of the model, of which ``layer_n`` are meant: W0 is looked at by one signal only, and
        taking the n out of L would copy them at every token.
      layer_n: numbers of the TTT layers.
      learned: pytree with one leading entry per TTT layer, what values are computed with.
      values: (an entry of ``learned``, source x_BCD of the open chunks) -> v_BCD, what the layer would write; the
        function that whole rows use.
      measured_tokens: how many tokens of a chunk, from its first, a signal of the layer covers.
    """

    w_down_LDF: Float[Array, "L D F"]
    layer_n: Int[Array, "n"]
    learned: Any
    values: Callable[[Any, Array], Array]
    measured_tokens: int


def init_cache(layers: int, rows: int, chunk_tokens: int, d_model: int, d_ff: int, dtype: jnp.dtype) -> FastWeightCache:
    """Returns the cache before the first token."""
    open_chunk = (layers, rows, chunk_tokens)
    return FastWeightCache(
        s_nBDF=jnp.zeros((layers, rows, d_model, d_ff), jnp.float32),
        z_nBCF=jnp.zeros((*open_chunk, d_ff), dtype),
        x_nBCD=jnp.zeros((*open_chunk, d_model), dtype),
        o_nBCD=jnp.zeros((*open_chunk, d_model), dtype),
        written_nB=jnp.zeros((layers, rows), jnp.int32),
        gate=init_gate_state(layers, rows),
    )


def read(
    cache: FastWeightCache,
    layer: Int[Array, ""] | int,
    z_BPF: Float[Array, "B P F"],
    base_BPD: Float[Array, "B P D"],
    w_down_DF: Float[Array, "D F"],
    update: UpdateRule = UpdateRule(),
) -> Float[Array, "B P D"]:
    """Returns ``(W0 + S) z`` in the dtype of z.

    Args:
      cache: see there; not changed.
      layer: number of the TTT layer.
      z_BPF: activations.
      base_BPD: ``W0 z``, fp32: shared by all rows, so rows that were never written cost no more than a dense layer.
      w_down_DF: W0.
      update: as in ``fast_weight_projection``.
    """

    def add_state(base_BPD: Array) -> Array:
        s_BDF = jax.lax.dynamic_index_in_dim(cache.s_nBDF, layer, keepdims=False)
        o_BPD = base_BPD + matmul("bpf,bdf->bpd", z_BPF, s_BDF.astype(z_BPF.dtype))
        scale_BD = jax.vmap(update.row_scale, (0, None))(s_BDF, w_down_DF)
        return o_BPD if scale_BD is None else o_BPD * scale_BD[:, None]

    written = jnp.any(jax.lax.dynamic_index_in_dim(cache.written_nB, layer, keepdims=False) > 0)
    return jax.lax.cond(written, add_state, lambda base_BPD: base_BPD, base_BPD).astype(z_BPF.dtype)


def remember(
    cache: FastWeightCache,
    layer: Int[Array, ""] | int,
    places_BP: Int[Array, "B P"],
    z_BPF: Float[Array, "B P F"],
    x_BPD: Float[Array, "B P D"],
    o_BPD: Float[Array, "B P D"],
) -> FastWeightCache:
    """Returns the cache with tokens put at their places of the open chunk; places from C on are left out."""
    rows_B1 = jnp.arange(z_BPF.shape[0])[:, None]

    def put(buffer: Array, new: Array) -> Array:
        return buffer.at[layer, rows_B1, places_BP].set(new.astype(buffer.dtype), mode="drop")

    return cache._replace(
        z_nBCF=put(cache.z_nBCF, z_BPF), x_nBCD=put(cache.x_nBCD, x_BPD), o_nBCD=put(cache.o_nBCD, o_BPD)
    )


def commit(
    cache: FastWeightCache,
    weights: FastWeights,
    full_B: Bool[Array, "B"],
    *,
    eta: Float[Array, ""],
    chunk_B: Int[Array, "B"],
    sequence_B: Int[Array, "B"],
    model_signal_B: Float[Array, "B"] | None = None,
    rule: GateRule = GateRule(),
    settings: GateSettings = GateSettings(),
    update: UpdateRule = UpdateRule(),
) -> tuple[FastWeightCache, Decision]:
    """Decides about the chunks of full rows and writes those that shall be.

    Args:
      cache: of all TTT layers.
      weights: see there.
      full_B: rows whose open chunk is full; the cache of the others stays as it is.
      eta, update: as in ``fast_weight_projection``.
      chunk_B: number of the open chunk.
      sequence_B: number of the sequence, for random gates.
      model_signal_B: of the chunk, where the rule looks at a signal of the whole model.
      rule, settings: how to decide.

    Returns:
      The cache and what was decided; gates of rows that are not full are 0.
    """
    layers, rows = cache.written_nB.shape
    nothing = Decision(*(jnp.full((layers, rows), value, jnp.float32) for value in (0.0, jnp.nan, jnp.nan)))

    def write(cache: FastWeightCache) -> tuple[FastWeightCache, Decision]:
        v_nBCD, signal_nB = _values_and_signals(cache, weights, eta, model_signal_B, rule, update)
        if rule.shared:
            signal_nB = jnp.broadcast_to(jnp.mean(signal_nB, axis=0), signal_nB.shape)

        def decide_layer(state: GateState, signal_B: Array, layer: Array) -> tuple[Decision, GateState]:
            return decide(rule, settings, state, signal_B, layer=layer, chunk_B=chunk_B, sequence_B=sequence_B)

        found, gate_state = jax.vmap(decide_layer)(cache.gate, signal_nB, jnp.arange(layers))
        where_full = lambda new, old: jnp.where(full_B[None], new, old)  # noqa: E731
        found = jax.tree.map(where_full, found, nothing)
        s_nBDF = _written(cache, v_nBCD, found.gate, full_B, eta, update)
        kept = cache._replace(
            s_nBDF=s_nBDF,
            written_nB=cache.written_nB + (found.gate > 0).astype(jnp.int32),
            gate=jax.tree.map(where_full, gate_state, cache.gate),
        )
        return kept, found

    return jax.lax.cond(jnp.any(full_B), write, lambda cache: (cache, nothing), cache)


def _values_and_signals(
    cache: FastWeightCache,
    weights: FastWeights,
    eta: Array,
    model_signal_B: Array | None,
    rule: GateRule,
    update: UpdateRule,
) -> tuple[Array, Array]:
    """Returns V of the open chunks (n B C D) and the signal of each (n B)."""
    rows, chunk_tokens = cache.z_nBCF.shape[1:3]
    measured_BC = jnp.broadcast_to(jnp.arange(chunk_tokens) < weights.measured_tokens, (rows, chunk_tokens))

    def layer(_: None, inputs: Any) -> tuple[None, tuple[Array, Array]]:
        number, learned, s_BDF, z_BCF, x_BCD, o_BCD = inputs
        v_BCD = weights.values(learned, x_BCD)

        def added_BCD() -> Array:
            return matmul("bcf,bdf->bcd", z_BCF, s_BDF.astype(z_BCF.dtype))

        def delta_norm_B() -> Array:
            update_B = _norm(_deltas(update, v_BCD, z_BCF, eta))
            return update_B / _norm(weights.w_down_LDF[number].astype(jnp.float32)[None])

        if not rule.uses_signal:
            signal_B = jnp.full((rows,), jnp.nan, jnp.float32)
        elif isinstance(signal := GATE_SIGNALS[rule.signal], LayerSignal):
            signal_B = signal.measure(LayerChunk(o_BCD, v_BCD, measured_BC, added_BCD, delta_norm_B))
        else:
            assert model_signal_B is not None
            signal_B = model_signal_B
        return None, (v_BCD, signal_B)

    open_chunks = (cache.s_nBDF, cache.z_nBCF, cache.x_nBCD, cache.o_nBCD)
    return jax.lax.scan(layer, None, (weights.layer_n, weights.learned, *open_chunks))[1]


def _written(
    cache: FastWeightCache, v_nBCD: Array, gate_nB: Array, full_B: Array, eta: Array, update: UpdateRule
) -> Float[Array, "n B D F"]:
    """Returns the states after the chunks of full rows; a layer in which no row is written costs nothing.

    Under a rule that forgets, the state of a full row is scaled whether or not the chunk is written.
    """
    carry_B = jnp.where(full_B, update.carry(jnp.float32(1.0)), 1.0)[:, None, None]

    def layer(_: None, inputs: tuple[Array, ...]) -> tuple[None, Array]:
        s_BDF, z_BCF, v_BCD, gate_B = inputs
        if not update.keeps_everything:
            s_BDF = carry_B * s_BDF

        def add(s_BDF: Array) -> Array:
            return s_BDF + gate_B[:, None, None] * _deltas(update, v_BCD, z_BCF, eta)

        return None, jax.lax.cond(jnp.any(gate_B > 0), add, lambda s_BDF: s_BDF, s_BDF)

    return jax.lax.scan(layer, None, (cache.s_nBDF, cache.z_nBCF, v_nBCD, gate_nB))[1]


def _deltas(update: UpdateRule, v_BCD: Array, z_BCF: Array, eta: Array) -> Array:
    return jax.vmap(lambda v_CD, z_CF: update.delta(v_CD, z_CF, None, eta))(v_BCD, z_BCF)


def _norm(x_BDF: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x_BDF), axis=(1, 2)))
