"""Bounds on updates against numpy, and their gradients where they are easiest to get wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from intttrain.ttt import rules
from tests.ttt.cases import assert_close, assert_same
from tests.ttt.other_rules import Forgets

spectral_norm, row_scale = jax.vmap(rules.spectral_norm), jax.vmap(rules.row_scale, (0, None))
CLIP, SPECTRAL = ttt.UpdateRule(clip=0.5), ttt.UpdateRule(spectral=0.5)


def bound(delta, update):
    return jax.vmap(update.bound)(delta)


def matrices(gap, rows=3, shape=(8, 12)):
    """Random matrices whose second singular value is ``gap`` times the first, which is 1, 2, 3, ..."""
    rng = np.random.default_rng(1)
    found = []
    for row in range(rows):
        left, _, right = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
        values = (row + 1.0) * gap ** np.minimum(np.arange(min(shape)), 3)
        found.append(left @ np.diag(values) @ right)
    return jnp.asarray(np.stack(found), jnp.float32)


def test_spectral_norm_is_the_first_singular_value():
    """The power iteration errs by about gap^48, and only downwards where there is no gap."""
    assert_close(spectral_norm(matrices(0.8)), [1.0, 2.0, 3.0], 1e-3)  # 2e-5 times a start far from the direction
    close = np.asarray(spectral_norm(matrices(0.99))) / np.array([1.0, 2.0, 3.0])
    assert np.all(close <= 1 + 1e-5)
    assert np.all(close > 0.97)
    assert_close(spectral_norm(matrices(0.5, shape=(12, 8))), [1.0, 2.0, 3.0], 1e-5)


def test_gradient_of_the_spectral_norm_is_the_outer_product_of_singular_vectors():
    delta = matrices(0.5)
    gradient = jax.grad(lambda x: jnp.sum(spectral_norm(x)))(delta)
    left, _, right = np.linalg.svd(np.asarray(delta, np.float64))
    assert_close(gradient, left[:, :, :1] * right[:, :1, :], 1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e3, 1e12])
def test_bounds_hold_and_spare_what_is_within(scale):
    delta = scale * matrices(0.5)
    clipped, shortened = bound(delta, CLIP), bound(delta, SPECTRAL)
    frobenius = np.linalg.norm(np.asarray(delta, np.float64), axis=(1, 2))
    assert_close(np.linalg.norm(clipped, axis=(1, 2)), np.minimum(frobenius, 0.5), 1e-5)
    assert_close(np.linalg.norm(shortened, 2, axis=(1, 2)), np.minimum(scale * np.array([1.0, 2, 3]), 0.5), 1e-4)
    if scale < 0.1:
        assert_same(clipped, delta)
        assert_same(shortened, delta)


def test_both_bounds_hold_together():
    both = ttt.UpdateRule(clip=0.6, spectral=0.5)
    bounded = np.asarray(bound(matrices(0.9), both))
    assert np.all(np.linalg.norm(bounded, axis=(1, 2)) <= 0.6 + 1e-5)
    assert np.all(np.linalg.norm(bounded, 2, axis=(1, 2)) <= 0.5 + 1e-4)


@pytest.mark.parametrize("update", [CLIP, SPECTRAL, ttt.UpdateRule(clip=0.5, spectral=0.5)])
def test_an_update_of_zero_stays_zero_with_a_finite_gradient(update):
    zero = jnp.zeros((2, 8, 12))
    value, pull = jax.vjp(lambda x: bound(x, update), zero)
    assert_same(value, 0.0)
    (gradient,) = pull(jnp.ones_like(zero))
    assert_same(gradient, 1.0)  # inside the bound the update is the identity


@pytest.mark.parametrize("update", [CLIP, SPECTRAL, ttt.UpdateRule(preserve_row_norm=True)])
def test_a_row_that_writes_nothing_trains_with_bounds(update):
    """Fresh initialisation: every target is zero, and gradients of everything are finite."""

    def total(v, w):
        output = ttt.fast_weight_projection(
            jnp.ones((1, 8, 3)), v, w, jnp.ones((1, 8), jnp.int32), chunk_tokens=2, eta=jnp.asarray(1.0),
            update=update,
        )  # fmt: skip
        return jnp.sum(jnp.square(output.o_BTD))

    dv, dw = jax.grad(total, argnums=(0, 1))(jnp.zeros((1, 8, 2)), jnp.ones((2, 3)))
    assert np.all(np.isfinite(dv))
    assert np.all(np.isfinite(dw))
    assert np.any(np.asarray(dv))


def test_row_scale_keeps_the_row_norms_of_w0():
    w, s = matrices(0.5, rows=1)[0], matrices(0.9)
    scaled = (np.asarray(w)[None] + np.asarray(s)) * np.asarray(row_scale(s, w))[:, :, None]
    assert_close(np.linalg.norm(scaled, axis=2), np.broadcast_to(np.linalg.norm(w, axis=1), (3, 8)), 1e-5)
    assert_same(row_scale(jnp.zeros_like(s), w), 1.0)
    assert np.all(np.isfinite(row_scale(-jnp.stack([w, w, w]), w)))
    assert_same(jax.grad(lambda s: jnp.sum(row_scale(s, w)))(s), 0.0)


def test_equal_rules_are_one_static_argument():
    assert ttt.UpdateRule(clip=0.5) == CLIP
    assert hash(ttt.UpdateRule(clip=0.5)) == hash(CLIP)
    assert not CLIP.is_plain_sum
    assert ttt.UpdateRule(preserve_row_norm=True).is_plain_sum
    assert Forgets(1.0) != ttt.UpdateRule(), "a rule of another class is another rule"
