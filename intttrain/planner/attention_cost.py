"""Prices JAX's splash attention kernels, which carry no estimate: matmul FLOPs over a measured efficiency.

Time of one call = (computed blocks x time of a block + skipped grid steps x time of a step) / TensorCores at work.

- Which blocks are computed stands in the text: the shape of the block table (``data_next``) is the grid, narrowed by
  the kernel to the widest band of a sliding window, and the causal mask cuts it at the diagonal. A block at the edge of
  the mask is computed whole. Documents change nothing: their mask is not known when the program is made.
- A block's time is its matmul FLOPs over the peak of one TensorCore times ``EFFICIENCY``. Memory is never the limit:
  a block of queries does about as many FLOPs per byte as it has rows, 256 is enough on every chip.
- Of two TensorCores in one device (v4, v5p) both work only along "parallel" grid dimensions: the heads of the forward
  kernel, and in the backward kernels nothing but what was added with ``jax.vmap``.
- The backward kernel that computes all gradients writes a part of dq in every step, skipped ones included; XLA's sum of
  the parts has an estimate of its own.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from intttrain.layout.hardware import Chip
from intttrain.planner.xla.hlo import Instruction
from intttrain.planner.xla.kernels import (
    KernelCost,
    KernelModel,
    is_kernel,
    kernel_name,
    kernel_settings,
    nearest_sizes,
    operand_shapes,
)

_NAME = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)(_segmented)?_(no_)?residuals$")


class Blocks(NamedTuple):
    """Tokens of a block: queries, keys, and keys that are computed at once (of dq the same as ``kv``)."""

    q: int
    kv: int
    compute: int


# Part of one TensorCore's peak that a whole block reaches, segment ids and causal comparison included; head dim 128.
#
# Measured with jax 0.12.0 and libtpu 0.0.52, ``python -m tests.benchmarks.profile_attention --chip=NAME``: the
# compiler's static profile of one kernel whose block table was taken away, so that no body depends on run-time values
# and every block of the square is computed; efficiency = matmul FLOPs of the square / (cycles x peak per cycle). The
# square has 4096 tokens (2048 with blocks of 256, and for dq on v6e with blocks of 1024); 64 MiB of scoped
# on-chip memory. A head dim of 128 fills half of a matrix unit of v6e and tpu7x: 0.5 is their best.
EFFICIENCY: Mapping[str, Mapping[str, Mapping[Blocks, float]]] = types.MappingProxyType(
    {
        "v5p": {
            "fwd": {
                Blocks(256, 256, 256): 0.239, Blocks(512, 512, 512): 0.595, Blocks(512, 1024, 512): 0.694,
                Blocks(1024, 1024, 256): 0.736,
                Blocks(1024, 1024, 512): 0.750, Blocks(1024, 1024, 1024): 0.664, Blocks(1024, 2048, 512): 0.800,
                Blocks(2048, 1024, 512): 0.774, Blocks(2048, 2048, 512): 0.815, Blocks(2048, 2048, 2048): 0.662,
            },
            "bwd": {
                Blocks(1024, 1024, 1024): 0.916, Blocks(1024, 2048, 1024): 0.936, Blocks(1024, 4096, 1024): 0.963,
                Blocks(2048, 2048, 2048): 0.954, Blocks(2048, 4096, 1024): 0.973,
            },
            "dkv": {
                Blocks(256, 256, 256): 0.358, Blocks(512, 512, 512): 0.762, Blocks(512, 1024, 512): 0.854,
                Blocks(1024, 512, 512): 0.854, Blocks(1024, 1024, 512): 0.908, Blocks(1024, 1024, 1024): 0.909,
                Blocks(1024, 2048, 512): 0.934, Blocks(2048, 2048, 2048): 0.952,
            },
            "dq": {
                Blocks(256, 256, 256): 0.344, Blocks(512, 512, 512): 0.709, Blocks(1024, 1024, 1024): 0.876,
                Blocks(2048, 1024, 1024): 0.910, Blocks(2048, 2048, 2048): 0.928,
            },
        },
        "v5e": {
            "fwd": {
                Blocks(512, 512, 512): 0.698, Blocks(1024, 1024, 512): 0.795, Blocks(1024, 1024, 1024): 0.697,
                Blocks(1024, 2048, 512): 0.844,
                Blocks(2048, 2048, 2048): 0.684,
            },
            "bwd": {
                Blocks(1024, 1024, 512): 0.954, Blocks(1024, 1024, 1024): 0.950, Blocks(1024, 2048, 512): 0.966,
                Blocks(1024, 4096, 512): 0.980, Blocks(2048, 2048, 512): 0.975, Blocks(2048, 4096, 1024): 0.980,
            },
            "dkv": {
                Blocks(512, 512, 512): 0.856, Blocks(1024, 1024, 1024): 0.947, Blocks(2048, 2048, 2048): 0.972,
            },
            "dq": {
                Blocks(512, 512, 512): 0.819, Blocks(1024, 1024, 1024): 0.924,
            },
        },
        "v6e": {
            "fwd": {
                Blocks(512, 512, 512): 0.216, Blocks(1024, 1024, 512): 0.255, Blocks(1024, 1024, 1024): 0.201,
                Blocks(1024, 2048, 512): 0.276, Blocks(1024, 4096, 512): 0.289, Blocks(2048, 2048, 512): 0.281,
                Blocks(2048, 2048, 2048): 0.195,
            },
            "bwd": {
                Blocks(1024, 1024, 512): 0.394, Blocks(1024, 1024, 1024): 0.398, Blocks(1024, 2048, 1024): 0.413,
                Blocks(1024, 4096, 1024): 0.422, Blocks(2048, 2048, 512): 0.421, Blocks(2048, 4096, 1024): 0.439,
            },
            "dkv": {
                Blocks(512, 512, 512): 0.308, Blocks(512, 2048, 512): 0.365, Blocks(1024, 1024, 1024): 0.396,
                Blocks(1024, 2048, 512): 0.396,
            },
            "dq": {
                Blocks(512, 512, 512): 0.287, Blocks(1024, 1024, 1024): 0.336,
            },
        },
        "tpu7x": {
            "fwd": {
                Blocks(512, 512, 512): 0.174, Blocks(512, 2048, 512): 0.258, Blocks(1024, 1024, 512): 0.241,
                Blocks(1024, 1024, 1024): 0.191, Blocks(1024, 2048, 512): 0.277, Blocks(1024, 4096, 512): 0.288,
                Blocks(2048, 2048, 512): 0.284, Blocks(2048, 4096, 512): 0.300,
            },
            "bwd": {
                Blocks(1024, 1024, 512): 0.404, Blocks(1024, 1024, 1024): 0.400, Blocks(1024, 2048, 512): 0.420,
                Blocks(1024, 4096, 512): 0.430, Blocks(2048, 2048, 512): 0.441,
            },
            "dkv": {
                Blocks(512, 512, 512): 0.257, Blocks(1024, 1024, 1024): 0.398,
            },
            "dq": {
                Blocks(512, 512, 512): 0.226, Blocks(1024, 1024, 1024): 0.294,
            },
        },
    }
)  # fmt: skip

# Cycles of a grid step whose block is skipped, on one TensorCore: the same profile with the block table, whose bodies
# then count nothing (``--skipped --chip=v5p --blocks=512``). Taken for all chips and blocks.
STEP_CYCLES: Mapping[str, float] = types.MappingProxyType({"fwd": 352.0, "bwd": 700.0, "dkv": 575.0, "dq": 458.0})

# Chips without measurements of their own, and whose they take.
_NEAREST: Mapping[str, str] = types.MappingProxyType({"v4": "v5p"})
_SETTINGS: Mapping[str, tuple[str, str, str]] = types.MappingProxyType(
    {
        "fwd": ("block_q", "block_kv", "block_kv_compute"),
        "dkv": ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
        "dq": ("block_q_dq", "block_kv_dq", "block_kv_dq"),
    }
)


class AttentionCall(NamedTuple):
    """What the text says about one call of a splash kernel on one device.

    Attributes:
      kind: "fwd", "bwd" (all gradients), "dkv" or "dq".
      blocks: tokens of a block.
      heads: query heads of all rows.
      parallel: independent pieces along "parallel" grid dimensions.
      computed: blocks that touch the mask, per head.
      steps: grid steps per head.
      flops_per_score: matmul FLOPs for one query and one key.
    """

    kind: str
    blocks: Blocks
    heads: int
    parallel: int
    computed: int
    steps: int
    flops_per_score: int

    @property
    def flops(self) -> int:
        """Matmul FLOPs of the call; blocks at the edge of the mask count whole."""
        return self.heads * self.computed * self.block_flops

    @property
    def block_flops(self) -> int:
        """Matmul FLOPs of one block of one head."""
        return self.blocks.q * self.blocks.kv * self.flops_per_score


def causal_blocks(queries: int, keys: int, width: int, blocks: Blocks, *, by_keys: bool) -> int:
    """Blocks of one head that touch a causal mask in a band.

    Fewer queries than keys are those of a context shard. In a band they are the last ones (the keys before them came
    from another shard); without one half of them are the first and half the last of the row, as balanced rows are
    stored: other shards have as many blocks.

    Args:
      queries, keys: tokens.
      width: length of the grid's last dimension: how many blocks a row of the grid can have.
      blocks: tokens of a block.
      by_keys: a row of the grid is a block of keys (bwd, dkv), not one of queries.
    """
    rows_q, rows_kv = queries // blocks.q, keys // blocks.kv
    ends = np.arange(1, rows_q + 1) * blocks.q
    if width < (rows_q if by_keys else rows_kv):
        ends += keys - queries
    else:
        ends[(rows_q + 1) // 2 :] += keys - queries
    if by_keys:
        counts = (int(np.sum(ends > j * blocks.kv)) for j in range(rows_kv))
    else:
        counts = (min(rows_kv, -(-int(end) // blocks.kv)) for end in ends)
    return sum(min(count, width) for count in counts)


def read_call(instruction: Instruction) -> AttentionCall | None:
    """Reads a call of a splash kernel; None for anything else, other layouts included."""
    found = _NAME.match(kernel_name(instruction)) if is_kernel(instruction) else None
    settings = kernel_settings(instruction)
    layouts = {settings.get(f"{letter}_layout", 1) for letter in "qkv"}  # 1: head dim last
    if not found or layouts != {1} or "operand_layout_constraints" not in instruction.attributes:
        return None
    kind = found.group(1)
    sizes = [settings.get(name) for name in _SETTINGS[kind]]
    shapes = operand_shapes(instruction)
    floats = [shape for shape in shapes if shape.dtype.startswith(("bf", "f"))]
    if not all(isinstance(size, int) for size in sizes) or len(floats) < 3:
        return None
    blocks = Blocks(*sizes)  # type: ignore[arg-type]  # integers, as just checked
    q, k, v = (shape.dims for shape in floats[:3])
    if any(len(result.dims) > len(q) for result in instruction.shape.elements):  # parts of dq
        kind = "bwd"
    queries, keys, depth, depth_v = q[-2], k[-2], q[-1], v[-1]
    rows, columns = queries // blocks.q, keys // blocks.kv
    by_keys = kind in ("bwd", "dkv")
    lines, longest = (columns, rows) if by_keys else (rows, columns)
    computed = steps = rows * columns
    if shapes[0].dtype.startswith("s") and len(shapes[0].dims) >= 3:  # the block table; without it there is no mask
        width = min(longest, shapes[0].dims[-2] if by_keys else shapes[0].dims[-1])
        steps = lines * width
        computed = causal_blocks(queries, keys, width, blocks, by_keys=by_keys)
    products = {"fwd": (1, 1), "bwd": (3, 2), "dkv": (2, 2), "dq": (2, 1)}[kind]
    per_score = products[0] * depth + products[1] * depth_v
    heads = math.prod(q[:-2])
    parallel = heads if kind == "fwd" else math.prod(q[:-3])
    return AttentionCall(kind, blocks, heads, parallel, computed, steps, 2 * per_score)


def _efficiency(chip: Chip, call: AttentionCall) -> tuple[float, str]:
    """Efficiency of the nearest measured blocks, and how it came about."""
    source = chip.name if chip.name in EFFICIENCY else _NEAREST.get(chip.name, "v5p")
    table = EFFICIENCY[source][call.kind]
    nearest = nearest_sizes(table, call.blocks)
    exact = nearest == call.blocks and source == chip.name
    how = "profiled" if exact else f"assumed as on {source} with blocks {'/'.join(map(str, nearest))}"
    return table[nearest], how


def attention_cycles(chip: Chip, call: AttentionCall) -> KernelCost:
    """Prices one call on one device of ``chip``."""
    efficiency, how = _efficiency(chip, call)
    core_flops_per_cycle = chip.peak_flops / chip.tensor_cores / chip.clock_hz
    block = call.block_flops / (core_flops_per_cycle * efficiency)
    per_head = call.computed * block + (call.steps - call.computed) * STEP_CYCLES[call.kind]
    cores = chip.tensor_cores // chip.devices
    busy = math.ceil(call.parallel / cores) / call.parallel  # the core with the most pieces sets the time
    basis = f"splash {call.kind}: {call.flops} flops at {efficiency:.2f} of peak ({how})"
    if cores > 1:
        basis += f", {min(cores, call.parallel)} of {cores} cores"
    return KernelCost(call.heads * per_head * busy, basis)


def attention_model(chip: Chip, fallback: KernelModel | None = None) -> KernelModel:
    """Returns a model that prices splash attention kernels, and asks ``fallback`` about all others."""

    def price(instruction: Instruction) -> KernelCost | None:
        call = read_call(instruction)
        if call is not None:
            return attention_cycles(chip, call)
        return fallback(instruction) if fallback else None

    return price
