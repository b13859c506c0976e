"""Measures the efficiencies of ``attention_cost.py``: ``python -m tests.benchmarks.profile_attention --chip=v5p``.

Needs libtpu, no TPU, and minutes. Each kernel is compiled alone, for one device, in a process of its own, because the
compiler's static profile ends the process on programs that it does not know. The profile counts nothing for code that
depends on run-time values, and splash runs a block only if its block table says so: the table is taken away, so that
every block of a square of up to 4096 tokens is computed, causal comparison and segment ids included. What stays
uncounted is the arithmetic that sets up and finishes a row of blocks, and the waiting of copies for each other. v4 is
not supported by the profile. ``--skipped`` keeps the table: then no block is
counted, and what is left is the cost of grid steps that skip their block. Two sizes are subtracted so that the cost
of a row of blocks falls out: ``(cycles(2T) - 2 cycles(T)) / (steps(2T) - 2 steps(T))``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intttrain.layout import hardware
from intttrain.layout.compiler import compiler_options
from intttrain.planner.xla.hlo import possible_cycles

TOPOLOGY = {"v4": "v4:2x2x1", "v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
_DOTS = {"fwd": 2, "bwd": 5, "dkv": 4, "dq": 3}
_BLOCKS = ("256", "512", "1024", "2048", "1024/2048/512")
_HEADS, _DEPTH = 2, 128  # one key head for each core of a device
_ESTIMATE = re.compile(r'hlo_op_name: "(\S+)"\s+estimated_cycles: (-?\d+)')


def read_blocks(text: str) -> tuple[int, int, int]:
    """Reads queries / keys / keys at once: ``"1024/2048/512"``, or ``"512"`` for three times the same."""
    parts = [int(part) for part in text.split("/")]
    q, kv, compute = parts if len(parts) == 3 else parts * 3
    return q, kv, compute


def _kernel(kind: str, tokens: int, q: int, kv: int, compute: int, *, skipped: bool) -> splash.SplashAttentionKernel:
    apart: dict[str, Any] = {} if kind == "bwd" else {"block_q_dq": q, "block_kv_dq": kv}
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=compute, use_fused_bwd_kernel=not apart, **apart,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens))])
    made = splash.make_splash_mqa(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    if skipped:
        return made
    infos = [
        info and info._replace(data_next=None, mask_next=None, block_mask=None)
        for info in (made.fwd_mask_info, made.dq_mask_info, made.dkv_mask_info)
    ]
    return splash.SplashAttentionKernel(*infos, **made.kwargs)


def square(blocks: tuple[int, int, int]) -> int:
    """Tokens of the measured square: 4096 where that is 2 to 8 blocks; the profile walks every step of the grid."""
    return min(8 * max(blocks), max(4096, 2 * max(blocks)))


def compile_kernel(chip: str, kind: str, blocks: tuple[int, int, int], tokens: int, *, skipped: bool) -> None:
    """Compiles one kernel for one device, with key heads added by ``jax.vmap`` so that all of its cores work."""
    hardware.prepare_topology_compilation()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip]).devices
    everywhere = NamedSharding(Mesh(np.array(devices[:1]), ("one",)), PartitionSpec())
    attend = jax.vmap(_kernel(kind, tokens, *blocks, skipped=skipped), in_axes=(0, 0, 0, None))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, do: jax.Array) -> object:
        o, pullback = jax.vjp(lambda *qkv: attend(*qkv, splash.SegmentIds(segment_ids, segment_ids)), q, k, v)
        if kind == "fwd":
            return o, pullback
        dq, dk, dv = pullback(do)
        return {"bwd": (dq, dk, dv), "dkv": (dk, dv), "dq": dq}[kind]

    q = jax.ShapeDtypeStruct((_HEADS, 1, tokens, _DEPTH), jnp.bfloat16, sharding=everywhere)
    k = jax.ShapeDtypeStruct((_HEADS, tokens, _DEPTH), jnp.bfloat16, sharding=everywhere)
    segment_ids = jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=everywhere)
    step = jax.jit(run, compiler_options=compiler_options(devices[0]))
    step.lower(q, k, k, segment_ids, q).compile()


def static_profile(module: str, arguments: list[str]) -> dict[str, int]:
    """Runs ``module``, which compiles one kernel, in a process of its own; returns estimated cycles by name.

    A number that cannot be an estimate is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["env", f"LIBTPU_INIT_ARGS=--xla_jf_dump_static_llo_profile_to={folder}", "JAX_PLATFORMS=cpu"]
            + [sys.executable, "-m", module, *arguments],
            capture_output=True, check=False,
        )  # fmt: skip
        found = _ESTIMATE.findall("".join(path.read_text() for path in Path(folder).glob("*.textproto")))
    estimates = {name: possible_cycles(written) for name, written in found}
    return {name: cycles for name, cycles in estimates.items() if cycles is not None}


def core_cycles(chip: str, kind: str, blocks: tuple[int, int, int], tokens: int, *, skipped: bool) -> float | None:
    """Cycles of one TensorCore per head; None if it cannot be compiled or profiled (e.g. too little on-chip memory)."""
    arguments = [f"--chip={chip}", f"--kernels={kind}", "--blocks=" + "/".join(map(str, blocks))]
    found = static_profile(
        "tests.benchmarks.profile_attention", [*arguments, f"--compile-only={tokens}"] + ["--skipped"] * skipped
    )
    wanted = "_dkv_" if kind == "bwd" else f"_{kind}_"
    cycles = [n for name, n in found.items() if wanted in name]
    figures = hardware.CHIPS[chip]
    return cycles[0] * (figures.tensor_cores // figures.devices) / _HEADS if cycles else None


def block_cycles(chip: str, kind: str, blocks: tuple[int, int, int]) -> float | None:
    """Cycles of one TensorCore for one computed block; None if there is no profile."""
    tokens = square(blocks)
    cycles = core_cycles(chip, kind, blocks, tokens, skipped=False)
    return cycles and cycles / (tokens // blocks[0] * (tokens // blocks[1]))


def skipped_cycles(chip: str, kind: str, blocks: tuple[int, int, int]) -> float | None:
    """Cycles of one TensorCore for a grid step that skips its block; None if there is no profile."""
    tokens = square(blocks)
    steps = tokens // blocks[0] * (tokens // blocks[1])
    whole = core_cycles(chip, kind, blocks, tokens, skipped=True)
    half = core_cycles(chip, kind, blocks, tokens // 2, skipped=True)
    return (whole - 2 * half) / (steps / 2) if whole and half else None


def main(arguments: list[str] | None = None) -> None:
    """Prints a line per kernel and blocks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=sorted(TOPOLOGY), required=True)
    parser.add_argument(
        "--kernels", default="fwd,bwd,dkv,dq", help="separated by commas; bwd: dq beside dkv in one kernel"
    )
    parser.add_argument("--blocks", default=",".join(_BLOCKS), help="queries/keys/keys at once, separated by commas")
    parser.add_argument("--skipped", action="store_true", help="the cost of a grid step that skips its block")
    parser.add_argument("--compile-only", type=int, metavar="TOKENS", help="compile one kernel and print nothing")
    given = parser.parse_args(arguments)
    kinds, shapes = given.kernels.split(","), [read_blocks(text) for text in given.blocks.split(",")]
    if given.compile_only:
        compile_kernel(given.chip, kinds[0], shapes[0], given.compile_only, skipped=given.skipped)
        return
    chip = hardware.CHIPS[given.chip]
    flops_per_cycle = chip.peak_flops / chip.tensor_cores / chip.clock_hz
    print(f"{'kernel':8}{'blocks':>18}{'cycles':>10}  part of the peak")
    for kind in kinds:
        for q, kv, compute in shapes:
            if kind == "dq" and compute != kv:
                continue  # dq computes a block of keys at once
            cycles = (skipped_cycles if given.skipped else block_cycles)(given.chip, kind, (q, kv, compute))
            part = _DOTS[kind] * 2 * _DEPTH * q * kv / (flops_per_cycle * cycles) if cycles else 0
            shown = f"{cycles:>10.0f}" + ("" if given.skipped else f"  {part:.3f}") if cycles else f"{'-':>10}"
            print(f"{kind:8}{f'{q}/{kv}/{compute}':>18}{shown}", flush=True)


if __name__ == "__main__":
    main()
