"""The layers with their own gradient equal a Python loop, whatever is kept, and nothing is copied between stacks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from intttrain.model.layer_groups import plan_groups
from intttrain.model.train_layers import train_layers
from tests.ttt.cases import assert_close

SETS = [(1, ()), (5, ()), (3, (1,)), (12, (0, 6)), (12, (5, 11)), (7, (0, 3, 4)), (13, (0, 6, 12)), (4, (0, 1, 2, 3))]
KEEP = {
    "everything": lambda block: block,
    "nothing": jax.checkpoint,
    "a name": lambda block: jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names("product")),
}


def block(carry, shared, layer, ttt):
    """Order matters (x -> a x + b), TTT layers add a term of their own, and every layer sees what is shared."""
    factor, whole, offset = shared
    out = checkpoint_name(layer["a"] * carry["x"], "product") + layer["b"] * factor + whole[0].astype(jnp.float32)
    if ttt is None:
        return {"x": jnp.tanh(out)}, None
    mixed = jnp.tanh(out + ttt["c"] * carry["x"] * factor + offset)
    return {"x": mixed}, {"written": jax.lax.stop_gradient(mixed * ttt["c"])}


def inputs(layers, ttts):
    rng = np.random.default_rng(layers)
    a, b, c = (jnp.asarray(rng.standard_normal((n, 3)), jnp.float32) for n in (layers, layers, ttts))
    shared = jnp.asarray(0.7), jnp.asarray([1, 2], jnp.int32), jnp.asarray([0.1, 0.2, -0.3])
    return {"x": jnp.asarray([0.1, -0.2, 0.3])}, shared, {"a": a, "b": b}, {"c": c}


def python_loop(ttt_layers, carry, shared, layer_inputs, ttt_inputs):
    written = []
    for layer in range(layer_inputs["a"].shape[0]):
        at = len(written)
        ttt = jax.tree.map(lambda x: x[at], ttt_inputs) if layer in ttt_layers else None  # noqa: B023
        carry, output = block(carry, shared, jax.tree.map(lambda x: x[layer], layer_inputs), ttt)  # noqa: B023
        if output is not None:
            written.append(output["written"])
    return carry, jnp.stack(written) if written else None


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize(("layers", "ttt"), SETS)
def test_value_and_gradient_equal_a_loop(layers, ttt, keep):
    carry, shared, layer_inputs, ttt_inputs = inputs(layers, len(ttt))

    def trained(carry, factor, offset, *rest):
        groups = plan_groups(layers, ttt)
        end, out = train_layers(groups, KEEP[keep](block), carry, (factor, shared[1], offset), *rest)
        return jnp.sum(jnp.sin(end["x"])), (end["x"], None if out is None else out["written"])

    def looped(carry, factor, offset, *rest):
        end, out = python_loop(ttt, carry, (factor, shared[1], offset), *rest)
        return jnp.sum(jnp.sin(end["x"])), (end["x"], out)

    arguments = (carry, shared[0], shared[2], layer_inputs, ttt_inputs)
    options = {"xla_backend_optimization_level": 0}
    found = jax.jit(jax.grad(trained, argnums=range(5), has_aux=True), compiler_options=options)(*arguments)
    wanted = jax.grad(looped, argnums=range(5), has_aux=True)(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for actual, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(actual, expected, 1e-5)
    without_gradient = trained(*arguments)[1]
    assert_close(without_gradient[0], wanted[1][0], 1e-5)
