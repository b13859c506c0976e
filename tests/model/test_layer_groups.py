"""Stacked layers as scans: every layer once, in order, with the right inputs, in a program that does not grow."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.model import abstract_params
from intttrain.model.layer_groups import plan_groups, scan_layers
from tests.model.tiny import TINY, run, with_ttt
from tests.ttt.cases import assert_close, assert_same

SETS = [
    (12, ()),
    (12, (0,)),
    (12, (11,)),
    (12, (1, 3)),
    (12, tuple(range(12))),
    (12, (0, 3, 4, 11)),
    (12, (0, 6)),
    (12, (0, 1, 6, 7)),
    (12, (0, 3, 4, 6, 9, 10)),  # two runs of TTT layers inside the repeated group
    (7, (0, 3, 6)),
    (1, (0,)),
    (1, ()),
]


def unrolled(groups):
    """The kind of every layer, as the groups say it."""
    return [
        run.has_ttt for group in groups for _ in range(group.repeats) for run in group.runs for _ in range(run.length)
    ]


def random_sets(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        layers = int(rng.integers(1, 30))
        if rng.random() < 0.5:
            yield layers, tuple(range(int(rng.integers(0, 3)), layers, int(rng.integers(1, 7))))
        else:
            yield layers, tuple(np.flatnonzero(rng.random(layers) < rng.random()).tolist())


def test_plans_cover_every_layer_in_order():
    for layers, ttt in [*SETS, *random_sets(300)]:
        groups = plan_groups(layers, ttt)
        assert unrolled(groups) == [layer in ttt for layer in range(layers)], (layers, ttt)
        assert sum(group.repeats * group.layers for group in groups) == layers
        assert sum(group.repeats * group.ttt_layers for group in groups) == len(ttt)
        for group in groups:
            assert all(one.has_ttt != two.has_ttt for one, two in zip(group.runs, group.runs[1:], strict=False))


@pytest.mark.parametrize("layers", [12, 24, 36, 48])
def test_every_sixth_is_one_stage(layers):
    assert len(plan_groups(layers, tuple(range(0, layers, 6)))) == 1
    assert len(plan_groups(layers, ())) == 1


def block(carry, layer, ttt):
    """Order matters (x -> a x + b), and TTT layers add a term of their own."""
    out = layer["a"] * carry + layer["b"]
    if ttt is None:
        return jnp.tanh(out), {"seen": out}, None
    return jnp.tanh(out + ttt["c"] * carry), {"seen": out}, {"written": out * ttt["c"]}


def stacks(layers, ttts):
    rng = np.random.default_rng(layers)
    shapes = {"a": layers, "b": layers, "c": ttts}
    a, b, c = (jnp.asarray(rng.standard_normal((n, 3)), jnp.float32) for n in shapes.values())
    return {"a": a, "b": b}, {"c": c}


def python_loop(ttt_layers, carry, layer_inputs, ttt_inputs):
    seen, written = [], []
    for layer in range(layer_inputs["a"].shape[0]):
        ttt = None
        if layer in ttt_layers:
            ttt = jax.tree.map(lambda x: x[len(written)], ttt_inputs)
        carry, layer_out, ttt_out = block(carry, jax.tree.map(lambda x: x[layer], layer_inputs), ttt)  # noqa: B023
        seen.append(layer_out["seen"])
        if ttt_out is not None:
            written.append(ttt_out["written"])
    return carry, jnp.stack(seen), jnp.stack(written) if written else None


@pytest.mark.parametrize(("layers", "ttt"), SETS)
def test_scans_equal_a_loop_in_value_and_gradient(layers, ttt):
    layer_inputs, ttt_inputs = stacks(layers, len(ttt))
    carry = jnp.asarray([0.1, -0.2, 0.3])

    def scanned(layer_inputs, ttt_inputs):
        end, layer_out, ttt_out = scan_layers(plan_groups(layers, ttt), block, carry, layer_inputs, ttt_inputs)
        return jnp.sum(end) + jnp.sum(jnp.sin(layer_out["seen"])), (end, layer_out, ttt_out)

    def looped(layer_inputs, ttt_inputs):
        end, seen, written = python_loop(ttt, carry, layer_inputs, ttt_inputs)
        return jnp.sum(end) + jnp.sum(jnp.sin(seen)), (end, seen, written)

    options = {"xla_backend_optimization_level": 0}
    grads, (end, layer_out, ttt_out) = jax.jit(
        jax.grad(scanned, argnums=(0, 1), has_aux=True), compiler_options=options
    )(layer_inputs, ttt_inputs)
    wanted_grads, (wanted_end, seen, written) = jax.grad(looped, argnums=(0, 1), has_aux=True)(layer_inputs, ttt_inputs)
    assert_close(end, wanted_end, 1e-5)
    assert_close(layer_out["seen"], seen, 1e-5)
    if ttt:
        assert_close(ttt_out["written"], written, 1e-5)
    else:
        assert ttt_out is None
    for actual, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert_close(actual, wanted, 1e-5)


def test_layers_that_return_nothing_give_nothing():
    groups = plan_groups(3, (1,))
    end, layer_out, ttt_out = scan_layers(
        groups, lambda carry, layer, ttt: (carry + layer, None, None), jnp.zeros(()), jnp.arange(3.0), jnp.zeros((1,))
    )
    assert_same(end, 3.0)
    assert layer_out is None
    assert ttt_out is None


def program_size(layers, ttt_layers):
    config = with_ttt(dataclasses.replace(TINY, num_layers=layers), layers=ttt_layers)
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    return len(run.lower(config, abstract_params(config), ids, ids, ids, jnp.float32(0)).as_text())


def test_the_program_does_not_grow_with_depth():
    """Every sixth of 12, 24 and 48 layers lower to the same program but for the digits of its shapes."""
    sizes = [program_size(layers, tuple(range(0, layers, 6))) for layers in (12, 24, 48)]
    assert max(sizes) < 1.01 * min(sizes), sizes
    assert program_size(12, (0, 3, 4, 11)) > 1.5 * sizes[0], "the measurement sees a program that has more groups"
