"""Rotary position embedding, rotating halves, with the frequency scalings of Llama 3.1 and YaRN.

Letters: B row, T tokens, N heads, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from intttrain.config import Llama3Scaling, RopeConfig, YarnScaling

RopeTables = tuple[Float[Array, "B T h"], Float[Array, "B T h"]]  # cos and sin, h = H / 2


def rope_tables(config: RopeConfig, head_dim: int, positions_BT: Int[Array, "B T"]) -> RopeTables:
    """Returns fp32 cosines and sines for every position."""
    frequencies_h, magnitude = rope_frequencies(config, head_dim)
    angles_BTh = positions_BT.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies_h)[None, None, :]
    return jnp.cos(angles_BTh) * magnitude, jnp.sin(angles_BTh) * magnitude


@jax.custom_vjp
def rotate(x_BTNH: Float[Array, "B T N H"], tables: RopeTables) -> Float[Array, "B T N H"]:
    """Returns ``x`` rotated by its position; computed in fp32, returned in the dtype of ``x``.

    The tables are constants to differentiation.
    """
    cos_BT1H, sin_BT1H = (jnp.concatenate([table, table], axis=-1)[:, :, None, :] for table in tables)
    return (x_BTNH.astype(jnp.float32) * cos_BT1H + _quarter_turn(x_BTNH) * sin_BT1H).astype(x_BTNH.dtype)


def _rotate_forward(x_BTNH: jax.Array, tables: RopeTables) -> tuple[jax.Array, RopeTables]:
    return rotate(x_BTNH, tables), tables


def _rotate_backward(tables: RopeTables, grad_BTNH: jax.Array) -> tuple[jax.Array, None]:
    """The gradient of a rotation is the rotation by the opposite angle."""
    cos, sin = tables
    return rotate(grad_BTNH, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def _quarter_turn(x_BTNH: jax.Array) -> jax.Array:
    """Returns (-high, low) of x = (low, high), fp32.

    As a product with a signed permutation, which is exact: cutting the last axis in halves of 64 leaves half of a TPU's
    lanes empty.
    """
    half = x_BTNH.shape[-1] // 2
    zero, one = np.zeros((half, half)), np.eye(half)
    turn_HH = jnp.asarray(np.block([[zero, one], [-one, zero]]), x_BTNH.dtype)
    return jnp.einsum(
        "btnh,hk->btnk", x_BTNH, turn_HH, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def rope_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each pair of channels (fp32, head_dim / 2) and the factor on cos and sin."""
    exponents_h = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain_h = 1.0 / config.theta**exponents_h
    match config.scaling:
        case None:
            scaled_h, magnitude = plain_h, 1.0
        case Llama3Scaling():
            scaled_h, magnitude = _llama3(config.scaling, plain_h), 1.0
        case YarnScaling():
            scaled_h = _yarn(config.scaling, plain_h, config.theta)
            magnitude = 0.1 * math.log(config.scaling.factor) + 1.0 if config.scaling.factor > 1 else 1.0
    return scaled_h.astype(np.float32), magnitude


def _llama3(scaling: Llama3Scaling, plain_h: np.ndarray) -> np.ndarray:
    """Divides slow frequencies by ``factor`` and blends linearly (in rotations per context) up to the fast ones."""
    rotations_h = scaling.original_max_position * plain_h / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast_h = np.clip((rotations_h - low) / (high - low), 0.0, 1.0)
    return (1 - fast_h) * plain_h / scaling.factor + fast_h * plain_h


def _yarn(scaling: YarnScaling, plain_h: np.ndarray, theta: float) -> np.ndarray:
    """Interpolates channels that turn less than ``beta_slow`` times, keeps those above ``beta_fast``."""
    half = plain_h.size

    def channel_of(rotations: float) -> float:
        return half * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(channel_of(scaling.beta_fast)), 0)
    last = min(math.ceil(channel_of(scaling.beta_slow)), 2 * half - 1)
    slow_h = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return slow_h * plain_h / scaling.factor + (1 - slow_h) * plain_h
