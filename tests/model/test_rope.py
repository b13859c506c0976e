"""Rotary frequencies against numbers worked out by hand and against transformers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.config import Llama3Scaling, RopeConfig, YarnScaling
from intttrain.model.rope import rope_frequencies, rope_tables, rotate
from tests.ttt.cases import assert_close, assert_same

LLAMA3 = Llama3Scaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
YARN = YarnScaling(kind="yarn", factor=4.0, original_max_position=32768)
CONFIGS = {
    "default": RopeConfig(theta=1e6),
    "llama3": RopeConfig(theta=5e5, scaling=LLAMA3),
    "yarn": RopeConfig(theta=1e6, scaling=YARN),
    "yarn_betas": RopeConfig(
        theta=1e4,
        scaling=YarnScaling(kind="yarn", factor=2.5, original_max_position=2048, beta_fast=16.0, beta_slow=2.0),
    ),
}


def test_plain_frequencies_by_hand():
    frequencies, magnitude = rope_frequencies(RopeConfig(theta=10000.0), 8)
    assert_close(frequencies, [1.0, 0.1, 0.01, 0.001], 1e-7)
    assert magnitude == 1.0


def test_llama3_by_hand():
    """Wavelengths: 6.28 is kept (below 8192 / 4), above 8192 is divided by 8, in between is blended."""
    config = RopeConfig(theta=16.0**4, scaling=LLAMA3)
    frequencies, magnitude = rope_frequencies(config, 8)  # plain: 1, 1/16, 1/256, 1/4096
    rotations = 8192 / (2 * math.pi * 256)  # 5.09 turns: still fast
    assert rotations > 4
    turns = 8192 / (2 * math.pi * 4096)  # 0.32 turns: slow
    assert turns < 1
    assert_close(frequencies, [1, 1 / 16, 1 / 256, 1 / 4096 / 8], 1e-7)
    between = RopeConfig(theta=2000.0**4, scaling=LLAMA3)
    share = (8192 / (2 * math.pi * 2000) - 1) / (4 - 1) if 8192 / (2 * math.pi * 2000) > 1 else 0.0
    wanted = (1 - share) / 2000 / 8 + share / 2000
    assert_close(rope_frequencies(between, 8)[0][1], wanted, 1e-6)
    blended = RopeConfig(theta=600.0**4, scaling=LLAMA3)
    share = (8192 / (2 * math.pi * 600) - 1) / 3
    assert 0.3 < share < 0.5
    assert_close(rope_frequencies(blended, 8)[0][1], (1 - share) / 600 / 8 + share / 600, 1e-6)
    assert magnitude == 1.0


def test_yarn_by_hand():
    """Channel 0 turns often and is kept, the last turns less than once and is divided by the factor."""
    frequencies, magnitude = rope_frequencies(RopeConfig(theta=1e6, scaling=YARN), 128)
    plain, _ = rope_frequencies(RopeConfig(theta=1e6), 128)
    assert_same(frequencies[:20], plain[:20])
    assert_close(frequencies[-20:], plain[-20:] / 4, 1e-6)
    assert np.all(np.diff(frequencies / plain) <= 1e-7)
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.hf
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_equal_to_transformers(name, head_dim):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    parameters = {"rope_type": "default", "rope_theta": config.theta}
    match config.scaling:
        case Llama3Scaling() as s:
            parameters |= {
                "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_max_position,
            }  # fmt: skip
        case YarnScaling() as s:
            parameters |= {
                "rope_type": "yarn", "factor": s.factor, "beta_fast": s.beta_fast, "beta_slow": s.beta_slow,
                "original_max_position_embeddings": s.original_max_position,
            }  # fmt: skip
    original = config.scaling.original_max_position if config.scaling else 4096
    factor = config.scaling.factor if config.scaling else 1
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=parameters,
        max_position_embeddings=int(original * factor),
    )  # fmt: skip
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module = LlamaRotaryEmbedding(theirs)
    frequencies, magnitude = rope_frequencies(config, head_dim)
    np.testing.assert_allclose(frequencies, module.inv_freq.numpy(), rtol=2e-6)
    assert magnitude == pytest.approx(float(module.attention_scaling))


def test_rotation_is_by_position_times_frequency():
    config = RopeConfig(theta=10000.0)
    positions = jnp.asarray([[0, 3, 5]], jnp.int32)
    cos, sin = rope_tables(config, 4, positions)
    assert cos.shape == sin.shape == (1, 3, 2)
    x = jnp.asarray([[[[1.0, 2.0, 3.0, 4.0]]] * 3]).reshape(1, 3, 1, 4)
    turned = np.asarray(rotate(x, (cos, sin)))[0, :, 0]
    for row, position in zip(turned, (0, 3, 5), strict=True):
        for pair, frequency in enumerate((1.0, 0.01)):
            number = complex(1.0 + pair, 3.0 + pair) * np.exp(1j * position * frequency)
            assert_close([row[pair], row[pair + 2]], [number.real, number.imag], 1e-6)


def test_yarn_scales_the_tables():
    positions = jnp.asarray([[0]], jnp.int32)
    cos, sin = rope_tables(RopeConfig(theta=1e6, scaling=YARN), 8, positions)
    assert_close(cos, np.full((1, 1, 4), 0.1 * math.log(4) + 1), 1e-6)
    assert_same(sin, 0.0)


def test_scores_depend_on_distance_only():
    config = RopeConfig(theta=100.0)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at_query, at_key):
        turned = [
            rotate(x, rope_tables(config, 8, jnp.asarray([[at]], jnp.int32)))[0, 0, 0]
            for x, at in ((q, at_query), (k, at_key))
        ]
        return float(jnp.dot(*turned))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_bf16_is_rotated_in_fp32():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    tables = rope_tables(RopeConfig(theta=100.0), 4, jnp.asarray([[9]], jnp.int32))
    turned = rotate(x, tables)
    assert turned.dtype == jnp.bfloat16
    assert_same(turned, rotate(x.astype(jnp.float32), tables).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_that_of_the_formula(dtype):
    rng = np.random.default_rng(0)
    x, out = (jnp.asarray(rng.standard_normal((2, 3, 2, 8)), dtype) for _ in range(2))
    tables = rope_tables(RopeConfig(theta=100.0), 8, jnp.asarray([[0, 1, 2], [5, 6, 40]], jnp.int32))

    def formula(x_BTNH):
        cos, sin = (table[:, :, None, :] for table in tables)
        low, high = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(dtype)

    value, pull = jax.vjp(lambda x: rotate(x, tables), x)
    wanted, pull_wanted = jax.vjp(formula, x)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    assert_close(value, wanted, tolerance)
    assert_close(pull(out)[0], pull_wanted(out)[0], tolerance)
