"""One training step of a TTT block on a CPU: ours beside PyTorch that materialises every chunk's weight.

    python -m tests.benchmarks.ttt_layer

Both sides run in a process of their own, with the same weights, input and loss (mean squared error), in float32 on all
cores; the loss and every gradient have to agree. Memory is what the process holds at the highest point of one step
beyond what it held before it (``VmHWM`` of Linux), so compilation and inputs do not count.

Letters: B row, T tokens, D model width, F feed-forward width, W conv taps.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ETA = 0.3
SIDES = ("jax", "torch")
Arrays = dict[str, np.ndarray]


def problem(chunks: int, chunk_tokens: int, d_model: int, d_ff: int) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Returns the weights of a block, its input and what it should return (B T D)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    weights = {
        "gate": normal(d_model, d_ff, scale=d_model**-0.5),
        "up": normal(d_model, d_ff, scale=d_model**-0.5),
        "down": normal(d_model, d_ff, scale=d_ff**-0.5),
        "target": normal(d_model, d_model, scale=0.02 * d_model**-0.5),
        "conv": normal(5, d_model, scale=0.3),
    }
    shape = (1, chunks * chunk_tokens, d_model)
    return weights, normal(*shape, scale=1.0), normal(*shape, scale=1.0)


def jax_step(chunk_tokens: int) -> Callable[..., Any]:
    """Returns the loss and gradients of our block as a function of weights, input and wanted output."""
    import jax
    import jax.numpy as jnp

    from intttrain import ttt

    def loss(weights: Any, h_BTD: Any, wanted_BTD: Any) -> Any:
        segments_BT = jnp.ones(h_BTD.shape[:2], jnp.int32)
        z_BTF = jax.nn.silu(h_BTD @ weights["gate"]) * (h_BTD @ weights["up"])
        v_BTD = ttt.make_targets(h_BTD, weights["target"], weights["conv"], segments_BT, chunk_tokens)
        output = ttt.fast_weight_projection(
            z_BTF, v_BTD, weights["down"], segments_BT, chunk_tokens=chunk_tokens, eta=jnp.asarray(ETA)
        )
        return jnp.mean(jnp.square(output.o_BTD - wanted_BTD))

    return jax.value_and_grad(loss)


def run_jax(given: Any, chunk_tokens: int) -> tuple[Callable[[], Any], Callable[[Any], tuple[float, Arrays]]]:
    """Returns one step, compiled, and what reads its result."""
    import jax

    arguments = jax.device_put(given)
    compiled = jax.jit(jax_step(chunk_tokens)).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments)), lambda found: (
        float(found[0]),
        {name: np.asarray(gradient) for name, gradient in found[1].items()},
    )


def run_torch(given: Any, chunk_tokens: int) -> tuple[Callable[[], Any], Callable[[Any], tuple[float, Arrays]]]:
    """The same for PyTorch."""
    import torch

    from tests.benchmarks import torch_layer

    weights, *arrays = given
    tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    arguments = (tensors, *map(torch.from_numpy, arrays), chunk_tokens, ETA)
    return lambda: torch_layer.step(*arguments), lambda found: (
        float(found[0]),
        {name: gradient.numpy() for name, gradient in found[1].items()},
    )


def memory_kib(field: str) -> int:
    """Returns a line of ``/proc/self/status``: VmRSS now, or VmHWM, its highest since it was reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def measure(side: str, shape: tuple[int, int, int, int], steps: int, gradients: Path) -> dict[str, float]:
    """Runs one side; writes its gradients and returns loss, peak memory of a step in MiB and seconds per step."""
    given = problem(*shape)
    step, read = (run_jax if side == "jax" else run_torch)(given, shape[1])
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory_kib("VmRSS")
    found = step()
    peak = memory_kib("VmHWM") - before
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        found = step()
        seconds.append(time.perf_counter() - start)
    loss, arrays = read(found)
    np.savez(gradients, **arrays)
    return {"loss": loss, "peak_mib": peak / 1024, "seconds": statistics.median(seconds)}


def farthest(one: Path, other: Path) -> float:
    """Returns the largest difference of two gradients, relative to the largest entry of its array."""
    with np.load(one) as a, np.load(other) as b:
        assert set(a) == set(b)
        return max(float(np.max(np.abs(a[name] - b[name])) / np.max(np.abs(a[name]))) for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--chunk_tokens", type=int, default=128)
    parser.add_argument("--d_model", type=int, default=1024)
    parser.add_argument("--d_ff", type=int, default=3072)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not")
    parser.add_argument("--folder", type=Path, default=Path("runs/ttt_layer"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = given.chunks, given.chunk_tokens, given.d_model, given.d_ff
    gradients = {side: given.folder / f"{side}.npz" for side in SIDES}
    if given.side is not None:
        print(json.dumps(measure(given.side, shape, given.steps, gradients[given.side])))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for side in SIDES:
        command = [sys.executable, "-m", "tests.benchmarks.ttt_layer", *sys.argv[1:], f"--side={side}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    tokens = given.chunks * given.chunk_tokens
    print(f"{given.chunks} chunks of {given.chunk_tokens} tokens, D {given.d_model}, F {given.d_ff}, float32")
    print("| | loss | seconds a step | tokens/s | peak MiB of a step |\n|---|---|---|---|---|")
    for side, r in found.items():
        print(f"| {side} | {r['loss']:.6f} | {r['seconds']:.3f} | {tokens / r['seconds']:,.0f} | {r['peak_mib']:.0f} |")
    speed = found["torch"]["seconds"] / found["jax"]["seconds"]
    memory = found["jax"]["peak_mib"] / found["torch"]["peak_mib"]
    print(f"ours: {speed:.2f} x the tokens/s with {memory:.2f} of the memory")
    print(f"gradients differ by at most {farthest(gradients['jax'], gradients['torch']):.1e} of the largest entry")


if __name__ == "__main__":
    main()
