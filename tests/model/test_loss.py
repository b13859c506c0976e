"""The blocked loss equals the softmax over all logits, and never holds them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.model import token_nll
from intttrain.model.loss import prediction_entropy
from tests.ttt.cases import assert_close

B, T, D, V = 2, 24, 8, 40


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    hidden, weight = rng.standard_normal((B, T, D)), 2 * rng.standard_normal((V, D))
    labels, weights = rng.integers(0, V, (B, T)), rng.random((B, T))
    as_jax = (jnp.asarray(x, jnp.float32) for x in (hidden, weight, weights))
    return (*as_jax, jnp.asarray(labels, jnp.int32))


def plain(hidden, weight, labels, block_tokens):
    del block_tokens
    logits = jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), weight.astype(jnp.float32))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, :, None], axis=2)[:, :, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(nll, block_tokens, hidden, weight, weights, labels):
    def loss(hidden, weight):
        each = nll(hidden, weight, labels, block_tokens)
        return jnp.sum(each * weights), each

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, weight)


@pytest.mark.parametrize("block_tokens", [1, 5, 8, 23, 24, 512])
def test_equal_to_log_softmax_of_all_logits(block_tokens):
    wanted_grads, wanted = value_and_gradients(plain, 0, *inputs())
    grads, nll = value_and_gradients(token_nll, block_tokens, *inputs())
    assert nll.dtype == jnp.float32
    assert_close(nll, wanted, 1e-6)
    for actual, expected in zip(grads, wanted_grads, strict=True):
        assert_close(actual, expected, 2e-6)


def test_large_logits_do_not_overflow():
    hidden, weight, weights, labels = inputs()
    _, nll = value_and_gradients(token_nll, 8, 100 * hidden, weight, weights, labels)
    assert_close(nll, value_and_gradients(plain, 0, 100 * hidden, weight, weights, labels)[1], 1e-6)


def shapes(jaxpr):
    """Yields the shape of everything that any nested program of a jaxpr computes."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars if hasattr(var.aval, "shape"))
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)


def largest_with_vocabulary(nll, block_tokens):
    """Returns the largest number of elements of an array with a vocabulary axis, forward and backward."""

    def gradients(*arguments):
        return value_and_gradients(nll, block_tokens, *arguments)

    found = shapes(jax.make_jaxpr(gradients)(*inputs()).jaxpr)
    return max(int(np.prod(shape)) for shape in found if V in shape)


def test_logits_exist_for_one_block_at_a_time():
    assert largest_with_vocabulary(token_nll, 8) == max(B * 8 * V, V * D)
    assert largest_with_vocabulary(plain, 0) == B * T * V, "the measurement sees the logits where they exist"


def test_the_compiled_program_holds_no_row_of_logits():
    text = value_and_gradients.lower(token_nll, 8, *inputs()).compile().as_text()
    assert f"[{B},8,{V}]" in text
    held = {f"[{B},{T},{V}]", f"[{T // 8},{B},8,{V}]", f"[{B * T},{V}]", f"[{V},{B * T}]"}
    assert not [shape for shape in held if shape in text]


def test_bf16_weight_gradient_is_summed_in_fp32():
    """1,024 blocks of one token, each adding the same amount: a bf16 sum would stop growing at 256 of them."""
    seq_len = 1024
    hidden = jnp.ones((1, seq_len, 1), jnp.bfloat16)
    labels = jnp.zeros((1, seq_len), jnp.int32)

    def loss(weight):
        return jnp.sum(token_nll(hidden, weight, labels, 1))

    gradient = jax.jit(jax.grad(loss))(jnp.zeros((2, 1)))
    assert gradient.dtype == jnp.float32
    assert_close(gradient, [[-seq_len / 2], [seq_len / 2]], 1e-3)


@pytest.mark.parametrize("block_tokens", [5, T])
def test_the_entropy_is_that_of_the_softmax(block_tokens):
    hidden, weight, _, _ = (np.asarray(x, np.float64) for x in inputs())
    logits = np.einsum("btd,vd->btv", hidden, weight)
    share = np.exp(logits - logits.max(axis=2, keepdims=True))
    share /= share.sum(axis=2, keepdims=True)
    wanted = -(share * np.log(share)).sum(axis=2)
    assert 0 < wanted.min() < 1 < wanted.max() < np.log(V)
    found = jax.jit(prediction_entropy, static_argnums=2)(*inputs()[:2], block_tokens)
    assert_close(found, wanted, 1e-5)
