"""The small parts of a decoder: parameters with named axes, norm, embedding, gated MLP, TTT parameters.

Every module may hold a stack of layers: ``stack=(L,)`` puts that axis in front of each parameter.

Letters: B row, T tokens, D model width, F feed-forward width, V vocabulary, L layers, W conv taps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from intttrain import ttt
from intttrain.config import ModelConfig
from intttrain.layout.sharding import constrain
from intttrain.model.linear import linear, lookup


def make_param(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: tuple[str, ...], stddev: float | None
) -> nnx.Param:
    """Returns an fp32 parameter with its logical axes: normal with ``stddev``, zeros for 0.0, ones for ``None``."""
    full = stack + shape
    if stddev is None:
        value = jnp.ones(full, jnp.float32)
    elif stddev == 0.0:
        value = jnp.zeros(full, jnp.float32)
    else:
        value = stddev * jax.random.normal(rngs.params(), full, jnp.float32)
    return nnx.Param(value, logical_axes=("layers",) * len(stack) + axes)


def rms_norm(x: Float[Array, "*B D"], scale_D: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Returns ``x / rms(x) * scale``; statistics in fp32, result in the dtype of ``x``."""
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    scale = scale_D.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale_D.shape)
    return unit.astype(x.dtype) * scale


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...] = ()):
        self.scale = make_param(rngs, stack, (config.d_model,), ("norm",), None)
        self.eps = config.norm_eps

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x_BTD, self.scale[...], self.eps)


class Embedding(nnx.Module):
    """A V x D table: token embeddings, or the output head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        self.weight = make_param(rngs, (), shape, ("vocab", "embed"), config.initializer_range)
        self.gradient_dtype = config.weight_gradient_dtype

    def __call__(self, tokens_BT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        return lookup(tokens_BT, self.weight, dtype, self.gradient_dtype)


class MLP(nnx.Module):
    """SwiGLU block. ``down`` is D x F: in a TTT layer it is the initial fast weight W0."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...] = ()):
        d, f, scale = config.d_model, config.d_ff, config.initializer_range
        self.gate = make_param(rngs, stack, (d, f), ("embed", "mlp"), scale)
        self.up = make_param(rngs, stack, (d, f), ("embed", "mlp"), scale)
        self.down = make_param(rngs, stack, (d, f), ("embed", "mlp"), scale)
        self.gradient_dtype = config.weight_gradient_dtype

    def activate(self, h_BTD: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Returns ``z = silu(h Wgate) * (h Wup)``."""
        gate_BTF = checkpoint_name(linear("btd,df->btf", h_BTD, self.gate, self.gradient_dtype), "mlp")
        up_BTF = checkpoint_name(linear("btd,df->btf", h_BTD, self.up, self.gradient_dtype), "mlp")
        return constrain(jax.nn.silu(gate_BTF) * up_BTF, "batch", "tokens", "mlp")

    def project(self, z_BTF: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """Returns ``W0 z``, fp32."""
        o_BTD = linear("btf,df->btd", z_BTF, self.down, self.gradient_dtype, jnp.dtype(jnp.float32))
        return constrain(o_BTD, "batch", "tokens", "width")


class TTTParams(nnx.Module):
    """What a TTT layer learns beside its MLP: the target convolution and projection.

    At initialisation nothing is written, so the model equals the one without TTT, while gradients still flow:
    the convolution is zero and the projection a random diagonal; without a convolution (``next_hidden``) the
    projection itself is zero.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...]):
        assert config.ttt is not None
        d = config.d_model
        self.has_conv = config.ttt.target != "next_hidden"
        self.chunk_tokens = config.ttt.chunk_tokens
        self.gradient_dtype = config.weight_gradient_dtype
        self.target = make_param(rngs, stack, (d, d), ("embed", "target"), 0.0)
        if self.has_conv:
            self.conv = make_param(rngs, stack, (ttt.CONV_TAPS, d), ("taps", "embed"), 0.0)
            diagonal = config.initializer_range * jax.random.normal(rngs.params(), (*stack, d), jnp.float32)
            self.target[...] = diagonal[..., :, None] * jnp.eye(d, dtype=jnp.float32).reshape(
                (1,) * len(stack) + (d, d)
            )

    def values(self, x_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns what the fast weight is taught, in whole rows and in decoding: ``ttt.make_targets`` of its source."""
        conv_WD = self.conv[...] if self.has_conv else None
        u_BTD = ttt.mix_neighbours(x_BTD, conv_WD, segment_ids_BT, self.chunk_tokens)
        return constrain(linear("btd,de->bte", u_BTD, self.target, self.gradient_dtype), "batch", "tokens", "width")
