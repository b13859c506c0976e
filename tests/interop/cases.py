"""Tiny models with weights large enough that every part of them, the update included, moves the logits."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np

from intttrain.config import Llama3Scaling, ModelConfig, RopeConfig, TTTConfig, YarnScaling
from intttrain.config.dotted import unflatten
from intttrain.interop.export import ExportResult, export_model
from intttrain.interop.names import leaf_shapes

CHUNK = 4
VOCAB = 50
TTT = TTTConfig(layers=(0, 2), chunk_tokens=CHUNK, eta=0.2)
LLAMA3 = Llama3Scaling(kind="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)
YARN = YarnScaling(kind="yarn", factor=4.0, original_max_position=16, beta_fast=4.0)


def make_model(family: str = "qwen3", ttt: TTTConfig | None = TTT, scaling: Any = None, **changes: Any) -> ModelConfig:
    """Every size differs from every other (N H and K H from D too), so that no transposition goes unnoticed."""
    model = ModelConfig(
        family=family, vocab_size=VOCAB, d_model=20, d_ff=28, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
        rope=RopeConfig(theta=100.0, scaling=scaling), ttt=ttt,
        compute_dtype="float32", attention="dense", remat="none",
    )  # fmt: skip
    return dataclasses.replace(model, **changes)


def make_ttt(**changes: Any) -> TTTConfig:
    return dataclasses.replace(TTT, **changes)


def make_params(model: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Returns a random parameter tree; norm scales around one, matrices scaled by their fan-in."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in leaf_shapes(model).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if path.endswith(("scale", "_norm")):
            leaves[path] = 1 + 0.2 * noise
        elif path == "ttt.conv":
            leaves[path] = 0.5 * noise
        else:
            leaves[path] = noise * np.float32(0.5 if path in ("embed.weight", "head.weight") else model.d_model**-0.5)
    return unflatten(leaves)


def export(model: ModelConfig, output: Path, params: dict[str, Any] | None = None, **changes: Any) -> ExportResult:
    """Exports in float32 without a tokenizer."""
    choices: dict[str, Any] = {"tokenizer_files": (), "dtype": "float32", "end_of_document": None}
    return export_model(make_params(model) if params is None else params, model, output, **(choices | changes))


def random_tokens(rows: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def cache_name() -> str:
    """Returns what the installed transformers calls the cache, as an argument and in outputs (5.24 renamed it)."""
    import transformers

    known = inspect.signature(transformers.Qwen3ForCausalLM.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in known)
