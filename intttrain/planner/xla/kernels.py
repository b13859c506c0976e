"""Pallas kernels in optimised TPU text: their names, what their authors state about them, and a price from that.

A kernel is a custom call whose program is an opaque byte string: the compiler gives no estimate for it. What survives
in the text is the kernel's name, the shapes, ``pl.CostEstimate`` where the author gave one, and free-form metadata
(JAX's splash attention writes its block sizes there).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from intttrain.planner.xla.hlo import Instruction
from intttrain.planner.xla.shapes import Shape, parse_shape, split_top_level

Sizes = TypeVar("Sizes", bound=tuple[int, ...])

_SUFFIX = re.compile(r"(\.(\d+|clone|remat\d*))+$")


@dataclasses.dataclass(frozen=True)
class StatedCost:
    """A kernel's ``pl.CostEstimate``: of one call on one device."""

    flops: int
    transcendentals: int
    bytes_accessed: int


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Price of one execution of a kernel on one device, and on what it rests ("flops", "bytes", ...)."""

    cycles: float
    basis: str


KernelModel = Callable[[Instruction], KernelCost | None]


def is_kernel(instruction: Instruction) -> bool:
    """Whether this is a Pallas TPU kernel."""
    return (
        instruction.opcode == "custom-call" and instruction.attributes.get("custom_call_target") == '"tpu_custom_call"'
    )


def kernel_name(instruction: Instruction) -> str:
    """The ``name=`` of the ``pallas_call``; of a kernel without one, the scope or primitive that called it."""
    parts = instruction.op_name.split("/")
    if parts[-1] == "pallas_call" and len(parts) > 1 and not parts[-2].endswith(")"):
        return parts[-2]
    return _SUFFIX.sub("", instruction.name)


def stated_cost(instruction: Instruction) -> StatedCost | None:
    """The cost that the kernel's author stated; None without one."""
    stated = instruction.backend_config.get("custom_call_config", {}).get("cost_estimate")
    if not stated:
        return None
    return StatedCost(*(int(stated.get(field.name, 0)) for field in dataclasses.fields(StatedCost)))


def kernel_settings(instruction: Instruction) -> dict[str, Any]:
    """The kernel's metadata, with JSON inside of it unpacked: ``{"block_q": 512, ...}`` for splash attention."""
    text = instruction.attributes.get("frontend_attributes", "{}")
    pairs = dict(part.partition("=")[::2] for part in split_top_level(text[1:-1]))
    try:
        settings = json.loads(pairs.get("kernel_metadata", "{}"))
        inner = settings.pop("xprof_metadata", "{}")
        return {**settings, **json.loads(inner)}
    except (ValueError, AttributeError, TypeError):
        return {}


def operand_shapes(instruction: Instruction) -> list[Shape]:
    """The shapes of a kernel's operands on one device."""
    return [parse_shape(text) for text in split_top_level(instruction.attributes["operand_layout_constraints"][1:-1])]


def nearest_sizes(measured: Iterable[Sizes], wanted: Sizes) -> Sizes:
    """Returns the measured sizes whose ratios to the wanted ones are the smallest."""
    return min(measured, key=lambda sizes: sum(abs(math.log(x / y)) for x, y in zip(sizes, wanted, strict=True)))


def stated_kernel_cost(
    *,
    peak_flops_per_second: float,
    matmul_efficiency: float,
    bytes_per_second: float,
    cycles_per_second: float,
) -> KernelModel:
    """Returns a model that prices a kernel by its own ``cost_estimate``, and gives None where there is none.

    The time is the larger of ``flops / (peak * efficiency)`` and ``bytes / bandwidth``.

    Args:
      peak_flops_per_second: of one device, in the kernel's matmul precision.
      matmul_efficiency: the part of the peak that kernels of this kind reach, between 0 and 1.
      bytes_per_second: bandwidth of one device's main memory.
      cycles_per_second: clock of one device.
    """

    def price(instruction: Instruction) -> KernelCost | None:
        stated = stated_cost(instruction)
        if stated is None:
            return None
        compute = stated.flops / (peak_flops_per_second * matmul_efficiency)
        memory = stated.bytes_accessed / bytes_per_second
        basis = "stated flops" if compute >= memory else "stated bytes"
        return KernelCost(max(compute, memory) * cycles_per_second, basis)

    return price
