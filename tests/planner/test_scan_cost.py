"""Prices of the fast-weight kernels, read from compiled text."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from intttrain.layout.hardware import CHIPS
from intttrain.planner import scan_cost
from intttrain.planner.scan_cost import EFFICIENCY, FLOPS, scan_model
from intttrain.planner.xla.hlo import Instruction, parse_module
from intttrain.planner.xla.kernels import KernelCost, is_kernel, kernel_name, stated_cost
from intttrain.ttt.kernel_parts import Machine
from intttrain.ttt.kernel_recurrence import RecurrenceBlocks, Scalars, forward, prefix
from intttrain.ttt.kernel_suffix import SuffixBlocks, suffix
from tests.planner.planted import topology

TOKENS, CHUNKS, WIDTH, D_FF = 512, 2, 256, 1024
BLOCKS = RecurrenceBlocks(128, 256)
CHIP = CHIPS["v5p"]


@functools.cache
def _calls() -> tuple[Instruction, ...]:
    """All three kernels, compiled for one v5p; the suffix scan in two launches of two tiles."""
    sharding = jax.sharding.SingleDeviceSharding(topology("v5p:2x2x1").devices[0])
    shaped = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)  # noqa: E731
    machine = Machine(60 * 2**20)

    def run(scalars, z, v, masks, state):
        found = forward(Scalars(*scalars), z, v, masks, state, state, BLOCKS, machine)
        dz = prefix(Scalars(*scalars), v, v, z, masks, state, state, BLOCKS, machine)
        blocks = SuffixBlocks(D_FF // 4, 128)
        return found, dz, suffix(scalars[:3], z, v, v, z, masks, state, state, blocks, 2, machine)

    z, v = shaped(TOKENS, D_FF, dtype=jnp.bfloat16), shaped(TOKENS, WIDTH, dtype=jnp.bfloat16)
    arguments = (shaped(4, CHUNKS), z, v, shaped(TOKENS, 2), shaped(WIDTH, D_FF))
    text = jax.jit(run).lower(*arguments).compile().as_text()
    return tuple(at for at in parse_module(text).instructions() if is_kernel(at))


def test_stated_flops_are_those_of_the_products():
    stated = {}
    for at in _calls():
        kind = kernel_name(at).removeprefix("ttt_")
        stated[kind] = stated.get(kind, 0) + stated_cost(at).flops
    assert stated == {kind: flops * TOKENS * WIDTH * D_FF for kind, flops in FLOPS.items()}


def test_a_price_is_work_and_the_copies_of_the_state(monkeypatch):
    halves = {kind: {(WIDTH, D_FF): 0.5} for kind in FLOPS}
    monkeypatch.setattr(scan_cost, "EFFICIENCY", {"v5p": halves})
    total = dict.fromkeys(FLOPS, 0.0)
    for at in _calls():
        cost, stated = scan_model(CHIP)(at), stated_cost(at)
        total[kernel_name(at).removeprefix("ttt_")] += cost.cycles / CHIP.clock_hz
        work = max(stated.flops / (0.5 * CHIP.peak_flops), stated.bytes_accessed / CHIP.hbm_bytes_per_second)
        total[kernel_name(at).removeprefix("ttt_")] -= work
        assert "profiled" in cost.basis or "bytes" in cost.basis
    state = 4 * WIDTH * D_FF / CHIP.hbm_bytes_per_second
    assert total == {
        "forward": pytest.approx(3 * state), "prefix": pytest.approx(2 * state), "suffix": pytest.approx(2 * state)
    }  # fmt: skip


def test_shapes_and_chips_that_were_not_measured_take_the_nearest():
    call = next(at for at in _calls() if kernel_name(at) == "ttt_forward")
    assert (
        "assumed as on v5p with" in scan_model(CHIPS["v4"])(call).basis
        or "bytes" in scan_model(CHIPS["v4"])(call).basis
    )
    assert all(0.3 < part < 1 for chip in EFFICIENCY.values() for kind in chip.values() for part in kind.values())


def test_other_instructions_are_left_to_the_fallback():
    call = _calls()[0]
    other = dataclasses.replace(call, op_name="jit(f)/other/pallas_call")
    assert scan_model(CHIP)(other) is None
    assert scan_model(CHIP, lambda at: KernelCost(7.0, "asked"))(other) == KernelCost(7.0, "asked")
