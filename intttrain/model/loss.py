"""Next-token losses without ever holding the logits of a whole row.

Every device works on the tokens and the part of the vocabulary that it holds. The output head is gathered once forward
and once backward, and its gradient is summed over blocks first and over devices once, at the end.

Letters: B row, T tokens, c tokens per block, J blocks, D model width, V vocabulary; lower case is a device's part.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from intttrain.layout.sharding import differing, max_over, per_device, position_on, sum_over
from intttrain.model.linear import table_gradient, whole_table

_HIDDEN, _TOKENS, _TABLE = ("batch", "tokens", "width"), ("batch", "tokens"), ("vocab", "embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_nll(
    hidden_BTD: Float[Array, "B T D"],
    weight_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    block_tokens: int,
    gradient_dtype: str = "float32",
) -> Float[Array, "B T"]:
    """Returns the fp32 negative log-likelihood (nats) of every label.

    Args:
      hidden_BTD: final hidden states, in the dtype of the matmul.
      weight_VD: the fp32 output head.
      labels_BT: token ids below V.
      block_tokens: logits exist for this many positions of each row at a time on every device, forward and backward
        (where each block is computed again).
      gradient_dtype: in which the gradient of the head is summed over devices; over blocks it is summed in fp32.
    """
    return _forward(hidden_BTD, weight_VD, labels_BT, block_tokens, gradient_dtype)[0]


def _forward(
    hidden_BTD: jax.Array, weight_VD: jax.Array, labels_BT: jax.Array, block_tokens: int, gradient_dtype: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def local(hidden_btD: jax.Array, weight_vd: jax.Array, labels_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        table_vD = whole_table(weight_vd, hidden_btD.dtype)

        def block(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_bcD, labels_bc = inputs
            logits_bcv = _logits(hidden_bcD, table_vD)
            largest_bc = max_over(jnp.max(logits_bcv, axis=2), "vocab")
            total_bc = sum_over(jnp.sum(jnp.exp(logits_bcv - largest_bc[:, :, None]), axis=2), "vocab")
            chosen_bcv = jnp.where(_is_label(labels_bc, logits_bcv), logits_bcv, 0.0)
            chosen_bc = sum_over(jnp.sum(chosen_bcv, axis=2), "vocab")
            lse_bc = jnp.log(total_bc) + largest_bc
            return lse_bc - chosen_bc, lse_bc

        results_Jbc = jax.lax.map(block, tuple(_cut(x, block_tokens) for x in (hidden_btD, labels_bt)))
        nll_bt, lse_bt = (_join(x_Jbc, labels_bt.shape[1]) for x_Jbc in results_Jbc)
        return nll_bt, lse_bt

    with jax.named_scope("loss"):
        nll_BT, lse_BT = per_device(local, (_HIDDEN, _TABLE, _TOKENS), (_TOKENS, _TOKENS))(
            hidden_BTD, weight_VD, labels_BT
        )
    return nll_BT, (hidden_BTD, weight_VD, labels_BT, lse_BT)


def _backward(
    block_tokens: int, gradient_dtype: str, residuals: tuple[jax.Array, ...], dnll_BT: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    def local(
        hidden_btD: jax.Array, weight_vd: jax.Array, labels_bt: jax.Array, lse_bt: jax.Array, dnll_bt: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        table_vD = whole_table(weight_vd, hidden_btD.dtype)

        def block(dtable_vD: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            hidden_bcD, labels_bc, lse_bc, dnll_bc = inputs
            logits_bcv = _logits(hidden_bcD, table_vD)
            share_bcv = jnp.exp(logits_bcv - lse_bc[:, :, None])
            share_bcv -= _is_label(labels_bc, logits_bcv).astype(jnp.float32)
            dlogits_bcv = (share_bcv * dnll_bc[:, :, None]).astype(hidden_bcD.dtype)
            dhidden_bcD = jnp.einsum("bcv,vd->bcd", dlogits_bcv, table_vD)
            dtable_vD += jnp.einsum("bcv,bcd->vd", dlogits_bcv, hidden_bcD, preferred_element_type=jnp.float32)
            return dtable_vD, sum_over(dhidden_bcD, "vocab")

        inputs = tuple(_cut(x, block_tokens) for x in (hidden_btD, labels_bt, lse_bt, dnll_bt))
        zeros_vD = differing(jnp.zeros(table_vD.shape, jnp.float32), "batch", "tokens", "vocab")
        dtable_vD, dhidden_JbcD = jax.lax.scan(block, zeros_vD, inputs)
        dweight_vd = table_gradient(dtable_vD, gradient_dtype)
        return _join(dhidden_JbcD, hidden_btD.shape[1]), dweight_vd.astype(weight_vd.dtype)

    with jax.named_scope("loss"):
        dhidden_BTD, dweight_VD = per_device(local, (_HIDDEN, _TABLE, _TOKENS, _TOKENS, _TOKENS), (_HIDDEN, _TABLE))(
            *residuals, dnll_BT
        )
    return dhidden_BTD, dweight_VD, None


token_nll.defvjp(_forward, _backward)


def prediction_entropy(
    hidden_BTD: Float[Array, "B T D"], weight_VD: Float[Array, "V D"], block_tokens: int
) -> Float[Array, "B T"]:
    """Returns the fp32 entropy (nats) of what each hidden state predicts; arguments as in ``token_nll``."""

    def local(hidden_btD: jax.Array, weight_vd: jax.Array) -> jax.Array:
        table_vD = whole_table(weight_vd, hidden_btD.dtype)

        def block(hidden_bcD: jax.Array) -> jax.Array:
            logits_bcv = _logits(hidden_bcD, table_vD)
            largest_bc = max_over(jnp.max(logits_bcv, axis=2), "vocab")
            share_bcv = jnp.exp(logits_bcv - largest_bc[:, :, None])
            total_bc = sum_over(jnp.sum(share_bcv, axis=2), "vocab")
            mean_bc = sum_over(jnp.sum(share_bcv * logits_bcv, axis=2), "vocab") / total_bc
            return jnp.log(total_bc) + largest_bc - mean_bc

        return _join(jax.lax.map(block, _cut(hidden_btD, block_tokens)), hidden_btD.shape[1])

    return per_device(local, (_HIDDEN, _TABLE), _TOKENS)(hidden_BTD, weight_VD)


def is_likeliest(
    hidden_BTD: Float[Array, "B T D"], weight_VD: Float[Array, "V D"], labels_BT: Int[Array, "B T"], block_tokens: int
) -> Bool[Array, "B T"]:
    """Returns whether no token is more likely than the label; arguments as in ``token_nll``."""

    def local(hidden_btD: jax.Array, weight_vd: jax.Array, labels_bt: jax.Array) -> jax.Array:
        table_vD = whole_table(weight_vd, hidden_btD.dtype)

        def block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden_bcD, labels_bc = inputs
            logits_bcv = _logits(hidden_bcD, table_vD)
            chosen_bc = jnp.max(jnp.where(_is_label(labels_bc, logits_bcv), logits_bcv, -jnp.inf), axis=2)
            return max_over(chosen_bc, "vocab") >= max_over(jnp.max(logits_bcv, axis=2), "vocab")

        found_Jbc = jax.lax.map(block, tuple(_cut(x, block_tokens) for x in (hidden_btD, labels_bt)))
        return _join(found_Jbc, labels_bt.shape[1])

    return per_device(local, (_HIDDEN, _TABLE, _TOKENS), _TOKENS)(hidden_BTD, weight_VD, labels_BT)


def _logits(hidden_bcD: jax.Array, table_vD: jax.Array) -> jax.Array:
    return jnp.einsum("bcd,vd->bcv", hidden_bcD, table_vD, preferred_element_type=jnp.float32)


def _is_label(labels_bc: jax.Array, logits_bcv: jax.Array) -> jax.Array:
    """Returns where the label is among this device's part of the vocabulary."""
    ids_v = jnp.arange(logits_bcv.shape[2], dtype=labels_bc.dtype) + position_on("vocab") * logits_bcv.shape[2]
    return labels_bc[:, :, None] == ids_v[None, None, :]


def _cut(x_bt: jax.Array, block_tokens: int) -> jax.Array:
    """Returns J x b x c, zeros after the end."""
    rows, tokens, *rest = x_bt.shape
    block_tokens = min(block_tokens, tokens)
    blocks = -(-tokens // block_tokens)
    padded = jnp.pad(x_bt, ((0, 0), (0, blocks * block_tokens - tokens)) + ((0, 0),) * len(rest))
    return jnp.moveaxis(padded.reshape(rows, blocks, block_tokens, *rest), 1, 0)


def _join(x_Jbc: jax.Array, tokens: int) -> jax.Array:
    blocks, rows, block_tokens, *rest = x_Jbc.shape
    return jnp.moveaxis(x_Jbc, 0, 1).reshape(rows, blocks * block_tokens, *rest)[:, :tokens]
