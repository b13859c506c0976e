"""Next-token losses without ever holding the logits of a whole row.

Letters: B row, T tokens, c tokens per block, D model width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_nll(
    hidden_BTD: Float[Array, "B T D"],
    weight_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    block_tokens: int,
) -> Float[Array, "B T"]:
    """Returns the fp32 negative log-likelihood (nats) of every label.

    Logits exist for ``block_tokens`` positions at a time, forward and backward (each block is recomputed).
    """
    rows, seq_len, width = hidden_BTD.shape
    block_tokens = min(block_tokens, seq_len)
    blocks = -(-seq_len // block_tokens)
    padding = blocks * block_tokens - seq_len
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    labels_BT = jnp.pad(labels_BT, ((0, 0), (0, padding)))

    @jax.checkpoint
    def block_nll(hidden_BcD: jax.Array, labels_Bc: jax.Array) -> jax.Array:
        weight = weight_VD.astype(hidden_BcD.dtype)  # cast in here, so that its gradient is summed over blocks in fp32
        logits_BcV = jnp.einsum("bcd,vd->bcv", hidden_BcD, weight, preferred_element_type=jnp.float32)
        chosen_Bc = jnp.take_along_axis(logits_BcV, labels_Bc[:, :, None], axis=2)[:, :, 0]
        return jax.nn.logsumexp(logits_BcV, axis=2) - chosen_Bc

    with jax.named_scope("loss"):
        nll_JBc = jax.lax.map(
            lambda block: block_nll(*block),
            (
                jnp.moveaxis(hidden_BTD.reshape(rows, blocks, block_tokens, width), 1, 0),
                jnp.moveaxis(labels_BT.reshape(rows, blocks, block_tokens), 1, 0),
            ),
        )
    return jnp.moveaxis(nll_JBc, 0, 1).reshape(rows, blocks * block_tokens)[:, :seq_len]
