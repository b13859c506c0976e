"""One token at a time equals the whole row, at every length around a chunk edge and with rows out of step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from tests.ttt.cases import BY_NAME, C, D, F, T, assert_close, assert_same, leaves_of
from tests.ttt.other_rules import DeltaRule, Forgets

ROWS = 3
RULES = {
    "plain": ttt.UpdateRule(),
    "clip": ttt.UpdateRule(clip=4.0),
    "row_norm": ttt.UpdateRule(preserve_row_norm=True),
    "forgets": Forgets(),
    "delta_rule": DeltaRule(),
}


def inputs():
    leaves = leaves_of(BY_NAME["one_document"])
    return {name: jnp.asarray(leaves[name]) for name in ("z", "x", "w_down", "w_target", "conv")}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def whole_row(conv, update, seq_len=T):
    """The full forward over one document per row."""
    i, ids = inputs(), jnp.ones((ROWS, seq_len), jnp.int32)
    v = ttt.make_targets(i["x"][:, :seq_len], i["w_target"], i["conv"] if conv else None, ids, C)
    return ttt.fast_weight_projection(
        i["z"][:, :seq_len], v, i["w_down"], ids, chunk_tokens=C, eta=jnp.asarray(0.3), update=update,
        state=ttt.init_state(ROWS, D, F),
    )  # fmt: skip


def fast_weights(w_down_LDF, layers, w_target_nDD, conv_nWD):
    """TTT layers whose values are plain targets."""

    def values(learned, x_BCD):
        return ttt.make_targets(x_BCD, *learned, jnp.ones(x_BCD.shape[:2], jnp.int32), C)

    measured = ttt.measured_tokens(C, conv_nWD is not None)
    return ttt.FastWeights(w_down_LDF, jnp.array(layers), (w_target_nDD, conv_nWD), values, measured)


def one_token(i, conv, update, cache, length_B, active_B, eta, z_BF, x_BD):
    """Reads a token of every active row and commits chunks that are full; returns what was read and the cache."""
    o_B1D = ttt.read(cache, 0, z_BF[:, None], ttt.project(z_BF[:, None], i["w_down"]), i["w_down"], update)
    places_B1 = jnp.where(active_B, length_B % C, C)[:, None]
    cache = ttt.remember(cache, 0, places_B1, z_BF[:, None], x_BD[:, None], o_B1D)
    weights = fast_weights(i["w_down"][None], (0,), i["w_target"][None], i["conv"][None] if conv else None)
    full_B = active_B & (length_B % C == C - 1)
    cache, _ = ttt.commit(
        cache, weights, full_B, eta=jnp.asarray(eta, jnp.float32), chunk_B=length_B // C, sequence_B=jnp.arange(ROWS),
        update=update,
    )  # fmt: skip
    return o_B1D[:, 0], cache


def empty_cache(dtype="float32"):
    return ttt.init_cache(1, ROWS, C, D, F, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def token_by_token(conv, update, active_SB):
    """Runs S steps; row b receives its next token in every step in which it is active."""
    i = inputs()

    def step(carry, active_B):
        cache, seen_B = carry
        here = jnp.arange(ROWS), jnp.minimum(seen_B, T - 1)
        o_BD, cache = one_token(i, conv, update, cache, seen_B, active_B, 0.3, i["z"][here], i["x"][here])
        return (cache, seen_B + active_B.astype(jnp.int32)), (o_BD, seen_B, cache)

    start = empty_cache(), jnp.zeros((ROWS,), jnp.int32)
    (cache, _), (o_SBD, seen_SB, caches) = jax.lax.scan(step, start, active_SB)
    return cache, o_SBD, seen_SB, caches


def schedules():
    """Row 0 always moves, row 1 starts late and stops early, row 2 moves at random."""
    rng = np.random.default_rng(0)
    active_SB = np.ones((2 * T, ROWS), bool)
    active_SB[:, 2] = rng.random(2 * T) < 0.5
    active_SB[:3, 1] = False
    active_SB[3 + T - 2 :, 1] = False
    active_SB[T:, 0] = False
    return active_SB & (np.cumsum(active_SB, axis=0) <= T)


@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("conv", [True, False])
def test_rows_out_of_step_equal_the_whole_row(conv, update):
    wanted = np.asarray(whole_row(conv, RULES[update]).o_BTD)
    active_SB = schedules()
    _, o_SBD, seen_SB, _ = token_by_token(conv, RULES[update], active_SB)
    for b in range(ROWS):
        now = active_SB[:, b]
        assert now.sum() > 2 * C
        assert_close(o_SBD[now, b], wanted[b, np.asarray(seen_SB)[now, b]], 1e-5, f"row {b}")


@pytest.mark.parametrize("length", [C - 1, C, C + 1, 2 * C - 1, 2 * C])
def test_the_cache_holds_the_state_of_the_committed_chunks(length):
    """An open chunk never updates: the state is that of the last chunk edge."""
    active_SB = np.arange(2 * T)[:, None] < np.array([[length] * ROWS])
    cache, *_ = token_by_token(True, RULES["plain"], active_SB)
    committed = length // C * C
    wanted = whole_row(True, RULES["plain"], committed).state.s_BDF if committed else np.zeros((ROWS, D, F))
    assert_close(cache.s_nBDF[0], wanted, 1e-5)
    assert_same(cache.written_nB, committed // C)


def test_an_inactive_row_keeps_its_cache_bit_for_bit():
    active_SB = schedules()
    *_, caches = token_by_token(True, RULES["plain"], active_SB)
    for name in ("s_nBDF", "z_nBCF", "x_nBCD", "o_nBCD", "written_nB"):
        stacked = np.asarray(getattr(caches, name))[:, 0]
        before, after = stacked[:-1], stacked[1:]
        still_SB = ~active_SB[1:]
        assert np.any(still_SB)
        assert_same(after[still_SB], before[still_SB], name)


def test_eta_zero_decodes_with_the_plain_projection():
    i, cache, everyone = inputs(), empty_cache(), jnp.ones((ROWS,), bool)
    for t in range(2 * C):
        at_B = jnp.full((ROWS,), t)
        o_BD, cache = one_token(i, True, RULES["plain"], cache, at_B, everyone, 0.0, i["z"][:, t], i["x"][:, t])
        assert_same(o_BD, ttt.project(i["z"][:, t : t + 1], i["w_down"])[:, 0])
    assert_same(cache.s_nBDF, 0.0)


def test_bf16_cache_keeps_the_state_in_fp32():
    cache, everyone = empty_cache("bfloat16"), jnp.ones((ROWS,), bool)
    assert (cache.s_nBDF.dtype, cache.z_nBCF.dtype, cache.x_nBCD.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    i = {name: leaf.astype(jnp.bfloat16) if name in ("z", "x") else leaf for name, leaf in inputs().items()}
    for t in range(C):
        at_B = jnp.full((ROWS,), t)
        o_BD, cache = one_token(i, True, RULES["plain"], cache, at_B, everyone, 0.3, i["z"][:, t], i["x"][:, t])
    assert o_BD.dtype == jnp.bfloat16
    assert cache.s_nBDF.dtype == jnp.float32
    assert np.any(np.asarray(cache.s_nBDF))


# --- signals of a layer, by hand -----------------------------------------------------------------------------------

LAYERS = (2, 0)  # of a model's three, whose weights differ in size


@functools.cache
def full_chunks():
    """Two TTT layers whose open chunks are full, with states of their own; arrays by name, float64."""
    rng = np.random.default_rng(7)
    n = len(LAYERS)
    sizes = {
        "s": (n, ROWS, D, F),
        "z": (n, ROWS, C, F),
        "x": (n, ROWS, C, D),
        "o": (n, ROWS, C, D),
        "w_target": (n, D, D),
    }
    made = {name: rng.standard_normal(shape) for name, shape in sizes.items()}
    return made | {"w_down": rng.standard_normal((3, D, F)) * np.array([1.0, 4.0, 16.0])[:, None, None]}


@functools.partial(jax.jit, static_argnums=0)
def signals_of(signal, eta):
    made = {name: jnp.asarray(x, jnp.float32) for name, x in full_chunks().items()}
    cache = ttt.init_cache(len(LAYERS), ROWS, C, D, F, jnp.dtype("float32"))._replace(
        s_nBDF=made["s"], z_nBCF=made["z"], x_nBCD=made["x"], o_nBCD=made["o"]
    )
    weights = fast_weights(made["w_down"], LAYERS, made["w_target"], None)
    _, decision = ttt.commit(
        cache, weights, jnp.ones(ROWS, bool), eta=eta, chunk_B=jnp.zeros(ROWS, jnp.int32), sequence_B=jnp.arange(ROWS),
        rule=ttt.GateRule("online", signal),
    )  # fmt: skip
    return decision.signal


def targets_by_hand():
    """V = the next token's source times the target projection; the last token of a chunk has none."""
    made = full_chunks()
    following = np.zeros_like(made["x"])
    following[:, :, :-1] = made["x"][:, :, 1:]
    return np.einsum("nbcd,nde->nbce", following, made["w_target"])


def test_delta_norm_is_the_update_over_the_weight_of_its_own_layer():
    made, eta = full_chunks(), 0.3
    update = eta * np.einsum("nbcd,nbcf->nbdf", targets_by_hand(), made["z"])
    weight_n = np.sqrt(np.square(made["w_down"][list(LAYERS)]).sum(axis=(1, 2)))
    wanted = np.sqrt(np.square(update).sum(axis=(2, 3))) / weight_n[:, None]
    assert_close(signals_of("delta_norm", eta), wanted, 1e-5)


def test_redundancy_looks_at_what_the_state_alone_adds():
    """Neither W0's part of what was read nor the whole of it, which the cache holds too."""
    made, v = full_chunks(), targets_by_hand()

    def relative_error(read):
        inner = (read * v).sum(axis=(2, 3))
        cosine = inner / np.sqrt(np.square(read[:, :, :-1]).sum(axis=(2, 3)) * np.square(v).sum(axis=(2, 3)))
        return 1 - np.square(np.maximum(cosine, 0))

    assert_close(
        signals_of("redundancy", 0.3), relative_error(np.einsum("nbcf,nbdf->nbcd", made["z"], made["s"])), 1e-5
    )
    assert_close(signals_of("reconstruction", 0.3), relative_error(made["o"]), 1e-5)
