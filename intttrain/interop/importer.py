"""A Hugging Face folder (a stock model, the In-Place TTT release's, or our export) -> our parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the bfloat16 that safetensors returns)
import numpy as np
from safetensors import safe_open

from intttrain.config import ModelConfig
from intttrain.config.dotted import unflatten
from intttrain.config.errors import UserError
from intttrain.interop.export import INDEX_FILE
from intttrain.interop.hf_config import TTT_KEYS, read_hf_config
from intttrain.interop.names import TTT_TENSOR, leaf_shapes, list_tensors

_SINGLE_FILE = "model.safetensors"
_FLOATS = ("float32", "bfloat16", "float16", "float64")


def load_hf_folder(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the architecture and our parameter tree (numpy, float32), read tensor by tensor.

    Args:
      path: a folder with ``config.json`` and safetensors weights, in one file or in indexed shards.

    Raises:
      UserError: a file, key or tensor is missing; a tensor has another shape than the config says (both are
        shown); a tensor has no place in the model; TTT tensors without TTT keys, or keys without tensors.
    """
    config_path = path / "config.json"
    model = read_hf_config(_read_json(config_path), str(config_path))
    files = _tensor_files(path)
    _check_names(model, files, path)
    leaves = {leaf: np.empty(shape, np.float32) for leaf, shape in leaf_shapes(model).items()}
    with _Reader(path, files) as reader:
        for tensor in list_tensors(model):
            array = reader.read(tensor.name, tensor.shape)
            leaves[tensor.rule.path][... if tensor.index is None else tensor.index] = tensor.restore(array)
        if model.tie_embeddings and "lm_head.weight" in files:
            head = reader.read("lm_head.weight", (model.vocab_size, model.d_model))
            if not np.array_equal(head, leaves["embed.weight"].astype(head.dtype)):
                raise UserError(
                    f"{config_path}: tie_word_embeddings is true, but lm_head.weight differs from "
                    "model.embed_tokens.weight; set tie_word_embeddings to false to keep both"
                )
    return model, unflatten(leaves)


class _Reader:
    """Reads single tensors from several files, each opened once (memory-mapped)."""

    def __init__(self, folder: Path, files: dict[str, str]):
        self._folder, self._files = folder, files
        self._open: dict[str, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.clear()

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the tensor in its stored dtype. Raises ``UserError`` when its shape is not ``shape``."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, framework="numpy")
        found = tuple(self._open[file].get_slice(name).get_shape())
        if found != shape:
            raise UserError(f"{self._folder / file}: {name} has shape {found}, config.json says {shape}")
        array = self._open[file].get_tensor(name)
        if array.dtype.name not in _FLOATS:
            raise UserError(
                f"{self._folder / file}: {name} has dtype {array.dtype.name} (quantised?); "
                f"use a checkpoint in one of {', '.join(_FLOATS)}"
            )
        return array


def _tensor_files(path: Path) -> dict[str, str]:
    """Returns ``{tensor name: file name}``."""
    if (path / INDEX_FILE).exists():
        files = dict(_read_json(path / INDEX_FILE)["weight_map"])
        absent = sorted(name for name in set(files.values()) if not (path / name).exists())
        if absent:
            raise UserError(f"{path / INDEX_FILE} names {absent[0]}, which does not exist; copy all shards")
        return files
    if not (path / _SINGLE_FILE).exists():
        raise UserError(f"{path} has neither {_SINGLE_FILE} nor {INDEX_FILE}; only safetensors weights are read")
    with safe_open(path / _SINGLE_FILE, framework="numpy") as file:
        return dict.fromkeys(file.keys(), _SINGLE_FILE)


def _check_names(model: ModelConfig, files: dict[str, str], path: Path) -> None:
    """Compares the tensors that exist with those of ``model``; TTT mismatches get their own message."""
    expected = {tensor.name for tensor in list_tensors(model)}
    ignored = {"lm_head.weight"} if model.tie_embeddings else set()
    missing = sorted(expected - set(files))
    # Old Llama checkpoints store the RoPE frequencies, which follow from the config.
    extra = sorted(n for n in set(files) - expected - ignored if not n.endswith("rotary_emb.inv_freq"))
    for name in extra:
        if TTT_TENSOR.search(name):
            has = "no TTT keys" if model.ttt is None else f"ttt_layers={list(model.ttt.layers)}"
            raise UserError(
                f"{path}: the weights hold {name}, but config.json has {has}, so its update would be silently off; "
                f"restore {', '.join(TTT_KEYS)} in config.json"
            )
    for name in missing:
        if TTT_TENSOR.search(name) and model.ttt is not None:
            raise UserError(
                f"{path}: config.json has ttt_layers={list(model.ttt.layers)} and ttt_target={model.ttt.target!r}, but "
                f"the weights have no {name}; use the weights that belong to this config or remove the ttt_ keys"
            )
    if missing:
        raise UserError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); the download is incomplete")
    if extra:
        raise UserError(f"{path}: tensor {extra[0]} has no place in a {model.family} model ({len(extra)} such)")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; a Hugging Face folder has config.json and safetensors weights"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error.msg} in line {error.lineno}); download it again") from None
