"""Prices the kernels of the fast-weight scans: the FLOPs that they state over an efficiency from static profiles.

All chunks count as whole ones, as everywhere in plans: those in which documents begin take longer.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping

from intttrain.layout.hardware import Chip
from intttrain.planner.xla.hlo import Instruction
from intttrain.planner.xla.kernels import (
    KernelCost,
    KernelModel,
    is_kernel,
    kernel_name,
    nearest_sizes,
    operand_shapes,
    stated_cost,
)

_NAME = re.compile(r"ttt_(forward|prefix|suffix)$")

FLOPS: Mapping[str, int] = types.MappingProxyType({"forward": 4, "prefix": 4, "suffix": 6})  # per token, of D x F
_COPIES: Mapping[str, int] = types.MappingProxyType({"forward": 3, "prefix": 2, "suffix": 2})  # W0, S; S or G back

# Part of one device's peak, by D and F, for C = 1024 and the blocks that training takes.
#
# Measured with jax 0.12.0 and libtpu 0.0.52, ``python -m tests.benchmarks.profile_scans --chip=NAME --shape=DxF``:
# the compiler's static profile of one kernel and four chunks, each of one document. The other shapes take the nearest.
EFFICIENCY: Mapping[str, Mapping[str, Mapping[tuple[int, int], float]]] = types.MappingProxyType(
    {
        "v5p": {"forward": {(2560, 9728): 0.980}, "prefix": {(2560, 9728): 0.976}, "suffix": {(2560, 9728): 0.989}},
    }
)


def _efficiency(chip: Chip, kind: str, shape: tuple[int, int]) -> tuple[float, str]:
    """Efficiency of the nearest measured shape, and how it came about."""
    source = chip.name if chip.name in EFFICIENCY else "v5p"
    table = EFFICIENCY[source][kind]
    nearest = nearest_sizes(table, shape)
    exact = nearest == shape and source == chip.name
    return table[nearest], "profiled" if exact else f"assumed as on {source} with {nearest[0]} x {nearest[1]}"


def scan_model(chip: Chip, fallback: KernelModel | None = None) -> KernelModel:
    """Returns a model that prices kernels of fast-weight scans, and asks ``fallback`` about all others.

    The time is the larger of FLOPs over ``peak * efficiency`` and stated bytes over the bandwidth, and before and after
    it the copies of the state, beside which nothing runs.
    """

    def price(instruction: Instruction) -> KernelCost | None:
        found = _NAME.match(kernel_name(instruction)) if is_kernel(instruction) else None
        stated = stated_cost(instruction)
        if found is None or stated is None:
            return fallback(instruction) if fallback else None
        kind = found.group(1)
        _, rows, *_, (width, d_ff) = (shape.dims for shape in operand_shapes(instruction) if len(shape.dims) == 2)
        part = stated.flops / (FLOPS[kind] * rows[0] * width * d_ff)  # of the state, in one launch
        copied = part * _COPIES[kind] * 4 * width * d_ff / chip.device_hbm_bytes_per_second
        efficiency, how = _efficiency(chip, kind, (width, d_ff))
        compute = stated.flops / (chip.device_peak_flops * efficiency)
        memory = stated.bytes_accessed / chip.device_hbm_bytes_per_second
        basis = f"scan {kind}: {stated.flops} flops at {efficiency:.2f} of peak ({how})"
        if memory > compute:
            basis = f"scan {kind}: {stated.bytes_accessed} bytes"
        return KernelCost((max(compute, memory) + copied) * chip.clock_hz, basis)

    return price
