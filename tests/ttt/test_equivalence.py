"""The first rungs of the ladder: token loop = reference = chunked, in value and in every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from intttrain import ttt
from intttrain.ttt import chunked
from tests.ttt.cases import (
    BY_NAME,
    CASES,
    C,
    T,
    assert_close,
    assert_same,
    cotangents,
    forward,
    forward_loop,
    gradients,
    leaves_of,
    loss_of,
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# fp32 rounding of sums of at most 16 x 12 products.
FP32 = 1e-5
# Gradients through 12 power iterations of a spectral norm are as exact as the iteration has converged.
SPECTRAL = 2e-3


def tolerance(case):
    return SPECTRAL if case.update.spectral is not None else FP32


@every_case
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_value_equals_the_token_loop(case, implementation):
    _, output = gradients(case, implementation)
    o_BTD, s_BDF = forward_loop(case, leaves_of(case))
    assert_close(output.o_BTD, o_BTD, tolerance(case), "o")
    assert_close(output.state.s_BDF, s_BDF, tolerance(case), "state")
    assert_same(output.state.document_B, case.segments_BT[:, -1])


@every_case
def test_chunked_gradients_equal_the_reference(case):
    wanted, _ = gradients(case, "reference")
    actual, _ = gradients(case, "chunked")
    assert set(actual) == set(leaves_of(case))
    for name in wanted:
        assert_close(actual[name], wanted[name], 2 * FP32, name)  # both sides round


@pytest.mark.parametrize("case", [case for case in CASES if case.carried is None], ids=lambda case: case.name)
def test_rows_without_a_state_run_as_one_long_row(case):
    """What the trainer runs: no row begins with a state and nobody asks for the last ones."""
    along_o_BTD, along_s_BDF = cotangents(case)
    wanted, with_state = gradients(case, "chunked", along=(along_o_BTD, 0.0 * along_s_BDF))
    actual, output = gradients(case, "chunked", fresh=True)
    assert output.state is None
    assert_close(output.o_BTD, with_state.o_BTD, tolerance(case), "o")
    assert_close(output.state_norm_BM, with_state.state_norm_BM, tolerance(case), "norms")
    for name in set(wanted) - {"s_in"}:
        assert_close(actual[name], wanted[name], 2 * tolerance(case), name)


@every_case
def test_gradients_equal_finite_differences_of_the_token_loop(case):
    """Neither autodiff nor JAX on the other side: central differences in float64, one direction per leaf."""
    if case.update.preserve_row_norm:
        pytest.skip("row scales are constants for differentiation, by decision")
    actual, _ = gradients(case, "chunked")
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in leaves_of(case).items()}
    rng = np.random.default_rng(5)
    for name, leaf in leaves.items():
        direction = rng.standard_normal(leaf.shape)
        step = 1e-5
        ahead, behind = (
            loss_of(case, *forward_loop(case, leaves | {name: leaf + sign * step * direction})) for sign in (1, -1)
        )
        wanted = (ahead - behind) / (2 * step)
        got = float(np.sum(np.asarray(actual[name], np.float64) * direction))
        scale = float(np.linalg.norm(actual[name]) * np.linalg.norm(direction)) + 1e-3
        # 1e-4 of the largest possible slope: fp32 gradients, and differences good to 1e-8.
        assert abs(got - wanted) <= max(1e-4, tolerance(case)) * scale, (name, got, wanted)


def test_check_grads_of_z_and_v():
    """JAX's own checker on a tiny case, with every input that the chunked form differentiates."""
    segments_BT = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2, 0]], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 5)
    z, v = jax.random.normal(keys[0], (2, 8, 3)), jax.random.normal(keys[1], (2, 8, 2))
    w, s_in = jax.random.normal(keys[2], (2, 3)), jax.random.normal(keys[3], (2, 2, 3))
    gates = jax.random.uniform(keys[4], (2, 4))

    def run(z, v, w, gates, eta, s_in):
        state = ttt.FastWeightState(jnp.asarray(s_in), jnp.ones((2,), jnp.int32))
        z, v, w, gates, eta = (jnp.asarray(x) for x in (z, v, w, gates, eta))  # numpy where it differences
        output = ttt.fast_weight_projection(z, v, w, segments_BT, chunk_tokens=2, eta=eta, gates_BM=gates, state=state)
        return output.o_BTD, output.state.s_BDF

    check_grads(jax.jit(run), (z, v, w, gates, jnp.asarray(0.5), s_in), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        ("reference", "state_in"),
        ("chunked", "several_in_a_chunk"),
        ("chunked", "state_in"),
        ("chunked", "aligned_with_padding"),
        ("chunked", "row_norm_and_clip"),
    ],
)
def test_bf16_inputs_stay_close_and_the_state_stays_fp32(implementation, name):
    """bf16 keeps 8 bits (0.4 %); o, v, z and the S that is read are each rounded once: 2 % of the largest value."""
    case = BY_NAME[name]
    leaves = dict(leaves_of(case))
    for leaf in ("z", "x", "v"):
        leaves[leaf] = jnp.asarray(leaves[leaf], jnp.bfloat16)
    grads, output = gradients(case, implementation, leaves)
    assert output.o_BTD.dtype == jnp.bfloat16
    assert output.state.s_BDF.dtype == jnp.float32
    o_BTD, s_BDF = forward_loop(case, leaves)
    assert_close(output.o_BTD, o_BTD, 2e-2, "o")
    assert_close(output.state.s_BDF, s_BDF, 2e-2, "state")
    wanted, _ = gradients(case, "reference", {k: np.asarray(leaf, np.float32) for k, leaf in leaves.items()})
    for leaf, gradient in grads.items():
        assert gradient.dtype == leaves[leaf].dtype
        assert_close(gradient, wanted[leaf], 4e-2, leaf)  # a product of two rounded factors, rounded again


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_bf16_inputs_round_neither_the_products_nor_the_running_sum(implementation):
    """(1 + 2^-7)^2 has 15 bits, and 12 updates of 2^-8 on top of a number above 1 are each lost in bf16."""
    first, later = 1 + 2**-7, 2**-8
    z = jnp.asarray([[[first]] + [[1.0]] * 12], jnp.bfloat16)
    v = jnp.asarray([[[first]] + [[later]] * 12], jnp.bfloat16)
    output = ttt.fast_weight_projection(
        z, v, jnp.zeros((1, 1)), jnp.ones((1, 13), jnp.int32), chunk_tokens=1, eta=jnp.asarray(1.0),
        state=ttt.init_state(1, 1, 1), implementation=implementation,
    )  # fmt: skip
    assert float(output.state.s_BDF[0, 0, 0]) == first**2 + 12 * later


def test_a_state_below_the_last_bit_of_w0_is_read():
    """S is 1/1,000 of W0: bf16 cannot add it to most entries, but the sums over many entries move by S z."""
    rng = np.random.default_rng(0)
    w_DF, z_CF = rng.standard_normal((64, 2048)), rng.standard_normal((128, 2048))
    s_DF = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 2048))
    s_DF *= 1e-3 * np.linalg.norm(w_DF) / np.linalg.norm(s_DF)
    signal_CD = z_CF @ s_DF.T

    def moved(w_rounded_DF):
        """By how much of S z the product with the rounded sum moves."""
        read_C, z_bf16 = jnp.ones(128), jnp.asarray(z_CF, jnp.bfloat16)
        chunk = chunked.Chunks(z_bf16, z_bf16, read_C, read_C, jnp.float32(1), jnp.float32(1))
        sum_DF, alone_DF = (
            np.asarray(chunked._read_matrix(jnp.asarray(w_rounded_DF, jnp.float32), jnp.asarray(s, jnp.float32), chunk))
            for s in (s_DF, 0.0 * s_DF)
        )
        difference_CD = z_CF @ (sum_DF.astype(np.float64) - alone_DF).T
        return np.sum(difference_CD * signal_CD) / np.sum(signal_CD**2)

    assert abs(moved(w_DF) - 1) < 0.1
    assert moved(jnp.asarray(w_DF, jnp.bfloat16)) < 0.8, "the measurement sees a W0 that was rounded before the sum"


@pytest.mark.parametrize("update", ["one_document", "row_norm_and_clip", "clip_and_spectral"])
@pytest.mark.parametrize("off", ["gates", "eta"])
def test_switched_off_is_the_plain_projection_bit_for_bit(update, off):
    case = BY_NAME[update]
    leaves = dict(leaves_of(case)) | {"s_in": np.zeros_like(leaves_of(case)["s_in"])}
    leaves[off] = np.zeros_like(leaves[off])
    plain = jax.jit(ttt.project)(leaves["z"], leaves["w_down"])
    on = gradients(case, "chunked")[1].o_BTD
    assert np.max(np.abs(on - plain)) > 0.1
    assert_same(gradients(case, "chunked", leaves)[1].o_BTD, plain)


def test_first_chunk_never_sees_its_own_update():
    """Apply, then update: o of a chunk does not depend on the values written in it or later."""
    case = BY_NAME["one_document"]
    _, output = gradients(case, "chunked")
    changed = dict(leaves_of(case))
    changed["v"] = changed["v"].copy()
    changed["v"][:, C:] += 1.0
    _, other = gradients(case, "chunked", changed)
    assert_same(other.o_BTD[:, : 2 * C], output.o_BTD[:, : 2 * C])
    assert np.all(np.asarray(other.o_BTD[0, 2 * C :] != output.o_BTD[0, 2 * C :]))


def test_reported_sizes():
    case = BY_NAME["trailing_padding"]
    leaves = leaves_of(case)
    _, output = gradients(case, "chunked")
    base = np.linalg.norm(leaves["w_down"])
    assert output.delta_norm_BM.shape == output.state_norm_BM.shape == (3, 4)
    assert_close(output.state_norm_BM[:, -1], np.linalg.norm(output.state.s_BDF, axis=(1, 2)) / base, FP32)
    # Nothing is carried out of a chunk that ends in padding: (8, -8) writes twice, then nothing.
    assert np.all(np.asarray(output.delta_norm_BM[1, :2]) > 0)
    assert_same(output.delta_norm_BM[1, 2:], np.zeros(2))
    assert_same(output.state_norm_BM[1, 2:], np.zeros(2))


def test_reported_sizes_carry_no_gradient():
    case = BY_NAME["one_row"]

    def size(leaves):
        output = forward(case, leaves, case.segments_BT)
        return jnp.sum(output.delta_norm_BM) + jnp.sum(output.state_norm_BM)

    for name, gradient in jax.grad(size)(leaves_of(case)).items():
        assert_same(gradient, np.zeros_like(gradient), name)


def test_default_arguments_mean_ungated_and_fresh():
    case = BY_NAME["one_document"]
    leaves = jax.tree.map(jnp.asarray, leaves_of(case))
    segments_BT = jnp.asarray(case.segments_BT)
    arguments = (leaves["z"], leaves["v"], leaves["w_down"], segments_BT)
    state = ttt.init_state(3, 8, 12)
    short = ttt.fast_weight_projection(*arguments, chunk_tokens=C, eta=leaves["eta"], state=state)
    full = ttt.fast_weight_projection(
        *arguments, chunk_tokens=C, eta=leaves["eta"], gates_BM=jnp.ones((3, 4)), state=state, implementation="chunked"
    )
    assert_same(short.o_BTD, full.o_BTD)
    assert_same(short.state.s_BDF, full.state.s_BDF)


def test_a_chunk_that_does_not_divide_the_row_is_refused():
    leaves = jax.tree.map(jnp.asarray, leaves_of(BY_NAME["one_row"]))
    with pytest.raises(ValueError, match="chunk_tokens=5 does not divide the row length 16"):
        ttt.fast_weight_projection(
            leaves["z"], leaves["v"], leaves["w_down"], jnp.ones((1, T), jnp.int32), chunk_tokens=5, eta=leaves["eta"]
        )


def test_every_gradient_of_the_comparison_is_alive():
    """A comparison of zeros proves nothing: each leaf moves the loss."""
    grads, _ = gradients(BY_NAME["state_in"], "chunked")
    for name, gradient in grads.items():
        assert np.max(np.abs(gradient)) > 1e-3, name
    assert all(np.any(direction) for direction in cotangents(BY_NAME["state_in"]))
