"""Dense and banded attention against each other and against one query at a time in numpy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.model.attention import banded_attention, causal_mask, dense_attention
from intttrain.model.context_attention import attend
from tests.model import numpy_decoder
from tests.model.tiny import TINY, rows
from tests.ttt.cases import assert_close, assert_same

HEADS = {"grouped": (4, 2), "one_kv_head": (4, 1), "multi_head": (2, 2)}


@functools.cache
def qkv(seq_len, heads, kv_heads, row_count=2):
    rng = np.random.default_rng(seq_len)
    shapes = [(row_count, seq_len, n, 4) for n in (heads, kv_heads, kv_heads)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def documents(seq_len):
    """Two rows: one document, and three with padding at the end."""
    third = seq_len // 3
    return rows((seq_len,), (third, 1, seq_len - third - 2, -1))[1]


dense = jax.jit(lambda q, k, v, ids, window: dense_attention(q, k, v, causal_mask(ids, window)), static_argnums=4)
banded = jax.jit(banded_attention, static_argnums=4)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
@pytest.mark.parametrize("heads", HEADS)
def test_equal_to_one_query_at_a_time(heads, window):
    q, k, v = qkv(12, *HEADS[heads])
    ids = documents(12)
    group = HEADS[heads][0] // HEADS[heads][1]
    wanted = np.zeros(q.shape)
    for b in range(2):
        for n in range(HEADS[heads][0]):
            one_head = [np.asarray(x, np.float64)[b] for x in (q[:, :, n], k[:, :, n // group], v[:, :, n // group])]
            wanted[b, :, n] = numpy_decoder.attend_head(*one_head, ids[b], window)
    assert_close(dense(q, k, v, ids, window), wanted, 2e-6)
    if window is not None:
        assert_close(banded(q, k, v, ids, window), wanted, 2e-6)


@pytest.mark.parametrize(("seq_len", "window"), [(16, 4), (13, 4), (13, 5), (7, 7), (7, 9), (16, 1), (5, 3), (1, 2)])
def test_banded_equals_dense_in_value_and_gradient(seq_len, window):
    """Windows that do and do not divide the row, as long as it, longer, and of one token."""
    inputs = qkv(seq_len, 4, 2)
    ids = documents(seq_len) if seq_len > 3 else np.ones((2, seq_len), np.int32)
    along = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)

    def value_and_gradient(attention):
        def loss(q, k, v):
            o = attention(q, k, v, ids, window)
            return jnp.sum(o * along), o

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)

    (banded_grads, banded_o), (dense_grads, dense_o) = value_and_gradient(banded), value_and_gradient(dense)
    assert_close(banded_o, dense_o, 2e-6)
    for actual, wanted in zip(banded_grads, dense_grads, strict=True):
        assert_close(actual, wanted, 5e-6)


def test_auto_takes_the_band_when_it_is_smaller_than_the_row():
    q, k, v = qkv(16, 4, 2)
    ids = documents(16)

    def program(attention, window):
        config = dataclasses.replace(TINY, attention=attention, sliding_window=window)
        return str(jax.make_jaxpr(lambda *x: attend(config, *x, jnp.asarray(ids)))(q, k, v))

    assert program("auto", 4) == program("banded", 4) != program("dense", 4)
    assert program("auto", 8) == program("dense", 8)
    assert program("auto", None) == program("dense", None)


def test_banded_never_forms_all_scores():
    """The largest intermediate of a row grows with T x window, not T x T."""

    def largest(seq_len):
        q, k, v = (jax.ShapeDtypeStruct((1, seq_len, 1, 2), jnp.float32) for _ in range(3))
        ids = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda *x: banded_attention(*x, 8))(q, k, v, ids)
        return max(int(np.prod(var.aval.shape)) for eqn in jaxpr.eqns for var in eqn.outvars)

    assert largest(256) == 4 * largest(64) < 256 * 256


def test_masked_keys_have_exactly_no_weight():
    """Keys and values that a query must not see may hold anything, however large."""
    q, k, v = qkv(12, 4, 2)
    ids = documents(12)
    last = np.zeros((2, 12), bool)
    last[:, 6:] = True
    loud = [jnp.where(last[:, :, None, None], 1e4, x) for x in (k, v)]
    assert_same(dense(q, *loud, ids, None)[:, :6], dense(q, k, v, ids, None)[:, :6])
    assert_same(banded(q, *loud, ids, 4)[:, :6], banded(q, k, v, ids, 4)[:, :6])


def test_bf16_keeps_its_dtype_and_fp32_scores():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(12, 4, 2))
    ids = documents(12)
    o = dense(q, k, v, ids, None)
    assert o.dtype == jnp.bfloat16
    wanted = dense(*(x.astype(jnp.float32) for x in (q, k, v)), ids, None)
    assert_close(o.astype(jnp.float32), wanted, 1e-2)  # weights and outputs are rounded to 8 bits
    assert_close(banded(q, k, v, ids, 5).astype(jnp.float32), dense(q, k, v, ids, 5).astype(jnp.float32), 1e-2)
