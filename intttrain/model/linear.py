"""Multiplies with stored weights: gathers them before the product, and sums their gradients over devices after it.

A weight is stored fp32, each device holding a piece (``layout/sharding.py``). Every product with one goes through this
module, but for the fast weight's (``ttt/shards.py``), with a backward pass of our own, for three reasons
(``docs/decisions/0005``):

- It casts the piece first and gathers then, so that bf16 travels, half the bytes of fp32.
- It gathers again for the backward pass instead of keeping the whole weight between the two.
- It sums the gradient over devices in a stated dtype. The gradient that JAX derives is summed in the dtype of the
  matmul's inputs, bf16: each device's part would be rounded before the sum.

Letters: B row, T tokens, D model width, V vocabulary; lower case is a device's part.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from intttrain.layout.axes import GATHERED
from intttrain.layout.sharding import (
    constrain,
    gather_pieces,
    per_device,
    position_on,
    sum_gradient,
    sum_over,
)

Axes = tuple[str | None, ...]

# Logical names of dims, in the place of arrays.
_TOKENS, _ROWS, _TABLE = ("batch", "tokens"), ("batch", "tokens", "width"), ("vocab", "embed")


def axes_of(weight: nnx.Param) -> Axes:
    """Returns the logical names of a weight's dims, without that of the stack of layers from which it was taken."""
    names: Axes = weight.get_metadata()["logical_axes"]
    return names[len(names) - weight[...].ndim :]


def linear(
    equation: str, x: Float[Array, "..."], weight: nnx.Param, gradient_dtype: str, out_dtype: jnp.dtype | None = None
) -> Float[Array, "..."]:
    """Returns ``einsum(equation, x, weight)`` with the weight cast to the dtype of ``x``.

    Args:
      equation: einsum of two operands in which every index occurs in two of the three terms, so that the same three
        terms in another order give both gradients.
      x: activations.
      weight: an fp32 parameter.
      gradient_dtype: dtype in which the gradient of the weight is computed and summed over devices.
      out_dtype: dtype of the result; that of ``x`` by default.
    """
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    return _linear(equation, axes_of(weight), jnp.dtype(gradient_dtype), dtype, x, weight[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _linear(
    equation: str, axes: Axes, gradient_dtype: jnp.dtype, out_dtype: jnp.dtype, x: jax.Array, weight: jax.Array
) -> jax.Array:
    return jnp.einsum(equation, x, gather(weight, axes, x.dtype), preferred_element_type=out_dtype)


def _linear_forward(
    equation: str, axes: Axes, gradient_dtype: jnp.dtype, out_dtype: jnp.dtype, x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear(equation, axes, gradient_dtype, out_dtype, x, weight), (x, weight)


def _linear_backward(
    equation: str, axes: Axes, gradient_dtype: jnp.dtype, out_dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    x, weight = residuals  # the stored piece; the whole weight is gathered again
    x_term, weight_term, y_term = equation.replace("->", ",").split(",")
    dy = dy.astype(x.dtype)
    dx = jnp.einsum(f"{y_term},{weight_term}->{x_term}", dy, gather(weight, axes, x.dtype))
    dweight = jnp.einsum(f"{x_term},{y_term}->{weight_term}", x, dy, preferred_element_type=gradient_dtype)
    return dx, constrain(dweight, *axes).astype(weight.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def gather(weight: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """Returns the weight in ``dtype``, whole along the dims that are stored in pieces.

    The first constraint says that the cast weight lies in pieces as well; without it the partitioner is free to gather
    fp32 and cast afterwards.
    """
    stored = constrain(weight.astype(dtype), *axes)
    return constrain(stored, *(None if axis in GATHERED else axis for axis in axes))


def whole_table(weight_vd: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns this device's part of a table's rows in ``dtype``, whole along D; to be called inside ``per_device``."""
    return gather_pieces(weight_vd.astype(dtype), "embed", 1)


def table_gradient(dtable_vD: jax.Array, gradient_dtype: str) -> jax.Array:
    """Returns this device's stored piece of a table's gradient; to be called inside ``per_device``.

    Args:
      dtable_vD: gradient from this device's tokens alone.
      gradient_dtype: dtype of the sum over devices.
    """
    return sum_gradient(dtable_vD.astype(gradient_dtype), *_TABLE)


def lookup(
    tokens_BT: Int[Array, "B T"], weight: nnx.Param, dtype: jnp.dtype, gradient_dtype: str
) -> Float[Array, "B T D"]:
    """Returns the embeddings of tokens: rows of the table ``weight`` (V D) in ``dtype``.

    The gradient of a row sums over all tokens that have it: in fp32 on each device, in ``gradient_dtype`` over devices.
    """
    return _lookup(jnp.dtype(dtype), gradient_dtype, tokens_BT, weight[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(dtype: jnp.dtype, gradient_dtype: str, tokens_BT: jax.Array, weight_VD: jax.Array) -> jax.Array:
    def local(tokens_bt: jax.Array, weight_vd: jax.Array) -> jax.Array:
        table_vD = whole_table(weight_vd, dtype)
        found_btD = table_vD.at[_ids(tokens_bt, weight_vd)].get(mode="fill", fill_value=0)
        return sum_over(found_btD, "vocab")  # the device that holds the token's row found it, the others have zeros

    return per_device(local, (_TOKENS, _TABLE), _ROWS)(tokens_BT, weight_VD)


def _ids(tokens_bt: jax.Array, weight_vd: jax.Array) -> jax.Array:
    """Returns the row of each token in this device's part of the table, one past the end if another device has it."""
    part = weight_vd.shape[0]
    ids_bt = tokens_bt - position_on("vocab") * part
    return jnp.where((ids_bt >= 0) & (ids_bt < part), ids_bt, part)


def _lookup_forward(
    dtype: jnp.dtype, gradient_dtype: str, tokens_BT: jax.Array, weight_VD: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _lookup(dtype, gradient_dtype, tokens_BT, weight_VD), (tokens_BT, weight_VD)


def _lookup_backward(
    dtype: jnp.dtype, gradient_dtype: str, residuals: tuple[jax.Array, jax.Array], dx_BTD: jax.Array
) -> tuple[None, jax.Array]:
    def local(tokens_bt: jax.Array, weight_vd: jax.Array, dx_btD: jax.Array) -> jax.Array:
        zeros_vD = jnp.zeros((weight_vd.shape[0], dx_btD.shape[2]), jnp.float32)
        dtable_vD = zeros_vD.at[_ids(tokens_bt, weight_vd)].add(dx_btD.astype(jnp.float32), mode="drop")
        return table_gradient(dtable_vD, gradient_dtype).astype(weight_vd.dtype)

    tokens_BT, weight_VD = residuals
    return None, per_device(local, (_TOKENS, _TABLE, _ROWS), _TABLE)(tokens_BT, weight_VD, dx_BTD)


_lookup.defvjp(_lookup_forward, _lookup_backward)
