"""Arguments by part, the estimate beside the compiler's peak, verdicts, and refusals of the compiler."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.config import default_config, resolve
from intttrain.layout.hardware import CHIPS, GIB
from intttrain.planner.memory import read_memory, read_refusal, shard_bytes, smaller_steps, verdict
from intttrain.planner.xla.hlo import parse_module
from intttrain.planner.xla.liveness import estimate_peak
from tests.planner.meshes import tpu_mesh

LAYERS, ROWS, WIDTH = 8, 2048, 1024


def _loss(params, batch, *, remat):
    def body(x, w):
        return jnp.tanh(x @ w.astype(jnp.bfloat16)), None

    x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, batch, params["w"])
    return jnp.mean(x.astype(jnp.float32) ** 2)


def _step(state, batch, *, remat):
    """One step of momentum on a stack of matmuls."""
    grads = jax.grad(functools.partial(_loss, remat=remat))(state["params"], batch)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["opt_state"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], momentum)
    return {"params": params, "opt_state": momentum}


@functools.cache
def _memory(target, remat=True):
    mesh = tpu_mesh(target)
    pieces = mesh.size
    weights = jax.ShapeDtypeStruct(
        (LAYERS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    state = {"params": {"w": weights}, "opt_state": {"w": weights}}
    batch = jax.ShapeDtypeStruct(
        (ROWS * pieces, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(functools.partial(_step, remat=remat), donate_argnums=0, out_shardings=shardings)
    compiled = step.lower(state, batch).compile()
    module = parse_module(compiled.as_text())
    return read_memory(compiled, module, state=state, batch=batch), pieces


TARGETS = [(target, remat) for target in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2") for remat in (True, False)]


@pytest.mark.parametrize(("target", "remat"), TARGETS)
def test_estimate_is_near_the_compilers_peak(target, remat):
    memory, _ = _memory(target, remat)
    assert memory.estimated_peak == pytest.approx(memory.peak, rel=0.15)


def test_arguments_by_part():
    memory, pieces = _memory("v5p:2x2x1")
    weights = LAYERS * WIDTH * WIDTH * 4 // pieces
    assert (memory.parameters, memory.optimizer, memory.gradients) == (weights, weights, weights)
    assert memory.batch == ROWS * WIDTH * 2
    assert memory.arguments == 2 * weights + memory.batch + memory.other_arguments
    assert 0 <= memory.other_arguments < 4096
    assert memory.aliased == 2 * weights
    assert memory.host == 0
    assert json.loads(json.dumps(memory.to_json()))["peak"] == memory.peak


def test_the_stack_of_saved_activations_is_named_by_its_line():
    """Its memory is allocated ahead of the scan without a line; the scan writes what `_loss` computes into it."""
    memory, _ = _memory("v5p:2x2x1")
    largest = memory.largest[0]
    assert largest.bytes >= LAYERS * ROWS * WIDTH * 2
    assert "/test_memory.py:" in largest.line
    assert f"bf16[{LAYERS},{ROWS},{WIDTH}]" in largest.shapes
    total = sum(row.bytes for row in memory.largest)
    assert total == memory.estimated_peak - (memory.arguments + memory.outputs - memory.aliased)


def test_shard_bytes():
    mesh = tpu_mesh("v5e:2x2", context=2)
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "context"))
    leaf = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=cut)
    assert shard_bytes({"a": leaf, "b": [leaf]}) == 2 * 64 * 32 * 2 // 4
    assert shard_bytes(leaf, itemsize=4) == 64 * 32
    assert shard_bytes(jax.ShapeDtypeStruct((3,), jnp.float32)) == 12


# --- liveness ------------------------------------------------------------------------------------------------------


def _peak(body, *, computations=""):
    return estimate_peak(parse_module(f"HloModule m, is_scheduled=true\n{computations}\nENTRY %e {body}"))


_BIG = 1024 * 1024 * 4


def test_an_array_lives_until_its_last_reader():
    body = """(p: f32[1024,1024]) -> f32[] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %a = f32[1024,1024]{1,0} sine(%p)
  %b = f32[1024,1024]{1,0} sine(%a)
  %c = f32[1024,1024]{1,0} sine(%b)
  ROOT %r = f32[] custom-call(%c), custom_call_target="sum"
}"""
    assert _peak(body).bytes == 2 * _BIG
    assert _peak(body.replace("custom-call(%c)", "custom-call(%c, %a)")).bytes == 3 * _BIG
    assert _peak(body.replace("sine(", "tanh(")).bytes == _BIG, "elementwise results take their operand's place"


def test_on_chip_and_host_memory_are_apart():
    body = """(p: f32[1024,1024]) -> f32[] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %a = f32[1024,1024]{1,0:S(1)} sine(%p)
  %b = f32[1024,1024]{1,0:S(5)} copy(%a)
  ROOT %r = f32[] custom-call(%a, %b), custom_call_target="sum"
}"""
    peak = _peak(body)
    assert (peak.bytes, peak.host_bytes) == (0, _BIG)


def test_asynchronous_copies_and_aliases():
    body = """(p: f32[1024,1024]) -> f32[] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %s = (f32[1024,1024]{1,0}, f32[1024,1024]{1,0}, u32[]) copy-start(%p)
  %d = f32[1024,1024]{1,0} copy-done(%s)
  %k = f32[1024,1024]{1,0} custom-call(%d), custom_call_target="k", output_to_operand_aliasing={{}: (0, {})}
  ROOT %r = f32[] custom-call(%k), custom_call_target="sum"
}"""
    assert _peak(body).bytes == _BIG + 4  # and four bytes of the copy's context
    assert _peak(body.replace(", output_to_operand_aliasing={{}: (0, {})}", "")).bytes == 2 * _BIG


def test_work_of_the_sparse_core_gets_its_operands_after_its_start():
    body = """(p: f32[1024,1024]) -> f32[] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %s = ((), (), (s32[256]{0})) custom-call-start(), custom_call_target="t"
  %a = f32[1024,1024]{1,0} sine(%p)
  %u = ((f32[1024,1024]{1,0}), (f32[1024,1024]{1,0}), (s32[256]{0})) custom-call-update(%s, %a), output_to_operand_aliasing={{2,0}: (0, {2,0})}
  %b = f32[1024,1024]{1,0} sine(%p)
  %d = (f32[1024,1024]{1,0}) custom-call-done(%u)
  %f = f32[1024,1024]{1,0} get-tuple-element(%d), index=0
  ROOT %r = f32[] custom-call(%f, %b), custom_call_target="sum"
}"""  # noqa: E501
    peak = _peak(body)  # its operand and result, its context, and what is made meanwhile
    assert (peak.bytes, {b.instruction.name for b in peak.buffers}) == (3 * _BIG + 1024, {"s", "a", "u", "b"})


def test_a_loop_adds_its_bodys_arrays_and_its_state_once():
    computations = """
%cond (c: (s32[], f32[1024,1024])) -> pred[] {
  %c = (s32[], f32[1024,1024]{1,0}) parameter(0)
  ROOT %t = pred[] constant(true)
}

%body (b: (s32[], f32[1024,1024])) -> (s32[], f32[1024,1024]) {
  %b = (s32[], f32[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[1024,1024]{1,0} get-tuple-element(%b), index=1
  %y = f32[1024,1024]{1,0} sine(%x)
  %z = f32[1024,1024]{1,0} sine(%y)
  ROOT %o = (s32[], f32[1024,1024]{1,0}) tuple(%i, %z)
}
"""
    body = """(p: f32[1024,1024]) -> f32[] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %i0 = s32[] constant(0)
  %a = f32[1024,1024]{1,0} sine(%p)
  %s = (s32[], f32[1024,1024]{1,0}) tuple(%i0, %a)
  %w = (s32[], f32[1024,1024]{1,0}) while(%s), condition=%cond, body=%body
  %f = f32[1024,1024]{1,0} get-tuple-element(%w), index=1
  ROOT %r = f32[] custom-call(%f), custom_call_target="sum"
}"""
    peak = _peak(body, computations=computations)
    assert (peak.bytes, [b.instruction.name for b in peak.buffers]) == (2 * _BIG, ["a", "y"])


def test_an_unscheduled_text_is_refused():
    with pytest.raises(ValueError, match="not scheduled"):
        estimate_peak(parse_module("HloModule m\nENTRY %e (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}"))


# --- verdicts ------------------------------------------------------------------------------------------------------


def _config(**train):
    config = default_config()
    config.train.batch_rows = 64
    config.train.update(train)
    return resolve(config)


def test_fits():
    said = verdict(10 * GIB, CHIPS["v5e"], _config(), batch_pieces=8)
    assert (said.fits, said.suggestions) == (True, ())
    assert said.text == "fits with 5.75 GiB to spare (37%): 10.00 of 15.75 GiB of a v5e device"


def test_the_reserve_counts():
    assert verdict(14 * GIB, CHIPS["v5e"], _config(), batch_pieces=8).fits
    said = verdict(14 * GIB, CHIPS["v5e"], _config(), batch_pieces=8, reserve=0.2)
    assert not said.fits
    assert said.text.startswith("does not fit by 1.40 GiB: 14.00 of 12.60 GiB of a v5e device with 20% kept free; try ")


def test_suggestions_are_valid_choices():
    config = _config(microbatches=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="dots"))
    said = smaller_steps(config, batch_pieces=8)
    assert said[0] == "train.microbatches=4 (now 2)"
    assert any(text.startswith('model.remat="full"') for text in said)
    assert any(text.startswith("model.loss_chunk_tokens=") for text in said)
    one_row_each = smaller_steps(_config(microbatches=8), batch_pieces=8)
    assert not any("microbatches" in text for text in one_row_each)
    assert any(text.startswith("mesh.context=2") for text in one_row_each)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_real_refusal():
    mesh = tpu_mesh("v5e:2x2")
    everywhere = NamedSharding(mesh, PartitionSpec())
    large = jax.ShapeDtypeStruct((9 * 2**18, 1024), jnp.float32, sharding=everywhere)  # 9 GiB in and 9 GiB out
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x + 1, out_shardings=everywhere).lower(large).compile()
    refusal = read_refusal(refused.value)
    assert refusal is not None
    assert refusal.needed == pytest.approx(18 * GIB, rel=0.01)
    assert refusal.available == CHIPS["v5e"].device_hbm_bytes
    assert not verdict(refusal.needed, CHIPS["v5e"], _config(), batch_pieces=8).fits


def test_a_refusal_with_a_report():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G.

Largest program allocations in hbm:

  1. Size: 9.00G
     Operator: op_name="jit(step)/mlp/dot" source_file="model.py" source_line=12
     Shape: f32[2304,1048576]{1,0:T(8,128)}
     Unpadded size: 9.00G
     ==========================

  2. Size: 512.0M
     Shape: bf16[256,1048576]{1,0}
     ==========================
"""
    refusal = read_refusal(RuntimeError(message))
    assert refusal is not None
    assert (refusal.needed, refusal.available) == (int(18.5 * GIB), int(15.75 * GIB))
    first, second = refusal.largest
    assert (first.bytes, first.op_name, first.line) == (9 * GIB, "jit(step)/mlp/dot", "model.py:12")
    assert (first.shape, second.bytes, second.line) == ("f32[2304,1048576]", GIB // 2, "")


def test_other_errors_are_no_refusals():
    assert read_refusal(RuntimeError("INVALID_ARGUMENT: something else")) is None
