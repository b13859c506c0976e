"""The parameter tree: names, shapes, axes, and the published sizes of the stock models."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from intttrain.config import ModelConfig, RopeConfig, TTTConfig
from intttrain.model import abstract_params, logical_axes


def model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "family": "qwen3", "vocab_size": 24, "d_model": 8, "d_ff": 12, "num_layers": 3, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 6, "rope": RopeConfig(theta=1e4),
        "ttt": TTTConfig(layers=(0, 2), chunk_tokens=4, eta=0.3),
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def test_the_parameter_table(golden: Any) -> None:
    def table(config: ModelConfig) -> dict[str, str]:
        params, axes = abstract_params(config), logical_axes(config)
        named = jax.tree_util.tree_leaves_with_path(params)
        axes_of = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype} {list(leaf.shape)} {' '.join(names)}"
            for (path, leaf), names in zip(named, axes_of, strict=True)
        }

    golden.check(
        "model/parameters.json",
        {
            "qwen3 with TTT, tied": table(model()),
            "llama, dense, untied": table(model(family="llama", ttt=None, tie_embeddings=False)),
        },
    )


def test_every_axis_of_every_parameter_has_a_name() -> None:
    params, axes = abstract_params(model()), logical_axes(model())
    ranks = jax.tree.map(lambda leaf: len(leaf.shape), params)
    assert ranks == jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))


# vocab, D, F, layers, heads, kv heads, head dim, tied -> parameters as published with the weights
STOCK = {
    "Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True, 596_049_920),
    "Qwen3-4B": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True, 4_022_468_096),
    "Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False, 8_190_735_360),
    "Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False, 8_030_261_248),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_models_have_their_published_size(name: str) -> None:
    family, vocab, d, f, layers, heads, kv_heads, head_dim, tied, published = STOCK[name]
    config = model(
        family=family, vocab_size=vocab, d_model=d, d_ff=f, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, tie_embeddings=tied, ttt=None,
    )  # fmt: skip
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))) == published


def test_ttt_adds_a_convolution_and_a_square_matrix_per_layer() -> None:
    with_ttt, without = abstract_params(model()), abstract_params(model(ttt=None))
    assert {name: leaf.shape for name, leaf in with_ttt.pop("ttt").items()} == {"conv": (2, 5, 8), "target": (2, 8, 8)}
    assert with_ttt == without
    next_hidden = TTTConfig(layers=(0, 2), chunk_tokens=4, eta=0.3, target="next_hidden")
    assert set(abstract_params(model(ttt=next_hidden))["ttt"]) == {"target"}
