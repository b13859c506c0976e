"""Decoding on a CPU: with the update on, off, and without TTT, beside the exported model under ``transformers``.

    taskset -c 0 python -m tests.benchmarks.decode

All sides have the same random weights of the size of ``configs/tiny.py``, read the same prompts of two chunks in
float32 and continue greedily. What is timed is one whole chunk of tokens in every row, so one commit is part of it;
prompts are not. ``transformers`` is called token by token without the bookkeeping of its ``generate``. The clock is the
processor time of this process, which other programs disturb less than the time of day; sides take turns.

Letters: B row, T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.tiny import get_config
from intttrain.config import ModelConfig, resolve
from intttrain.model import DecodeState, Generator, Request, Sampling
from tests.interop.cases import export, make_params

DRAWS = 16  # tokens before the clock starts, and of one look of the host
BATCHES = (1, 4, 16)
CLOCK = time.process_time


def make_prompts(rows: int, model: ModelConfig, chunk_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.vocab_size - 1, (rows, 2 * chunk_tokens)).astype(np.int32)


def make_generator(model: ModelConfig, params: Any, rows: int, chunk_tokens: int, eta: float, draws: int) -> Generator:
    return Generator(model, params, rows=rows, max_tokens=3 * chunk_tokens + DRAWS, eta=eta, draws=draws)


def run_ours(generator: Generator, prompts_BT: np.ndarray, new_tokens: int) -> tuple[np.ndarray, list[float]]:
    """Returns what was drawn (B x new tokens), and when the host had each look's tokens of the last row, seconds."""
    rows = len(prompts_BT)
    drawn: list[list[int]] = [[] for _ in range(rows)]
    times = []
    requests = [Request(row, prompt, new_tokens) for row, prompt in enumerate(prompts_BT)]
    for piece in generator.run(requests, Sampling()):
        drawn[piece.sequence] += piece.tokens.tolist()
        if piece.sequence == rows - 1:
            times.append(CLOCK())
    return np.asarray(drawn), times


def decode_ours(generator: Generator, prompts_BT: np.ndarray, timed: int) -> tuple[np.ndarray, float]:
    """Returns what was drawn, and tokens/s."""
    drawn, times = run_ours(generator, prompts_BT, DRAWS + timed)
    return drawn, len(prompts_BT) * timed / (times[-1] - times[0])


def time_burst(generator: Generator, prompts_BT: np.ndarray, chunk_tokens: int, repeats: int) -> tuple[float, float]:
    """Returns the median seconds of an ordinary step and of one that fills a chunk; the generator draws singly."""
    run_ours(generator, prompts_BT, 2)
    ordinary, full = [], []
    for _ in range(repeats):
        _, times = run_ours(generator, prompts_BT, chunk_tokens + 8)
        steps = np.diff(times)  # [k] draws and reads token k + 2 after the prompt, which ends with a chunk
        full.append(steps[chunk_tokens - 2])
        ordinary += np.delete(steps, chunk_tokens - 2).tolist()
    return statistics.median(ordinary), statistics.median(full)


def decode_torch(model: Any, prompts_BT: np.ndarray, timed: int) -> tuple[np.ndarray, float]:
    """Returns what the exported model draws, and tokens/s."""
    import torch

    with torch.no_grad():
        out = model(torch.as_tensor(prompts_BT, dtype=torch.long), use_cache=True)
        drawn = []
        for step in range(DRAWS + timed):
            if step == DRAWS:
                start = CLOCK()
            token_B1 = out.logits[:, -1:].argmax(dim=-1)
            drawn.append(token_B1.numpy())
            out = model(token_B1, past_key_values=out.past_key_values, use_cache=True)
    return np.concatenate(drawn, axis=1), len(prompts_BT) * timed / (CLOCK() - start)


def print_memory(state: DecodeState) -> None:
    """Prints the bytes of one row by part."""
    fast = state.ttt
    assert fast is not None
    parts = {
        "keys and values": state.keys,
        "S": fast.s_nBDF,
        "open chunk": (fast.z_nBCF, fast.x_nBCD, fast.o_nBCD),
        "all": state,
    }
    rows = state.length_B.shape[0]
    sizes = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(part)) // rows for name, part in parts.items()}
    print("\nbytes per row: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))


def load_exported(folder: Path, model: ModelConfig, params: Any) -> Any:
    import transformers

    export(model, folder, params)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model = resolve(get_config()).model
    assert model.ttt is not None
    chunk, eta = model.ttt.chunk_tokens, model.ttt.eta
    dense = dataclasses.replace(model, ttt=None)
    params = jax.tree.map(jax.numpy.asarray, make_params(model))
    dense_params = {name: leaf for name, leaf in params.items() if name != "ttt"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_MODULES_CACHE=f"{folder}/modules", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
        exported = load_exported(Path(folder) / "ttt", model, params)
        exported_dense = load_exported(Path(folder) / "dense", dense, dense_params)
    print(f"{'rows':>4}  {'side':26}{'tokens/s':>9}  lowest-highest", flush=True)
    for rows in BATCHES:
        prompts_BT = make_prompts(rows, model, chunk)
        on = make_generator(model, params, rows, chunk, eta, DRAWS)
        off = make_generator(model, params, rows, chunk, 0.0, DRAWS)
        twin = make_generator(dense, dense_params, rows, chunk, 0.0, DRAWS)
        sides: dict[str, Callable[[], tuple[np.ndarray, float]]] = {
            "update on": functools.partial(decode_ours, on, prompts_BT, chunk),
            "transformers, update on": functools.partial(decode_torch, exported, prompts_BT, chunk),
            "update off": functools.partial(decode_ours, off, prompts_BT, chunk),
            "dense": functools.partial(decode_ours, twin, prompts_BT, chunk),
            "transformers, dense": functools.partial(decode_torch, exported_dense, prompts_BT, chunk),
        }
        drawn = {name: run()[0] for name, run in sides.items()}  # compiles
        speeds = [{name: run()[1] for name, run in sides.items()} for _ in range(repeats)]
        for name in sides:
            found = [speed[name] for speed in speeds]
            spread = f"{min(found):,.0f}-{max(found):,.0f}"
            print(f"{rows:>4}  {name:26}{statistics.median(found):>9,.0f}  {spread}", flush=True)
        for name in ("update on", "dense"):
            print(
                f"{rows:>4}  {name}: {np.mean(drawn[name] == drawn[f'transformers, {name}']):.1%} of the tokens equal"
            )
        single = make_generator(model, params, rows, chunk, eta, 1)
        ordinary, full = time_burst(single, prompts_BT, chunk, repeats)
        print(f"{rows:>4}  a step {ordinary * 1e3:.2f} ms, one that fills a chunk {full * 1e3:.2f} ms", flush=True)
    print_memory(on.state)


if __name__ == "__main__":
    main()
