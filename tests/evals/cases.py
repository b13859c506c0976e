"""Small models, stores and rows for the tests of evaluations."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intttrain.config import Config, EvalConfig, ModelConfig, RopeConfig, TTTConfig, default_config, resolve
from intttrain.data import Batch, StoreWriter, TokenStore, document_rows
from intttrain.data.tokenizers import ByteTokenizer
from intttrain.model import Params, abstract_params

END = 3
SEQ_LEN, CHUNK = 32, 8
TTT = TTTConfig(layers=(0, 1), chunk_tokens=CHUNK, eta=0.5)
MODEL = ModelConfig(
    family="qwen3", vocab_size=24, d_model=16, d_ff=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    rope=RopeConfig(theta=1e4), ttt=TTT, compute_dtype="float32", remat="none", loss_chunk_tokens=8,
)  # fmt: skip
DENSE = dataclasses.replace(MODEL, ttt=None)
EVAL = EvalConfig(
    seq_len=SEQ_LEN, documents=8, min_document_tokens=12, position_edges=(5, 16, 32), batch_rows=4,
    bootstrap_samples=50, seed=1,
)  # fmt: skip


class SmallTokenizer(ByteTokenizer):
    """Only what a store records; ids are any numbers below ``vocab_size``."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.end_of_document = END
        self.fingerprint = "small"
        self.description = "small"


def make_store(path: Path, lengths: list[int], *, vocab_size: int = 24, seed: int = 0) -> TokenStore:
    """Writes documents of the given lengths (end id included) with skewed random ids."""
    generator = np.random.default_rng(seed)
    with StoreWriter(path, tokenizer=SmallTokenizer(vocab_size), source="test") as writer:
        for i, length in enumerate(lengths):
            ids = (vocab_size * generator.random(length - 1) ** 2).astype(np.int64)
            writer.add(np.where(ids == END, END + 1, ids), f"doc{i}")
    return TokenStore.open(path)


def make_rows(store: TokenStore, config: EvalConfig = EVAL) -> list[Batch]:
    return document_rows(
        store,
        seq_len=config.seq_len,
        min_document_tokens=config.min_document_tokens,
        max_documents=config.documents,
        seed=config.seed,
    ).rows


def make_params(*, dense: bool = False, fresh: bool = False) -> Params:
    """Returns parameters of ``MODEL``, or of ``DENSE`` with equal weights.

    Unless ``fresh``, the convolution is such that the state becomes about twice as large as W0.
    """
    params = {name: value for name, value in _drawn().items() if name != "ttt"}
    if dense:
        return params
    ttt = dict(_drawn()["ttt"])
    if not fresh:
        ttt["conv"] = 3e3 * jax.random.normal(jax.random.key(1), ttt["conv"].shape, ttt["conv"].dtype)
    return params | {"ttt": ttt}


@functools.cache
def _drawn() -> Params:
    """Returns a fresh ``MODEL``; drawn with numpy, because compiling ``init_params`` takes longer than the tests."""
    generator = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        values = 0.0 if "conv" in name else MODEL.initializer_range * generator.standard_normal(leaf.shape)
        return jnp.full(leaf.shape, values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(MODEL))


def make_config(model: ModelConfig = MODEL, *, tokenizer: str = "byte") -> Config:
    tree = default_config()
    config = resolve(tree)
    prepare = dataclasses.replace(
        config.prepare, tokenizer=dataclasses.replace(config.prepare.tokenizer, kind=tokenizer, path="unused")
    )
    return dataclasses.replace(config, name="tiny", model=model, eval=EVAL, prepare=prepare)
