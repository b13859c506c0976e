from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.layout.hardware import CHIPS
from intttrain.layout.row_order import stored_units
from intttrain.planner.attention_cost import (
    EFFICIENCY,
    AttentionCall,
    Blocks,
    attention_cycles,
    attention_model,
    causal_blocks,
    read_call,
)
from intttrain.planner.xla.hlo import Instruction, parse_module
from intttrain.planner.xla.kernels import KernelCost, is_kernel, kernel_name
from tests.benchmarks.profile_attention import read_blocks
from tests.planner.planted import topology

TOKENS, HEADS, KEY_HEADS, DEPTH = 1024, 4, 2, 128
V5P = CHIPS["v5p"]


def _touched(block_q: int, block_kv: int, window: int | None, tokens: int = TOKENS) -> int:
    """Blocks with at least one query that sees one key, counted on the whole mask."""
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    mask = (j <= i) & (i - j < (window or tokens))
    tiles = mask.reshape(tokens // block_q, block_q, tokens // block_kv, block_kv)
    return int(tiles.any(axis=(1, 3)).sum())


# --- what the compiler writes ----------------------------------------------------------------------------------------


@functools.cache
def _calls(
    blocks: Blocks, window: int | None, rows: int, over_key_heads: bool, apart: bool
) -> dict[str, AttentionCall]:
    """The kernels of one attention and its gradient, compiled for one v5p with ``rows`` rows."""
    mesh = topologies.make_mesh(topology("v5p:2x2x1"), (4,), ("data",))
    shape = (TOKENS, TOKENS)
    mask = splash_attention_mask.CausalMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    q, kv, compute = blocks
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=not apart, **({"block_q_dq": q, "block_kv_dq": kv} if apart else {}),
    )  # fmt: skip
    make = splash_attention_kernel.make_splash_mqa if over_key_heads else splash_attention_kernel.make_splash_mha
    heads = HEADS // KEY_HEADS if over_key_heads else HEADS
    attend = make(splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1)
    if over_key_heads:
        attend = jax.vmap(attend, in_axes=(0, 0, 0, None))

    def loss(q, k, v, segment_ids):
        o = jax.vmap(attend)(q, k, v, splash_attention_kernel.SegmentIds(segment_ids, segment_ids))
        return jnp.sum(o.astype(jnp.float32))

    by_rows = PartitionSpec("data")
    gradient = jax.shard_map(
        jax.grad(loss, argnums=(0, 1, 2)), mesh=mesh, in_specs=(by_rows,) * 4, out_specs=by_rows, check_vma=False
    )
    q_heads = (KEY_HEADS, heads) if over_key_heads else (heads,)
    sharding = NamedSharding(mesh, by_rows)
    q_shape = jax.ShapeDtypeStruct((4 * rows, *q_heads, TOKENS, DEPTH), jnp.bfloat16, sharding=sharding)
    k_shape = jax.ShapeDtypeStruct((4 * rows, KEY_HEADS, TOKENS, DEPTH), jnp.bfloat16, sharding=sharding)
    ids = jax.ShapeDtypeStruct((4 * rows, TOKENS), jnp.int32, sharding=sharding)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        text = jax.jit(gradient).lower(q_shape, k_shape, k_shape, ids).compile().as_text()
    found = [read_call(at) for at in parse_module(text).instructions() if is_kernel(at)]
    return {call.kind: call for call in found if call is not None}


@pytest.mark.parametrize(
    ("blocks", "window", "rows", "over_key_heads", "apart"),
    [
        (Blocks(256, 256, 256), None, 1, False, True),
        (Blocks(128, 256, 128), None, 2, False, False),
        (Blocks(256, 128, 128), None, 1, True, False),
        (Blocks(128, 128, 128), 300, 2, True, True),
    ],
)
def test_flops_of_compiled_kernels_are_those_counted_by_hand(blocks, window, rows, over_key_heads, apart):
    calls = _calls(blocks, window, rows, over_key_heads, apart)
    touched = _touched(blocks.q, blocks.kv, window)
    matmuls_of = {"fwd": 2} | ({"dkv": 4, "dq": 3} if apart else {"bwd": 5})
    assert set(calls) == set(matmuls_of)
    for kind, matmuls in matmuls_of.items():
        call = calls[kind]
        assert call.blocks[:2] == blocks[:2]
        assert call.computed == touched <= call.steps, kind
        assert call.flops == rows * HEADS * touched * blocks.q * blocks.kv * matmuls * 2 * DEPTH, kind
    backward = [calls[kind] for kind in matmuls_of if kind != "fwd"]
    assert backward[0].blocks.compute == calls["fwd"].blocks.compute == blocks.compute
    assert calls["fwd"].parallel == rows * HEADS
    assert {call.parallel for call in backward} == {rows * (KEY_HEADS if over_key_heads else 1)}


@pytest.mark.parametrize("blocks", [Blocks(128, 256, 256), Blocks(256, 128, 128)])
@pytest.mark.parametrize("window", [1, 100, 129, 300, 1000])
def test_a_band_of_unequal_blocks_is_at_most_one_block_a_row_too_wide(blocks, window):
    i, j = np.arange(TOKENS)[:, None], np.arange(TOKENS)[None, :]
    mask = (j <= i) & (i - j < window)
    tiles = mask.reshape(TOKENS // blocks.q, blocks.q, TOKENS // blocks.kv, blocks.kv).any(axis=(1, 3))
    for by_keys, rows in ((False, tiles), (True, tiles.T)):
        counted = causal_blocks(TOKENS, TOKENS, int(rows.sum(1).max()), blocks, by_keys=by_keys)
        assert tiles.sum() <= counted <= tiles.sum() + len(rows)


@pytest.mark.parametrize("blocks", [Blocks(64, 128, 128), Blocks(128, 64, 64), Blocks(128, 128, 128)])
def test_blocks_of_a_context_shard_are_those_of_its_mask(blocks):
    """Balanced pieces of a row over four shards (any of them), and a window that begins in the shard before."""
    shards, own = 4, TOKENS // 4
    order = stored_units(TOKENS, shards, 1, balanced=True).reshape(shards, own)
    causal = np.arange(TOKENS)[:, None] >= np.arange(TOKENS)[None]
    halo, window = 128, 129
    distance = halo + np.arange(own)[:, None] - np.arange(halo + own)[None]
    band = (distance >= 0) & (distance < window)
    for mask, width in (*((causal[order[shard]], TOKENS) for shard in range(shards)), (band, 2 * max(blocks))):
        queries, keys = mask.shape
        tiles = mask.reshape(queries // blocks.q, blocks.q, keys // blocks.kv, blocks.kv).any(axis=(1, 3))
        for by_keys, lines in ((False, tiles), (True, tiles.T)):
            columns = width // (blocks.q if by_keys else blocks.kv)
            if by_keys and columns >= lines.shape[1]:
                continue  # a window as long as the shard
            counted = causal_blocks(queries, keys, columns, blocks, by_keys=by_keys)
            # shards differ by at most a block in every line, and so may a band
            assert abs(int(tiles.sum()) - counted) <= len(lines), (queries, keys, by_keys)


# --- prices --------------------------------------------------------------------------------------------------------

CALL = AttentionCall("dkv", Blocks(512, 512, 512), heads=8, parallel=2, computed=36, steps=64, flops_per_score=1024)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("kind", ["fwd", "bwd", "dkv", "dq"])
def test_prices_are_positive_and_grow(chip, kind):
    def cycles(**changes):
        return attention_cycles(chip, CALL._replace(kind=kind, **changes)).cycles

    base = cycles()
    assert 0 < base < cycles(heads=9) < cycles(heads=16)
    assert base < cycles(computed=37, steps=65) < cycles(computed=64)
    assert base < cycles(steps=65) and base < cycles(flops_per_score=1025)
    ideal = CALL.flops / chip.device_peak_flops * chip.clock_hz
    assert ideal < base < 10 * ideal


def test_a_core_that_has_nothing_to_do_costs_time_only_where_a_device_has_two():
    def ratio(name: str, parallel: int) -> float:
        chip = CHIPS[name]
        return attention_cycles(chip, CALL._replace(parallel=parallel)).cycles / attention_cycles(chip, CALL).cycles

    assert ratio("v5p", 1) == pytest.approx(2) and ratio("v5e", 1) == pytest.approx(1)
    assert ratio("v5p", 3) == pytest.approx(4 / 3) and ratio("v5p", 4) == pytest.approx(1)


def test_the_measured_efficiency_is_what_is_paid():
    efficiency = EFFICIENCY["v5p"]["dkv"][Blocks(512, 512, 512)]
    price = attention_cycles(V5P, CALL._replace(steps=CALL.computed))
    assert price.cycles == pytest.approx(CALL.flops / (V5P.peak_flops * efficiency) * V5P.clock_hz)
    assert "profiled" in price.basis and "2 of 2 cores" in price.basis


def test_what_was_not_measured_is_called_assumed():
    odd = attention_cycles(V5P, CALL._replace(blocks=Blocks(640, 640, 640)))
    assert "assumed as on v5p with blocks 512/512/512" in odd.basis
    unknown = attention_cycles(dataclasses.replace(V5P, name="v9"), CALL)
    assert "assumed as on v5p" in unknown.basis and unknown.cycles == attention_cycles(V5P, CALL).cycles


def test_efficiencies_are_below_the_peak():
    values = [e for chip in EFFICIENCY.values() for kind in chip.values() for e in kind.values()]
    assert values and all(0.02 < e < 1 for e in values)
    assert all(set(kinds) == {"fwd", "bwd", "dkv", "dq"} for kinds in EFFICIENCY.values())


# --- other kernels -------------------------------------------------------------------------------------------------


def _custom_call(name: str, operands: str, results: str, settings: dict[str, int]) -> Instruction:
    inner = json.dumps(settings).replace('"', '\\"')
    metadata = '{kernel_metadata={\n"xprof_metadata":"' + inner + '"\n}}'
    text = (
        f"HloModule one\n\nENTRY %main (p: f32[]) -> f32[] {{\n  %p = f32[] parameter(0)\n"
        f'  ROOT %{name}.3 = {results} custom-call(%p), custom_call_target="tpu_custom_call", '
        f"operand_layout_constraints={{{operands}}}, frontend_attributes={metadata}\n}}\n"
    )
    return parse_module(text).entry.root


Q, K = "bf16[4,512,128]{2,1,0}", "bf16[2,512,128]{2,1,0}"
DKV_SETTINGS = {"block_q_dkv": 256, "block_kv_dkv": 256, "block_kv_dkv_compute": 256, "q_layout": 1}


def _dkv(**changes) -> Instruction:
    given = {
        "name": "splash_mha_dkv_segmented_no_residuals",
        "operands": f"s8[1,2,2]{{2,1,0}}, s8[1,2,2]{{2,1,0}}, {Q}, {K}, {K}, s32[8,512]{{1,0}}",
        "results": f"({K}, {K})",
        "settings": DKV_SETTINGS,
    }
    return _custom_call(**(given | changes))


def test_a_kernel_that_also_writes_parts_of_dq_has_five_products():
    call = read_call(_dkv(results=f"(bf16[2,4,512,128]{{3,2,1,0}}, {K}, {K})"))
    assert (call.kind, call.computed, call.flops) == ("bwd", 3, 3 * 256 * 256 * 4 * 5 * 2 * 128)


def test_a_kernel_without_a_block_table_computes_every_block():
    assert read_call(_dkv()).computed == 3
    call = read_call(_dkv(operands=f"{Q}, {K}, {K}, s32[8,512]{{1,0}}"))
    assert (call.computed, call.steps, call.heads, call.parallel) == (4, 4, 4, 1)
    assert call.flops == 4 * 512 * 512 * 4 * 2 * 128


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "my_kernel"},
        {"settings": {}},
        {"settings": DKV_SETTINGS | {"q_layout": 2}},
        {"operands": "s32[]"},
    ],
    ids=str,
)
def test_other_kernels_go_to_the_fallback(changes):
    at = _dkv(**changes)
    assert read_call(at) is None and attention_model(V5P)(at) is None
    fallback = attention_model(V5P, lambda call: KernelCost(7.0, kernel_name(call)))
    assert fallback(at) == KernelCost(7.0, changes.get("name", "splash_mha_dkv_segmented_no_residuals"))


def test_prices_are_json():
    cost = attention_model(V5P, lambda call: None)(_dkv())
    assert json.loads(json.dumps(dataclasses.asdict(cost)))["cycles"] == cost.cycles
    assert math.isfinite(cost.cycles) and "splash dkv" in cost.basis


def test_blocks_are_read_from_the_command_line():
    assert read_blocks("512") == (512, 512, 512) and read_blocks("1024/2048/512") == (1024, 2048, 512)
