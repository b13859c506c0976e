"""Measures the efficiencies of ``scan_cost.py``: ``python -m tests.benchmarks.profile_scans --chip=v5p``.

Needs libtpu, no TPU, and minutes; see ``profile_attention.py``. Each of the kernels of the fast-weight scans is
compiled alone, for one device, in the blocks that training would take. The profile counts nothing under a condition of
run-time values, so the usual way through a chunk (whole, inside one document) stands without its condition. What a
kernel does once per chunk is counted by a second profile in which it is done in every step: ``plain + (all - plain) /
steps``. Not counted: the copy of a tile of the state before the first chunk and after the last, G handed over where a
document begins, and waiting for main memory, which does not limit any of these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from intttrain.layout import hardware
from intttrain.layout.compiler import compiler_options
from intttrain.planner.scan_cost import FLOPS
from intttrain.ttt import kernel_parts, kernel_recurrence, kernel_suffix
from intttrain.ttt.kernel_blocks import Kernels, fitting
from tests.benchmarks.profile_attention import TOPOLOGY, static_profile

_CHUNKS = 4
_PER_CHUNK = ("begin_chunk", "end_chunk")


def find_kernels(chip: str, chunk_tokens: int, shape: tuple[int, int]) -> Kernels:
    """Returns the kernels that training in bf16 would take."""
    figures = hardware.CHIPS[chip]
    found = fitting(chip, figures.tensor_cores // figures.devices, chunk_tokens, *shape, 2)
    if isinstance(found, str):
        sys.exit(found)
    return found


def compile_scan(chip: str, kind: str, chunk_tokens: int, shape: tuple[int, int], *, per_chunk: bool) -> None:
    """Compiles one kernel for one device, conditions left out; ``per_chunk`` with what is done once per chunk."""
    kernels = find_kernels(chip, chunk_tokens, shape)

    def once(condition: Any) -> Callable[[Callable[[], None]], None]:
        def run(work: Callable[[], None]) -> None:
            if per_chunk and work.__name__ in _PER_CHUNK:
                work()

        return run

    kernel_parts.once = once
    kernel_parts.either = lambda condition, usual, other: usual()
    hardware.prepare_topology_compilation()
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shaped(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def run(scalars: Any, z: jax.Array, v: jax.Array, masks: jax.Array, state: jax.Array) -> object:
        rest, machine = (masks, state, state), kernels.machine
        if kind == "suffix":
            return kernel_suffix.suffix(scalars[:3], z, v, v, z, *rest, kernels.suffix, kernels.cores, machine)
        all_scalars = kernel_recurrence.Scalars(*scalars)
        if kind == "forward":
            return kernel_recurrence.forward(all_scalars, z, v, *rest, kernels.forward, machine)
        return kernel_recurrence.prefix(all_scalars, v, v, z, *rest, kernels.prefix, machine)

    tokens, (width, d_ff) = _CHUNKS * chunk_tokens, kernels.shape
    z, v = shaped(tokens, d_ff, dtype=jnp.bfloat16), shaped(tokens, width, dtype=jnp.bfloat16)
    step = jax.jit(run, compiler_options=compiler_options(device))
    step.lower(shaped(4, _CHUNKS), z, v, shaped(tokens, 2), shaped(width, d_ff)).compile()


def device_cycles(chip: str, kind: str, chunk_tokens: int, shape: tuple[int, int], *, per_chunk: bool) -> float | None:
    """Cycles of one device per chunk; None if there is no profile."""
    arguments = [f"--chip={chip}", f"--kernels={kind}", f"--shape={shape[0]}x{shape[1]}"]
    arguments += [f"--chunk-tokens={chunk_tokens}", "--compile-only"] + ["--per-chunk"] * per_chunk
    found = static_profile("tests.benchmarks.profile_scans", arguments)
    cycles = [n for name, n in found.items() if f"ttt_{kind}" in name]
    return sum(cycles) / _CHUNKS if cycles else None


def main(arguments: list[str] | None = None) -> None:
    """Prints a line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=sorted(set(TOPOLOGY) - {"v4"}), required=True)
    parser.add_argument("--kernels", default=",".join(FLOPS), help="separated by commas")
    parser.add_argument("--shape", default="2560x9728", help="D x F")
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--compile-only", action="store_true", help="compile one kernel and print nothing")
    parser.add_argument(
        "--per-chunk", action="store_true", help="with --compile-only: with the work done once per chunk"
    )
    given = parser.parse_args(arguments)
    width, d_ff = map(int, given.shape.split("x"))
    kinds, tokens = given.kernels.split(","), given.chunk_tokens
    if given.compile_only:
        compile_scan(given.chip, kinds[0], tokens, (width, d_ff), per_chunk=given.per_chunk)
        return
    kernels, figures = find_kernels(given.chip, tokens, (width, d_ff)), hardware.CHIPS[given.chip]
    flops_per_cycle = figures.device_peak_flops / figures.clock_hz
    print(f"{'kernel':8}{'blocks':>14}{'cycles per chunk':>18}  part of the peak")
    for kind in kinds:
        blocks = getattr(kernels, kind)
        steps = (
            tokens // blocks.tokens if kind == "suffix" else (d_ff if kind == "forward" else width) // blocks.columns
        )
        plain, every = (device_cycles(given.chip, kind, tokens, (width, d_ff), per_chunk=on) for on in (False, True))
        cycles = plain + (every - plain) / steps if plain and every else 0.0
        part = FLOPS[kind] * tokens * width * d_ff / (flops_per_cycle * cycles) if cycles else 0.0
        shown = f"{cycles:>18.0f}  {part:.3f}" if cycles else f"{'-':>18}"
        print(f"{kind:8}{f'{blocks[0]}/{blocks[1]}':>14}{shown}", flush=True)


if __name__ == "__main__":
    main()
