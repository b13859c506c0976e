"""The model as pure functions over a nested dict of parameters; everything outside this package sees only that.

The abstract tree feeds initialisation, optimizer masks, checkpoints and export alike.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from intttrain.config import ModelConfig
from intttrain.model.decoder import Decoder

Params = dict[str, Any]  # nested; leaves are arrays, e.g. params["layers"]["mlp"]["down"] is L x D x F


@functools.cache
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Returns freshly drawn fp32 parameters; a pure function of ``key``, so it can be jitted and sharded."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(key)), nnx.Param))


def abstract_params(config: ModelConfig) -> Params:
    """Returns the shapes and dtypes of the parameters."""
    return nnx.to_pure_dict(_structure(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """Returns the names of each parameter's axes, in the structure of the parameters (leaves are tuples)."""
    state = _structure(config)[1]
    return jax.tree.map(
        lambda variable: variable.get_metadata()["logical_axes"],
        nnx.to_pure_dict(state, extract_fn=lambda variable: variable),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def bind(config: ModelConfig, params: Params) -> Decoder:
    """Returns the decoder with the given parameters. Cheap: no array is copied."""
    graph, abstract = _structure(config)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
