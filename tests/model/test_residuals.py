"""What JAX keeps of a layer comes apart into arguments and residuals; a form that is not expected is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.model.layer_groups import plan_groups
from intttrain.model.residuals import split_residuals
from intttrain.model.train_layers import train_layers
from tests.ttt.cases import assert_close

X, W, SCALE = jnp.ones((3, 4)), jnp.arange(20.0).reshape(4, 5) / 20, jnp.float32(0.5)


def layer(x, weights, scale):
    """Keeps its input, its weight and one activation."""
    return jnp.tanh(x @ weights["w"]) * scale


def split(arguments=(X, {"w": W}, SCALE), function=layer):
    _, pull = jax.vjp(function, *arguments)
    return pull, *split_residuals(pull, arguments)


def test_only_what_is_no_argument_is_kept():
    """Should JAX hold copies of arguments one day, the weights of a model would be stored once more for every layer."""
    pull, pullback, residuals = split()
    assert W.shape in [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert residuals and {leaf.shape for leaf in residuals} == {(3, 5)}
    traced = jax.make_jaxpr(lambda *arguments: split(arguments)[2])(X, {"w": W}, SCALE)
    assert [out.shape for out in traced.out_avals] == [leaf.shape for leaf in residuals]
    assert sorted(number for number in pullback.argument_of if number is not None) == [0, 1, 2]


def test_the_recipe_takes_arguments_and_residuals_of_another_layer():
    arguments = 2.0 * X, {"w": W - 0.5}, SCALE + 1.0
    other_pull, _, residuals = split(arguments)
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    pullback = split()[1]
    pullback.check(residuals)
    found, wanted = pullback(arguments, residuals, cotangent), other_pull(cotangent)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for actual, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize(
    "change",
    [lambda kept: kept[:-1], lambda kept: [*kept, X], lambda kept: [kept[0].astype(jnp.bfloat16), *kept[1:]],
     lambda kept: [kept[0].T, *kept[1:]]],
    ids=["one less", "one more", "another dtype", "another shape"],
)  # fmt: skip
def test_another_form_is_refused_by_name(change):
    _, pullback, residuals = split()
    with pytest.raises(RuntimeError, match=rf"jax {jax.__version__} keeps .* where it kept .*float32\[3, 5\]"):
        pullback.check(change(residuals))


def test_a_layer_that_keeps_other_arrays_than_in_its_first_trace_is_refused():
    """Through ``train_layers``: here a function whose residuals differ from one trace to the next."""
    traces = []

    def unsteady(carry, shared, weights, _):
        traces.append(None)
        carry = jnp.sin(carry * weights)
        return (jnp.cos(carry) if len(traces) > 2 else carry), None

    with pytest.raises(RuntimeError, match="for the backward pass of a layer"):
        jax.grad(lambda x: train_layers(plan_groups(3, ()), unsteady, x, (), jnp.ones(3), None)[0])(1.0)


def test_the_recipe_is_compared_by_identity():
    """JAX compares static parts of a carry in every trace of a scan; a comparison by value would compare programs."""
    pullback = split()[1]
    assert pullback == pullback and pullback != dataclasses.replace(pullback)
