"""Floating-point operations of the matmuls in an optimised XLA module, by source line and by named scope.

On TPU the compiler writes every matmul as a convolution: batch dims become spatial dims of a window that steps over
them, often with dilation so that every position but one falls on a hole. Counting window times output would multiply
the work by the batch, so only the taps that meet an element of the input are counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from intttrain.planner.xla.hlo import Instruction, Module
from intttrain.planner.xla.loops import ExecutionCounts
from intttrain.planner.xla.shapes import Shape

# Parts of an op_name that say how the program was transformed or compiled, not where in the model it is.
_PLUMBING = frozenset(
    {"while", "body", "cond", "scan", "closed_call", "eval_jaxpr", "shard_map", "checkpoint", "remat"}
)
_PLUMBING_BRANCH = re.compile(r"branch_\d+_fun")
_WRAPPED = re.compile(
    r"(transpose|jvp|vmap|jit|pjit|checkpoint|remat|custom_vjp_call|custom_jvp_call)\((.*)\)", re.DOTALL
)


class Window(NamedTuple):
    """One spatial dim of a convolution."""

    size: int = 1
    stride: int = 1
    pad_low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1


@dataclasses.dataclass(frozen=True)
class MatmulFlops:
    """FLOPs of one step on one device: 2 for each multiply-add of a dot or convolution.

    Attributes:
      total: the sum.
      by_line: by "FILE:LINE", largest first; "" collects those without a known line.
      by_scope: by "PASS/SCOPE" as given by ``scope_of``, largest first.
    """

    total: int
    by_line: Mapping[str, int]
    by_scope: Mapping[str, int]


# --- one instruction -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def valid_taps(inputs: int, outputs: int, window: Window) -> int:
    """Number of pairs (output position, window position) that meet an element of the input, not padding or a hole."""
    taps = 0
    for k in range(window.size):
        # The position out * stride + offset of the dilated input has to be a multiple of the dilation, and inside.
        offset = k * window.rhs_dilate - window.pad_low
        step = window.lhs_dilate // math.gcd(window.stride, window.lhs_dilate)
        first = next((o for o in range(step) if (o * window.stride + offset) % window.lhs_dilate == 0), None)
        if first is None:
            continue
        low = max(0, -(offset // window.stride))  # the first output position at or after the input's begin
        last = min(outputs - 1, ((inputs - 1) * window.lhs_dilate - offset) // window.stride)
        start = low + (first - low) % step
        taps += max(0, (last - start) // step + 1)
    return taps


def _windows(text: str, count: int) -> list[Window]:
    """Reads ``{size=3x4 stride=1x3 pad=0_0x1_1 lhs_dilate=1x4}``; without a window there are no spatial dims."""
    found = dict(re.findall(r"(\w+)=([\d_x\-]+)", text))

    def column(key: str, default: int) -> list[int]:
        return [int(v.split("_")[0]) for v in found[key].split("x")] if key in found else [default] * count

    columns = [column(k, d) for k, d in (("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))]
    return [Window(*row) for row in zip(*columns, strict=True)]


def _convolution(lhs: Shape, rhs: Shape, out: Shape, attributes: Mapping[str, str]) -> int:
    inputs, rest = attributes["dim_labels"].split("_", 1)
    kernel, outputs = rest.split("->")
    spatial = [c for c in inputs if c.isdigit()]
    taps = 1
    for dim, window in zip(sorted(spatial), _windows(attributes.get("window", ""), len(spatial)), strict=True):
        taps *= valid_taps(lhs.dims[inputs.index(dim)], out.dims[outputs.index(dim)], window)
    # Groups need no factor: the kernel's "i" is the input features of one group, and the output holds all groups.
    pairs = out.dims[outputs.index("b")] * out.dims[outputs.index("f")] * rhs.dims[kernel.index("i")]
    return 2 * pairs * taps


def instruction_flops(instruction: Instruction, operands: Mapping[str, Instruction]) -> int:
    """FLOPs of one execution of a dot or convolution, 0 for anything else.

    Args:
      instruction: any instruction.
      operands: the instructions of its computation, by name.
    """
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    lhs, rhs = (operands[name].shape for name in instruction.operands[:2])
    if instruction.opcode == "convolution":
        return _convolution(lhs, rhs, instruction.shape, instruction.attributes)
    contracted = math.prod(lhs.dims[d] for d in instruction.attribute_ints("lhs_contracting_dims"))
    return 2 * instruction.shape.size * contracted


# --- where it comes from -------------------------------------------------------------------------------------------


def scope_of(op_name: str) -> str:
    """Returns "PASS/SCOPE": the pass (forward, recompute, backward) and the named scopes without the plumbing.

    ``jit(step)/transpose(jvp(decoder))/while/body/checkpoint/rematted_computation/mlp/dot_general`` is
    "recompute/decoder/mlp". Names of jitted functions and transformations are left out.
    """
    parts = _path(op_name)
    work = "forward"
    if "rematted_computation" in parts:
        work = "recompute"
    elif any(part.startswith("transpose(") for part in parts):
        work = "backward"
    scopes = [_unwrapped(part) for part in parts[:-1]]
    kept = [s for s in scopes if s and s not in _PLUMBING and not _PLUMBING_BRANCH.fullmatch(s)]
    return "/".join([work, *(s for s in kept if s != "rematted_computation")])


def _path(op_name: str) -> list[str]:
    """Splits at the slashes outside of parentheses."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(op_name):
        if letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "/" and depth == 0:
            parts.append(op_name[start:at])
            start = at + 1
    return [*parts, op_name[start:]]


def _unwrapped(part: str) -> str:
    while found := _WRAPPED.fullmatch(part):
        if found.group(1) in ("jit", "pjit"):
            return ""
        part = found.group(2)
    return part


def line_of(instruction: Instruction, folder: str | None) -> str:
    """Returns "FILE:LINE" of the innermost program line, inside ``folder`` if one of them is there; "" if unknown."""
    frame = (instruction.source_in(folder) if folder else None) or instruction.source
    return f"{frame.file}:{frame.line}" if frame else ""


def matmul_flops(module: Module, counts: ExecutionCounts, *, folder: str | None = None) -> MatmulFlops:
    """Adds up all matmuls of a step on one device, those inside fusions included.

    The batched vector products that XLA turns into multiply and reduce are not matmuls any more, and kernels are
    custom calls: neither is counted here.

    Args:
      module: the module.
      counts: how often its computations run, from ``execution_counts``.
      folder: lines are given to the innermost frame inside this folder where there is one, e.g. a package's.
    """
    lines: Counter[str] = Counter()
    scopes: Counter[str] = Counter()
    for computation in module.computations.values():
        for instruction in computation.instructions if counts[computation.name] else ():
            flops = counts[computation.name] * instruction_flops(instruction, computation.by_name)
            if flops:
                lines[line_of(instruction, folder)] += flops
                scopes[scope_of(instruction.op_name)] += flops
    return MatmulFlops(sum(lines.values()), dict(lines.most_common()), dict(scopes.most_common()))
