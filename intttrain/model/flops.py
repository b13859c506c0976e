"""The FLOPs that count as work of the model: the rule behind every MFU of this project.

Letters: T tokens in a row, N query heads, H head dim, L layers.
"""

from __future__ import annotations

import jax

from intttrain.config import ModelConfig
from intttrain.model.decoder import OFFLOADED, REMAT_KEEPS
from intttrain.model.functional import abstract_params

FLOP_RULE = (
    "model FLOPs per token = 6 x matmul parameters (without the embedding lookup and what TTT adds) "
    "+ 12 x layers x heads x head_dim x tokens a query sees on average (causal, window)"
)


def matmul_parameters(config: ModelConfig) -> int:
    """Returns the number of weights that every token is multiplied with, those of TTT left out."""
    params = dict(abstract_params(config))
    params.pop("ttt", None)
    if not config.tie_embeddings:
        params.pop("embed")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if "norm" not in jax.tree_util.keystr(path))


def kept_values(config: ModelConfig, tensor: int) -> int | None:
    """Returns how many values a layer keeps per token for the backward pass, its input included, by ``model.remat``.

    ``None`` for "none", where the compiler decides. ``tensor`` devices share heads and feed-forward width. "offload"
    keeps them in the memory of the host.
    """
    width, head = config.d_model, config.head_dim
    sizes = {
        "layer_input": width,
        "attention": config.num_heads * head // tensor,
        "qkv": (config.num_heads + 2 * config.num_kv_heads) * head // tensor,
        "residual": width,
        "mlp": 2 * config.d_ff // tensor,
    }
    if config.remat == "none":
        return None
    names = OFFLOADED if config.remat == "offload" else ("layer_input", *REMAT_KEEPS[config.remat])
    return sum(sizes[name] for name in names)


def attended_tokens(config: ModelConfig, seq_len: int) -> float:
    """Returns how many keys a query of a row of one document sees on average, itself included."""
    window = min(config.sliding_window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def model_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Returns the FLOPs of one token, forward and backward, by ``FLOP_RULE``: recomputed work does not count.

    A model with TTT counts as much as its dense twin, so that the difference of their MFUs shows what TTT costs.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * attended_tokens(config, seq_len)
    return 6 * matmul_parameters(config) + attention
