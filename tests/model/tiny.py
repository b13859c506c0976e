"""Tiny models with parameters large enough that every part matters, and rows of packed documents.

Letters: B row, T tokens, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intttrain.config import ModelConfig, RopeConfig, TTTConfig
from intttrain.model import DecoderOutput, Params, abstract_params, bind, init_params, token_nll

T, C, V = 32, 8, 32
TTT = TTTConfig(layers=(0, 1), chunk_tokens=C, eta=0.5)
TINY = ModelConfig(
    family="qwen3", vocab_size=V, d_model=8, d_ff=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    rope=RopeConfig(theta=100.0), ttt=TTT, compute_dtype="float32", remat="none", loss_chunk_tokens=16,
)  # fmt: skip


def with_ttt(config: ModelConfig, **changes: Any) -> ModelConfig:
    """Returns the configuration with another TTT section."""
    assert config.ttt is not None
    return dataclasses.replace(config, ttt=dataclasses.replace(config.ttt, **changes))


@functools.cache
def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Returns parameters of size 1 / sqrt(fan-in) and gains around 1; a fresh initialisation would write nothing."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if "norm" in name:
            value = 1.0 + 0.2 * rng.standard_normal(leaf.shape)
        elif "weight" in name:
            value = rng.standard_normal(leaf.shape)
        else:
            value = 0.5 * rng.standard_normal(leaf.shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def rows(*lengths: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, segment ids, positions and labels; ``(13, -3, 16)`` is 13 tokens, 3 of padding, 16 tokens."""
    ids_BT, positions_BT = [], []
    for row in lengths:
        ids, positions, document = [], [], 0
        for length in row:
            document += length > 0
            ids += [document if length > 0 else 0] * abs(length)
            positions += list(range(abs(length)))
        ids_BT.append(ids)
        positions_BT.append(positions)
    rng = np.random.default_rng(seed)
    tokens_BT, labels_BT = rng.integers(0, V, (2, *np.shape(ids_BT)))
    return tuple(np.asarray(x, np.int32) for x in (tokens_BT, ids_BT, positions_BT, labels_BT))  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnums=0)
def run(config: ModelConfig, params: Params, tokens_BT: Any, ids_BT: Any, positions_BT: Any, eta: Any) -> DecoderOutput:
    """The compiled forward."""
    return bind(config, params)(tokens_BT, ids_BT, positions_BT, eta=eta)


def hidden(config: ModelConfig, params: Params, batch: Any, eta: float | None = None) -> np.ndarray:
    """Returns the final hidden states; ``eta`` as configured unless given."""
    if eta is None:
        eta = config.ttt.eta if config.ttt else 0.0
    return np.asarray(run(config, params, *batch[:3], jnp.float32(eta)).hidden_BTD)


# Compiled without optimisation: half the time, and nothing that uses it compares bits.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def loss_and_gradients(config: ModelConfig, params: Params, *batch: Any) -> Any:
    """Returns the summed loss over the tokens of documents, and its gradient."""

    def loss(params: Params) -> jax.Array:
        tokens_BT, ids_BT, positions_BT, labels_BT = batch
        decoder = bind(config, params)
        output = decoder(tokens_BT, ids_BT, positions_BT)
        nll_BT = token_nll(output.hidden_BTD, decoder.output_weight(), labels_BT, config.loss_chunk_tokens)
        return jnp.sum(jnp.where(ids_BT > 0, nll_BT, 0.0))

    return jax.value_and_grad(loss)(params)


init = jax.jit(init_params, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """Returns ``{"layers.mlp.down": array}``."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in named}
