"""What is written: the centred convolution, its edges, and the matrix that is not transposed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from tests.ttt import loop
from tests.ttt.cases import CASES, C, D, T, assert_close, assert_same, leaves_of

target_cases = pytest.mark.parametrize("case", CASES[:11], ids=lambda case: case.name)


@target_cases
@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 16])
def test_equal_to_the_loop(case, conv, chunk_tokens):
    leaves, segments_BT = leaves_of(case), case.segments_BT
    conv_WD = leaves_of(CASES[0])["conv"] if conv else None
    actual = ttt.make_targets(
        jnp.asarray(leaves["x"]),
        jnp.asarray(leaves["w_target"]),
        None if conv_WD is None else jnp.asarray(conv_WD),
        jnp.asarray(segments_BT),
        chunk_tokens,
    )
    assert_close(actual, loop.targets(leaves["x"], leaves["w_target"], conv_WD, segments_BT, chunk_tokens), 1e-6)


def impulse(position, conv_WD, seq_len=8, chunk_tokens=8):
    """Targets of a row that is one at ``position`` and zero elsewhere, through an identity projection."""
    x = jnp.zeros((1, seq_len, 1)).at[0, position, 0].set(1.0)
    ids = jnp.ones((1, seq_len), jnp.int32)
    return np.asarray(ttt.make_targets(x, jnp.eye(1), conv_WD, ids, chunk_tokens))[0, :, 0]


def test_tap_zero_is_two_tokens_back():
    """v_t = sum_k conv[k] x_{t+k}, k = -2 .. 2: the token at 4 reaches v_6 through tap 0 and v_2 through tap 4."""
    taps = jnp.asarray([[1.0], [2.0], [3.0], [4.0], [5.0]])
    assert_same(impulse(4, taps), [0, 0, 5, 4, 3, 2, 1, 0])
    assert_same(impulse(4, taps, chunk_tokens=4), [0, 0, 0, 0, 3, 2, 1, 0])


def test_next_position_is_one_token_ahead():
    assert_same(impulse(4, None), [0, 0, 0, 1, 0, 0, 0, 0])
    assert_same(impulse(4, None, chunk_tokens=4), [0, 0, 0, 0, 0, 0, 0, 0])


def test_the_projection_is_input_times_output_not_transposed():
    """conv(x) @ W: a matrix with the single entry [0, 1] moves channel 0 into channel 1."""
    x = jnp.asarray([[[7.0, 11.0]]])
    matrix = jnp.asarray([[0.0, 1.0], [0.0, 0.0]])
    taps = jnp.zeros((5, 2)).at[2].set(1.0)
    assert_same(ttt.make_targets(x, matrix, taps, jnp.ones((1, 1), jnp.int32), 1), [[[0.0, 7.0]]])


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[5]], ids=lambda case: case.name)
def test_gradient_of_a_target_is_zero_outside_its_chunk_and_document(case, conv):
    leaves, segments_BT = leaves_of(case), case.segments_BT
    x, w = jnp.asarray(leaves["x"]), jnp.asarray(leaves["w_target"])
    taps = jnp.asarray(leaves["conv"]) if conv else None

    def total(x_BTD):
        """Summed over channels; row b only depends on row b."""
        return jnp.sum(ttt.make_targets(x_BTD, w, taps, jnp.asarray(segments_BT), C), axis=2)

    gradient = np.asarray(jax.jacrev(lambda x_BTD: jnp.sum(total(x_BTD), axis=0))(x))  # T(out) B T(in) D
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    near = (np.abs(t - s) <= 2) if conv else (s == t + 1)
    for b, segments_T in enumerate(segments_BT):
        inside = near & (t // C == s // C) & (segments_T[:, None] == segments_T[None, :])
        reached = np.any(gradient[:, b] != 0, axis=-1)
        assert_same(reached, inside, f"row {b}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_that_of_the_source(dtype):
    v = ttt.make_targets(jnp.ones((2, 8, D), dtype), jnp.eye(D), jnp.ones((5, D)), jnp.ones((2, 8), jnp.int32), 4)
    assert v.dtype == dtype
    assert_same(v[0, :, 0].astype(jnp.float32), [3, 4, 4, 3, 3, 4, 4, 3])


def test_zero_taps_write_nothing_but_learn():
    """The state at initialisation: v is exactly zero, and the taps (not the projection) receive a gradient."""
    leaves = leaves_of(CASES[0])
    ids = jnp.ones((3, T), jnp.int32)

    def total(taps, matrix):
        v = ttt.make_targets(jnp.asarray(leaves["x"]), matrix, taps, ids, C)
        return jnp.sum(v * jnp.asarray(leaves["v"])), v

    matrix = jnp.diag(jnp.arange(1.0, D + 1))
    (dtaps, dmatrix), v = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.zeros((5, D)), matrix)
    assert_same(v, 0.0)
    assert np.all(np.asarray(dtaps) != 0)
    assert_same(dmatrix, 0.0)
