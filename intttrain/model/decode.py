"""Whole-model reading, a few tokens of every row at a time, with all state in one pytree.

One function serves prompts (pieces of many tokens), generation (one token) and documents too long for one forward
pass. Rows are at different places, and prefill + decode equals one full forward.

Letters: B row, T tokens of a document, P tokens of a piece, M pieces, n TTT layers, D model width, V vocabulary,
F feed-forward width, N query heads, K key/value heads, H head dim, C tokens per chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from intttrain import ttt
from intttrain.config import ModelConfig
from intttrain.config.registry import GATE_SIGNALS
from intttrain.layout.sharding import constrain
from intttrain.model.cached_attention import KeyCache, attend_cached, cache_slots, remember_keys
from intttrain.model.decoder import Decoder, apply_layer
from intttrain.model.layer_groups import plan_groups, scan_layers
from intttrain.model.loss import is_likeliest, prediction_entropy, token_nll
from intttrain.model.rope import rope_tables

PIECE_TOKENS = 256  # of models without chunks of their own


class DecodeState(NamedTuple):
    """What a batch of growing documents carries; a row is one document.

    Attributes:
      keys: of the last tokens.
      ttt: fast weights; ``None`` without TTT.
      length_B: int32, tokens read so far.
      sequence_B: int32, the number of the document: random draws depend on it and not on the row.
      hidden_BD: the final hidden state of the last token, which predicts the next.
      surprise_B: fp32, the model's own signal summed over the open chunk, for rules that look at it.
    """

    keys: KeyCache
    ttt: ttt.FastWeightCache | None
    length_B: Int[Array, "B"]
    sequence_B: Int[Array, "B"]
    hidden_BD: Float[Array, "B D"]
    surprise_B: Float[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What does not change while documents are read; static.

    Attributes:
      piece_tokens: P, the most tokens of a row in one call; with TTT at most a chunk.
      max_tokens: the longest document.
      gate: which chunks are written.
      wants_nll: whether the loss of every token is asked for.
      wants_likeliest: whether it is asked for if every token was the likeliest.
    """

    piece_tokens: int
    max_tokens: int
    gate: ttt.GateRule = ttt.GateRule()
    wants_nll: bool = False
    wants_likeliest: bool = False


class Read(NamedTuple):
    """Result of ``read_tokens``.

    Attributes:
      nll_BP: fp32, loss of each token given those before it; 0 for a document's first token and where there is none;
        ``None`` if it was not asked for.
      decision: of each TTT layer about the chunks that became full with this piece (gate 0 elsewhere); ``None`` without
        TTT.
      full_B: whether a chunk did.
      likeliest_BP: whether no token was more likely, True where none was predicted; ``None`` if it was not asked for.
    """

    nll_BP: Float[Array, "B P"] | None
    decision: ttt.Decision | None
    full_B: Bool[Array, "B *M"]
    likeliest_BP: Bool[Array, "B P"] | None


def piece_tokens(config: ModelConfig, tokens: int = PIECE_TOKENS) -> int:
    """Returns how many tokens to read at once: a chunk, or for a dense model a divisor of ``tokens``."""
    return config.ttt.chunk_tokens if config.ttt is not None else math.gcd(tokens, PIECE_TOKENS)


def init_decode_state(config: ModelConfig, reading: Reading, sequence_B: Int[Array, "B"]) -> DecodeState:
    """Returns the state before the first token."""
    dtype = jnp.dtype(config.compute_dtype)
    rows = sequence_B.shape[0]
    slots = cache_slots(reading.max_tokens, config.sliding_window, reading.piece_tokens)
    shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
    caches = None
    if config.ttt is not None:
        caches = ttt.init_cache(
            len(config.ttt.layers), rows, config.ttt.chunk_tokens, config.d_model, config.d_ff, dtype
        )
    return DecodeState(
        KeyCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), caches, jnp.zeros((rows,), jnp.int32),
        sequence_B.astype(jnp.int32), jnp.zeros((rows, config.d_model), dtype), jnp.zeros((rows,), jnp.float32),
    )  # fmt: skip


def restart_rows(state: DecodeState, restart_B: Bool[Array, "B"], sequence_B: Int[Array, "B"]) -> DecodeState:
    """Returns the state in which some rows begin new documents; nothing of the old ones is read any more.

    Keys, open chunks and hidden states of a new document need no clearing: its length says that they are not its own.
    """
    fast = state.ttt
    if fast is not None:
        over = lambda x: jnp.where(restart_B.reshape((1, -1) + (1,) * (x.ndim - 2)), jnp.zeros_like(x), x)  # noqa: E731
        fast = fast._replace(
            s_nBDF=over(fast.s_nBDF), written_nB=over(fast.written_nB), gate=jax.tree.map(over, fast.gate)
        )
    return state._replace(
        ttt=fast,
        length_B=jnp.where(restart_B, 0, state.length_B),
        sequence_B=jnp.where(restart_B, sequence_B, state.sequence_B),
        surprise_B=jnp.where(restart_B, 0.0, state.surprise_B),
    )


def piece_counts(
    config: ModelConfig, reading: Reading, length_B: Int[Array, "B"], left_B: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Returns how many of the tokens left the next piece of each row takes: it ends with the open chunk."""
    count_B = jnp.clip(left_B, 0, reading.piece_tokens)
    if config.ttt is None:
        return count_B
    return jnp.minimum(count_B, config.ttt.chunk_tokens - length_B % config.ttt.chunk_tokens)


def read_tokens(
    decoder: Decoder,
    reading: Reading,
    tokens_BP: Int[Array, "B P"],
    count_B: Int[Array, "B"],
    state: DecodeState,
    *,
    eta: Float[Array, ""],
    gate: ttt.GateSettings = ttt.GateSettings(),
) -> tuple[Read, DecodeState]:
    """Reads the next tokens of every row.

    Args:
      decoder: the model.
      reading: see there.
      tokens_BP: P is ``reading.piece_tokens`` or less.
      count_B: how many of them a row has, from the left; at most ``piece_counts``. A row with none stays as it is.
      state: before.
      eta: size of an update; 0 switches test-time training off.
      gate: numbers of the rule.

    Returns:
      What was asked for, and the state after.
    """
    config = decoder.config
    tokens_BP = jnp.where(jnp.arange(tokens_BP.shape[1])[None] < count_B[:, None], tokens_BP, 0)
    hidden_BPD, keys, fast = _read_layers(decoder, tokens_BP, count_B, state)
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None, None]
    last_BD = jnp.take_along_axis(hidden_BPD, last_B1, axis=1)[:, 0]
    after = state._replace(
        keys=keys, ttt=fast, length_B=state.length_B + count_B,
        hidden_BD=jnp.where(count_B[:, None] > 0, last_BD, state.hidden_BD),
    )  # fmt: skip
    nll_BP, likeliest_BP, surprise_BP = _losses(decoder, reading, tokens_BP, count_B, state, hidden_BPD)
    if config.ttt is None or fast is None:
        return Read(nll_BP, None, jnp.zeros(count_B.shape, jnp.bool_), likeliest_BP), after
    chunk_tokens = config.ttt.chunk_tokens
    surprise_B = state.surprise_B + (0.0 if surprise_BP is None else jnp.sum(surprise_BP, axis=1))
    full_B = (count_B > 0) & (after.length_B % chunk_tokens == 0)
    fast, decision = ttt.commit(
        fast, _fast_weights(decoder), full_B, eta=eta, chunk_B=state.length_B // chunk_tokens,
        sequence_B=state.sequence_B, model_signal_B=surprise_B / chunk_tokens, rule=reading.gate, settings=gate,
        update=ttt.update_rule(config.ttt),
    )  # fmt: skip
    after = after._replace(ttt=fast, surprise_B=jnp.where(full_B, 0.0, surprise_B))
    return Read(nll_BP, decision, full_B, likeliest_BP), after


def read_documents(
    decoder: Decoder,
    reading: Reading,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, "B"],
    sequence_B: Int[Array, "B"],
    *,
    eta: Float[Array, ""],
    gate: ttt.GateSettings = ttt.GateSettings(),
) -> tuple[Read, DecodeState]:
    """Reads whole documents piece by piece from their first token on; memory grows by their keys only.

    Args:
      decoder, reading, eta, gate: as in ``read_tokens``; ``piece_tokens`` divides T and, with TTT, is the chunk.
      tokens_BT: documents, padded at the end.
      length_B: tokens of each.
      sequence_B: their numbers.

    Returns:
      ``nll_BP`` and ``likeliest_BP`` with P = T, decisions with a last axis of the T / P pieces; and the last state.
    """
    rows, tokens = tokens_BT.shape
    piece = reading.piece_tokens
    pieces_MBP = jnp.moveaxis(tokens_BT.reshape(rows, tokens // piece, piece), 1, 0)

    def step(state: DecodeState, inputs: tuple[jax.Array, jax.Array]) -> tuple[DecodeState, Read]:
        tokens_BP, number = inputs
        count_B = jnp.clip(length_B - number * piece, 0, piece)
        read, state = read_tokens(decoder, reading, tokens_BP, count_B, state, eta=eta, gate=gate)
        return state, read

    start = init_decode_state(decoder.config, reading, sequence_B)
    state, read = jax.lax.scan(step, start, (pieces_MBP, jnp.arange(tokens // piece)))
    nll_BT, likeliest_BT = jax.tree.map(
        lambda x_MBP: jnp.moveaxis(x_MBP, 0, 1).reshape(rows, tokens), (read.nll_BP, read.likeliest_BP)
    )
    decision = jax.tree.map(lambda x_MnB: jnp.moveaxis(x_MnB, 0, 2), read.decision)
    return Read(nll_BT, decision, jnp.moveaxis(read.full_B, 0, 1), likeliest_BT), state


def next_logits(decoder: Decoder, state: DecodeState) -> Float[Array, "B V"]:
    """Returns fp32 logits of the token after the last one read."""
    weight_VD = decoder.output_weight().astype(state.hidden_BD.dtype)
    return jnp.einsum("bd,vd->bv", state.hidden_BD, weight_VD, preferred_element_type=jnp.float32)


def _read_layers(
    decoder: Decoder, tokens_BP: jax.Array, count_B: jax.Array, state: DecodeState
) -> tuple[jax.Array, KeyCache, ttt.FastWeightCache | None]:
    """Returns the final hidden states, and the caches with these tokens."""
    config = decoder.config
    at_P = jnp.arange(tokens_BP.shape[1])
    position_BP = state.length_B[:, None] + at_P[None]
    real_BP = at_P[None] < count_B[:, None]
    x0_BPD = decoder.embed(tokens_BP, decoder.dtype)
    rope = rope_tables(config.rope, config.head_dim, position_BP)
    merge_layer, layer_params, _, _ = decoder.split_layers()

    def block(carry: Any, inputs: Any, fast_number: jax.Array | None) -> tuple[Any, None, None]:
        x_BPD, keys, fast = carry
        params, number = inputs
        layer = merge_layer(params)

        def attend(q_BPNH: jax.Array, k_BPKH: jax.Array, v_BPKH: jax.Array) -> tuple[jax.Array, KeyCache]:
            known = remember_keys(keys, number, k_BPKH, v_BPKH, position_BP, real_BP)
            length_B = state.length_B + count_B
            return attend_cached(q_BPNH, known, number, position_BP, length_B, config.sliding_window), known

        def project_fast(z_BPF: jax.Array, source_BPD: jax.Array) -> tuple[jax.Array, ttt.FastWeightCache]:
            assert fast_number is not None and config.ttt is not None
            base_BPD, update = layer.mlp.project(z_BPF), ttt.update_rule(config.ttt)
            o_BPD = ttt.read(fast, fast_number, z_BPF, base_BPD, layer.mlp.down[...], update)
            chunk_tokens = config.ttt.chunk_tokens
            places_BP = jnp.where(real_BP, position_BP % chunk_tokens, chunk_tokens)
            return o_BPD, ttt.remember(fast, fast_number, places_BP, z_BPF, source_BPD, o_BPD)

        project = None if fast_number is None else project_fast
        x_BPD, keys, remembered = apply_layer(config, layer, x_BPD, x0_BPD, rope, attend, project)
        return (x_BPD, keys, fast if remembered is None else remembered), None, None

    ttt_layers = config.ttt.layers if config.ttt else ()
    (x_BPD, keys, fast), _, _ = scan_layers(
        plan_groups(config.num_layers, ttt_layers), block, (x0_BPD, state.keys, state.ttt),
        (layer_params, jnp.arange(config.num_layers)), jnp.arange(len(ttt_layers)) if ttt_layers else None,
    )  # fmt: skip
    return decoder.final_norm(x_BPD), keys, fast


def _losses(
    decoder: Decoder, reading: Reading, tokens_BP: jax.Array, count_B: jax.Array, before: DecodeState, hidden_BPD: Any
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Returns what is asked for of every token: loss, being the likeliest, and what a rule wants of the whole model."""
    gate = reading.gate if decoder.config.ttt is not None else ttt.GateRule()
    signal = GATE_SIGNALS[gate.signal] if gate.uses_signal else None
    at_P = jnp.arange(tokens_BP.shape[1])
    real_BP = at_P[None] < count_B[:, None]
    predicted_BP = real_BP & (before.length_B[:, None] + at_P[None] > 0)
    from_BPD = jnp.concatenate([before.hidden_BD[:, None], hidden_BPD[:, :-1]], axis=1)
    from_BPD = constrain(from_BPD, "batch", "tokens", "width")
    weight_VD, block = decoder.output_weight(), decoder.config.loss_chunk_tokens

    @functools.cache
    def nll_BP() -> jax.Array:
        return jnp.where(predicted_BP, token_nll(from_BPD, weight_VD, tokens_BP, block), 0.0)

    def entropy_BP() -> jax.Array:
        return jnp.where(real_BP, prediction_entropy(hidden_BPD, weight_VD, block), 0.0)

    asked_BP = nll_BP() if reading.wants_nll else None
    likeliest_BP = surprise_BP = None
    if reading.wants_likeliest:
        likeliest_BP = ~predicted_BP | is_likeliest(from_BPD, weight_VD, tokens_BP, block)
    if isinstance(signal, ttt.ModelSignal):
        surprise_BP = signal.measure(ttt.Predictions(nll_BP, entropy_BP))
    return asked_BP, likeliest_BP, surprise_BP


def _fast_weights(decoder: Decoder) -> ttt.FastWeights:
    """Returns the parameters of all TTT layers, and how values are made of them: as in whole rows."""
    config = decoder.config.ttt
    assert config is not None
    _, _, merge_ttt, ttt_params = decoder.split_layers()

    def values(params: Any, x_BCD: jax.Array) -> jax.Array:
        one_document_BC = jnp.ones(x_BCD.shape[:2], jnp.int32)
        return merge_ttt(params).values(x_BCD, one_document_BC)

    return ttt.FastWeights(
        decoder.layers.mlp.down[...], jnp.asarray(config.layers), ttt_params, values,
        ttt.measured_tokens(config.chunk_tokens, decoder.ttt.has_conv),
    )  # fmt: skip
