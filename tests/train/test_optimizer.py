"""Schedules at hand-computed points, AdamW against its formula, and the decay table."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from intttrain.config.training import AdamWConfig, CheckpointConfig, ScheduleConfig, TrainConfig
from intttrain.train import optimizer as optimizer_module
from intttrain.train.optimizer import clip_by_norm, decay_mask, make_optimizer, make_schedule


def train_config(kind: str = "cosine", **schedule: Any) -> TrainConfig:
    values = {"peak_learning_rate": 0.5, "warmup_steps": 4, "final_fraction": 0.1} | schedule
    return TrainConfig(
        num_steps=20, batch_rows=1, schedule=ScheduleConfig(kind=kind, **values),
        optimizer=AdamWConfig(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1), checkpoint=CheckpointConfig(),
    )  # fmt: skip


def abstract_params() -> dict[str, Any]:
    shapes = {
        "embed": {"weight": (7, 4)},
        "layers": {
            "attention_norm": {"scale": (2, 4)},
            "attention": {"q": (2, 4, 2, 2), "k": (2, 4, 1, 2), "v": (2, 4, 1, 2), "o": (2, 2, 2, 4),
                          "q_norm": (2, 2), "k_norm": (2, 2)},
            "mlp_norm": {"scale": (2, 4)},
            "mlp": {"gate": (2, 4, 3), "up": (2, 4, 3), "down": (2, 4, 3)},
        },
        "ttt": {"conv": (1, 5, 4), "target": (1, 4, 4)},
        "final_norm": {"scale": (4,)},
        "head": {"weight": (7, 4)},
    }  # fmt: skip
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), shapes, is_leaf=is_shape)


def random_like(abstract: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape).astype(np.float32)), abstract)


def test_cosine_at_hand_computed_points():
    schedule = make_schedule(train_config("cosine"))
    # warm-up 1/5, 2/5, ... of 0.5; cosine over 16 steps between 0.5 and 0.05
    expected = {
        0: 0.1,
        1: 0.2,
        3: 0.4,
        4: 0.5,
        8: 0.05 + 0.45 * (1 + math.sqrt(0.5)) / 2,
        12: 0.275,
        20: 0.05,
        99: 0.05,
    }
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-6), step


def test_wsd_at_hand_computed_points():
    schedule = make_schedule(train_config("wsd", decay_steps=10))
    expected = {0: 0.1, 3: 0.4, 4: 0.5, 9: 0.5, 10: 0.5, 11: 0.455, 15: 0.275, 19: 0.095, 20: 0.05, 50: 0.05}
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-6), step


def test_schedule_corner_cases_have_no_nan():
    assert float(make_schedule(train_config("wsd", decay_steps=0))(20)) == pytest.approx(0.5)
    assert float(make_schedule(train_config("cosine", warmup_steps=0))(0)) == pytest.approx(0.5)
    all_warmup = make_schedule(train_config("cosine", warmup_steps=20))
    assert float(all_warmup(20)) == pytest.approx(0.5) and float(all_warmup(0)) == pytest.approx(0.5 / 21)
    assert float(make_schedule(train_config("wsd", decay_steps=16))(4)) == pytest.approx(0.5)


def test_schedule_is_the_same_traced_and_returns_float32():
    schedule = make_schedule(train_config("cosine"))
    for step in (0, 4, 11):
        traced = jax.jit(schedule)(jnp.int32(step))
        assert traced.dtype == jnp.float32 and traced.shape == ()
        assert float(traced) == pytest.approx(float(schedule(step)), rel=1e-6)


def test_decay_mask_names_matrices_but_no_gains():
    mask = decay_mask(abstract_params())
    assert mask == {
        "embed": {"weight": True},
        "layers": {
            "attention_norm": {"scale": False},
            "attention": {"q": True, "k": True, "v": True, "o": True, "q_norm": False, "k_norm": False},
            "mlp_norm": {"scale": False},
            "mlp": {"gate": True, "up": True, "down": True},
        },
        "ttt": {"conv": False, "target": True},
        "final_norm": {"scale": False},
        "head": {"weight": True},
    }


def test_a_parameter_without_a_rule_is_an_error():
    params = abstract_params()
    params["layers"]["mlp"]["bias"] = jax.ShapeDtypeStruct((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"layers\.mlp\.bias is matched by no rule"):
        make_optimizer(train_config(), params)


def test_a_parameter_with_two_rules_is_an_error(monkeypatch):
    monkeypatch.setattr(optimizer_module, "DECAY_RULES", (*optimizer_module.DECAY_RULES, (r"ttt\..*", "no_decay")))
    with pytest.raises(ValueError, match=r"parameter ttt\.conv is matched by ttt\\.conv, ttt\\\.\.\*"):
        decay_mask(abstract_params())


def test_parameters_must_be_float32():
    params = abstract_params()
    params["ttt"]["conv"] = jax.ShapeDtypeStruct((1, 5, 4), jnp.bfloat16)
    with pytest.raises(TypeError, match=r"ttt\.conv is bfloat16"):
        make_optimizer(train_config(), params)


def test_two_steps_equal_adamw_written_out():
    config = train_config("cosine")
    params = random_like(abstract_params(), 0)
    optimizer = make_optimizer(config, abstract_params())
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    decays = jax.tree.leaves(decay_mask(abstract_params()))
    w = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    m, v = [np.zeros_like(x) for x in w], [np.zeros_like(x) for x in w]
    for t, learning_rate in ((1, 0.1), (2, 0.2)):
        grads = random_like(abstract_params(), t)
        params, opt_state = step(params, opt_state, grads)
        for i, g in enumerate(np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g**2
            adam = (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.95**t)) + 1e-8)
            w[i] = w[i] - learning_rate * (adam + (0.1 * w[i] if decays[i] else 0.0))
    for ours, expected in zip(jax.tree.leaves(params), w, strict=True):
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=2e-5, atol=1e-6)


def test_works_abstractly_and_with_donated_buffers():
    config, abstract = train_config(), abstract_params()
    optimizer = make_optimizer(config, abstract)
    abstract_state = jax.eval_shape(optimizer.init, abstract)
    arrays = [leaf for leaf in jax.tree.leaves(abstract_state) if leaf.shape]
    assert len(arrays) == 2 * len(jax.tree.leaves(abstract)) and all(leaf.dtype == jnp.float32 for leaf in arrays)
    params = random_like(abstract, 0)
    grads = random_like(abstract, 1)

    def step(params, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    expected = jax.jit(step)(params, optimizer.init(params))
    donated = jax.jit(step, donate_argnums=(0, 1))(params, optimizer.init(params))
    assert jax.tree.structure(donated[1]) == jax.tree.structure(abstract_state)
    for ours, other in zip(jax.tree.leaves(donated), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(other))


def test_weight_decay_zero_leaves_unused_parameters_alone():
    config = dataclasses.replace(train_config(), optimizer=AdamWConfig(weight_decay=0.0))
    params = random_like(abstract_params(), 0)
    optimizer = make_optimizer(config, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(updates))


def test_clip_by_norm():
    grads = {"a": jnp.array([3.0, 0.0], jnp.float32), "b": jnp.array([[4.0]], jnp.bfloat16)}
    clipped = clip_by_norm(grads, jnp.float32(5.0), 1.0)
    np.testing.assert_allclose(np.asarray(clipped["a"]), [0.6, 0.0], rtol=1e-6)
    assert clipped["b"].dtype == jnp.bfloat16 and float(clipped["b"][0, 0]) == pytest.approx(0.8, rel=1e-2)
    for norm in (0.0, 2.0, 5.0):
        within = clip_by_norm(grads, jnp.float32(norm), 5.0)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), within, grads)))
