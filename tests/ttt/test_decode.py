"""One token at a time equals the whole row, at every length around a chunk edge and with rows out of step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from tests.ttt.cases import BY_NAME, C, D, F, T, assert_close, assert_same, leaves_of

ROWS = 3
TRANSFORMS = {
    "plain": ttt.DeltaTransform(),
    "clip": ttt.DeltaTransform(clip=4.0),
    "row_norm": ttt.DeltaTransform(preserve_row_norm=True),
}


def inputs():
    leaves = leaves_of(BY_NAME["one_document"])
    return {name: jnp.asarray(leaves[name]) for name in ("z", "x", "w_down", "w_target", "conv")}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def whole_row(conv, transform, seq_len=T):
    """The full forward over one document per row."""
    i, ids = inputs(), jnp.ones((ROWS, seq_len), jnp.int32)
    v = ttt.make_targets(i["x"][:, :seq_len], i["w_target"], i["conv"] if conv else None, ids, C)
    return ttt.fast_weight_projection(
        i["z"][:, :seq_len], v, i["w_down"], ids, chunk_tokens=C, eta=jnp.asarray(0.3), transform=transform,
        state=ttt.init_state(ROWS, D, F),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def token_by_token(conv, transform, active_SB):
    """Runs S decode steps; row b receives its next token in every step in which it is active."""
    i = inputs()

    def step(carry, active_B):
        cache, seen_B = carry
        here = jnp.arange(ROWS), jnp.minimum(seen_B, T - 1)
        o_BD, cache = ttt.decode_projection(
            i["z"][here], i["x"][here], i["w_down"], i["w_target"], i["conv"] if conv else None, cache, active_B,
            eta=jnp.asarray(0.3), transform=transform,
        )  # fmt: skip
        return (cache, seen_B + active_B.astype(jnp.int32)), (o_BD, seen_B, cache)

    start = ttt.init_cache(ROWS, C, D, F, jnp.dtype("float32")), jnp.zeros((ROWS,), jnp.int32)
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


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("conv", [True, False])
def test_rows_out_of_step_equal_the_whole_row(conv, transform):
    wanted = np.asarray(whole_row(conv, TRANSFORMS[transform]).o_BTD)
    active_SB = schedules()
    cache, o_SBD, seen_SB, _ = token_by_token(conv, TRANSFORMS[transform], active_SB)
    for b in range(ROWS):
        now = active_SB[:, b]
        assert now.sum() > 2 * C
        assert_close(o_SBD[now, b], wanted[b, np.asarray(seen_SB)[now, b]], 1e-5, f"row {b}")
    assert_same(cache.filled_B, active_SB.sum(axis=0) % C)


@pytest.mark.parametrize("length", [C - 1, C, C + 1, 2 * C - 1, 2 * C])
def test_the_cache_holds_the_state_of_the_committed_chunks(length):
    """An open chunk never updates: the state is that of the last chunk edge."""
    active_SB = np.arange(2 * T)[:, None] < np.array([[length] * ROWS])
    cache, *_ = token_by_token(True, TRANSFORMS["plain"], active_SB)
    committed = length // C * C
    wanted = whole_row(True, TRANSFORMS["plain"], committed).state.s_BDF if committed else np.zeros((ROWS, D, F))
    assert_close(cache.s_BDF, wanted, 1e-5)


def test_an_inactive_row_keeps_its_cache_bit_for_bit():
    active_SB = schedules()
    *_, caches = token_by_token(True, TRANSFORMS["plain"], active_SB)
    for name in ("s_BDF", "z_BCF", "x_BCD", "filled_B"):
        before, after = np.asarray(getattr(caches, name))[:-1], np.asarray(getattr(caches, name))[1:]
        still_SB = ~active_SB[1:]
        assert np.any(still_SB)
        assert_same(after[still_SB], before[still_SB], name)


def test_eta_zero_decodes_with_the_plain_projection():
    i = inputs()
    cache = ttt.init_cache(ROWS, C, D, F, jnp.dtype("float32"))
    for t in range(2 * C):
        o_BD, cache = ttt.decode_projection(
            i["z"][:, t], i["x"][:, t], i["w_down"], i["w_target"], i["conv"], cache, jnp.ones((ROWS,), bool),
            eta=jnp.asarray(0.0),
        )  # fmt: skip
        assert_same(o_BD, ttt.project(i["z"][:, t : t + 1], i["w_down"])[:, 0])
    assert_same(cache.s_BDF, 0.0)


def test_bf16_cache_keeps_the_state_in_fp32():
    cache = ttt.init_cache(ROWS, C, D, F, jnp.dtype("bfloat16"))
    assert (cache.s_BDF.dtype, cache.z_BCF.dtype, cache.x_BCD.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    i = {name: leaf.astype(jnp.bfloat16) if name in ("z", "x") else leaf for name, leaf in inputs().items()}
    for t in range(C):
        o_BD, cache = ttt.decode_projection(
            i["z"][:, t], i["x"][:, t], i["w_down"], i["w_target"], i["conv"], cache, jnp.ones((ROWS,), bool),
            eta=jnp.asarray(0.3),
        )  # fmt: skip
    assert o_BD.dtype == jnp.bfloat16
    assert cache.s_BDF.dtype == jnp.float32
    assert np.any(np.asarray(cache.s_BDF))
