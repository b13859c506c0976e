"""Attention over a context axis, compiled for TPUs: what each device computes, and what travels."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from intttrain.config import MeshConfig, default_config, resolve
from intttrain.layout.compiler import compiler_options
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import partition_spec, using_mesh
from intttrain.model.context_attention import attend
from intttrain.planner.attention_cost import AttentionCall, read_call
from intttrain.planner.xla.hlo import parse_module
from intttrain.planner.xla.kernels import is_kernel
from tests.planner.planted import topology

T, HEADS, KV_HEADS, WINDOW = 4096, 4, 2, 300


@functools.cache
def compiled(chip: str, way: str) -> tuple[dict[str, AttentionCall], str]:
    """The kernels of value and gradient on one of four context shards, and the text."""
    window = WINDOW if way == "halo" else None
    model = dataclasses.replace(
        resolve(default_config()).model, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=128, attention="splash",
        context_attention=way, sliding_window=window, ttt=None,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(fsdp=1, context=4), topology(chip).devices)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> object:
        with using_mesh(mesh):
            loss = lambda q, k, v: jnp.sum(attend(model, q, k, v, ids).astype(jnp.float32))  # noqa: E731
            return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    by_token = NamedSharding(mesh, partition_spec(("batch", "tokens")))
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    text = jax.jit(gradients, in_shardings=by_token).lower(q, k, k, ids).compile().as_text()
    calls = [read_call(at) for at in parse_module(text).instructions() if is_kernel(at)]
    return {call.kind: call for call in calls if call is not None}, text


@pytest.mark.parametrize("chip", [pytest.param("v5e:2x2", marks=pytest.mark.slow), "v5p:2x2x1"])
def test_gathered_keys_meet_a_quarter_of_the_queries_balanced(chip):
    calls, text = compiled(chip, "all_gather")
    assert set(calls) == {"fwd", "bwd"} and "all-gather" in text and "all-to-all" not in text
    whole, _ = compiled(chip, "all_to_all")
    for kind, call in calls.items():
        assert call.heads == HEADS and whole[kind].heads == HEADS // 4
        # pieces of 512 have blocks of 512 on the diagonal, whole rows such of 1024
        assert call.flops <= whole[kind].flops <= 1.3 * call.flops, kind


def test_a_window_exchanges_a_halo():
    calls, text = compiled("v5e:2x2", "halo")
    assert set(calls) == {"fwd", "dkv", "dq"} and "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text
    assert calls["fwd"].computed * calls["fwd"].blocks.q * calls["fwd"].blocks.kv < T // 4 * T // 2


# Those with half as much as v5e and v6e.
@pytest.mark.parametrize("chip", [pytest.param("v5p:2x2x1", marks=pytest.mark.slow), "tpu7x:2x2x1"])
def test_blocks_of_long_rows_fit_into_on_chip_memory(chip):
    devices = topology(chip).devices[:1]
    model = dataclasses.replace(
        resolve(default_config()).model, num_heads=1, num_kv_heads=1, head_dim=128, attention="splash", ttt=None
    )
    mesh = make_mesh(MeshConfig(fsdp=1), devices)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> object:
        with using_mesh(mesh):
            loss = lambda q, k, v: jnp.sum(attend(model, q, k, v, ids).astype(jnp.float32))  # noqa: E731
            return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    rows = jax.ShapeDtypeStruct((1, 32768, 1, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 32768), jnp.int32)
    step = jax.jit(
        gradients, in_shardings=NamedSharding(mesh, partition_spec(())), compiler_options=compiler_options(devices[0])
    )
    text = step.lower(rows, rows, rows, ids).compile().as_text()
    backward = [read_call(at) for at in parse_module(text).instructions() if is_kernel(at)]
    assert {call.kind: call.blocks.kv for call in backward if call is not None}["bwd"] == 4096
