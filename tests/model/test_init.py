"""Initial values, dtypes, axis names, and the recomputation policies."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.model import abstract_params, init_params, logical_axes
from tests.model.tiny import TINY, hidden, init, leaves, loss_and_gradients, random_params, rows, with_ttt
from tests.ttt.cases import assert_close, assert_same

BATCH = rows((13, 19), (5, 9, -2, 16))
WIDE = dataclasses.replace(TINY, d_model=32, d_ff=48, initializer_range=0.1)


def test_every_parameter_starts_as_documented():
    params = leaves(init(WIDE, jax.random.key(0)))
    for name, leaf in params.items():
        assert leaf.dtype == np.float32
        if "norm" in name:
            assert_same(leaf, 1.0, name)
        elif name == "ttt.conv":
            assert_same(leaf, 0.0, name)
        elif name != "ttt.target":
            # Normal with standard deviation 0.1; four standard errors of its estimate.
            assert abs(leaf.std() / 0.1 - 1) < 4 / np.sqrt(2 * leaf.size), name
            assert abs(leaf.mean()) < 4 * 0.1 / np.sqrt(leaf.size), name
    for target_DD in params["ttt.target"]:
        diagonal = np.diag(target_DD)
        assert_same(target_DD - np.diag(diagonal), 0.0)
        assert np.all(diagonal != 0)
        assert 0.05 < diagonal.std() < 0.2
    assert not np.array_equal(*params["ttt.target"])


def test_next_hidden_has_no_taps_and_starts_from_a_zero_projection():
    params = leaves(init(with_ttt(WIDE, target="next_hidden"), jax.random.key(0)))
    assert "ttt.conv" not in params
    assert_same(params["ttt.target"], 0.0)


@pytest.mark.parametrize("target", ["input_embed", "hidden_states", "next_hidden"])
def test_a_fresh_model_can_learn_to_write(target):
    """Some TTT parameter has a gradient at the start, else nothing would ever be written."""
    config = with_ttt(TINY, target=target)
    _, grads = loss_and_gradients(config, init(config, jax.random.key(0)), *BATCH)
    first = "target" if target == "next_hidden" else "conv"
    assert np.all(np.any(np.asarray(grads["ttt"][first]) != 0, axis=(1, 2)))


def test_the_same_key_gives_the_same_parameters():
    one, two, other = (leaves(init(TINY, jax.random.key(seed))) for seed in (3, 3, 4))
    for name in one:
        assert_same(one[name], two[name], name)
    assert np.any(one["layers.mlp.down"] != other["layers.mlp.down"])
    assert np.any(one["layers.mlp.down"][0] != one["layers.mlp.down"][1]), "layers differ"


@pytest.mark.parametrize("changes", [{}, {"ttt": None}, {"family": "llama", "tie_embeddings": False}])
def test_shapes_and_axis_names_agree(changes):
    config = dataclasses.replace(TINY, **changes)
    abstract = abstract_params(config)
    axes = logical_axes(config)
    assert jax.tree.structure(abstract) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for leaf, name in zip(jax.tree.leaves(abstract), names, strict=True):
        assert len(leaf.shape) == len(name)
    real = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert ("head" in abstract) == (not config.tie_embeddings)
    assert ("q_norm" in abstract["layers"]["attention"]) == (config.family == "qwen3")


def test_remat_policies_change_the_program_not_the_results():
    wanted_loss, wanted = loss_and_gradients(TINY, random_params(TINY), *BATCH)
    programs = {loss_and_gradients.lower(TINY, random_params(TINY), *BATCH).as_text()}
    for policy in ("full", "dots", "attention"):
        config = dataclasses.replace(TINY, remat=policy)
        loss, grads = loss_and_gradients(config, random_params(TINY), *BATCH)
        assert_close(loss, wanted_loss, 1e-6, policy)
        expected = leaves(wanted)
        for name, gradient in leaves(grads).items():
            assert_close(gradient, expected[name], 1e-5, f"{policy} {name}")
        programs.add(loss_and_gradients.lower(config, random_params(TINY), *BATCH).as_text())
    assert len(programs) == 4, "guards the comparison: the policies are different programs"


def test_bf16_computes_in_bf16_and_learns_in_fp32():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    params = random_params(TINY)
    state = hidden(config, params, BATCH)
    assert state.dtype == jnp.bfloat16
    loss, grads = loss_and_gradients(config, params, *BATCH)
    assert loss.dtype == jnp.float32
    for name, gradient in leaves(grads).items():
        assert gradient.dtype == np.float32, name
        assert np.all(np.isfinite(gradient)), name
    wanted, _ = loss_and_gradients(TINY, params, *BATCH)
    assert abs(float(loss / wanted) - 1) < 0.05  # two layers of matmuls rounded to 8 bits each
