"""Our parameters -> a Hugging Face folder that plain ``transformers`` loads, whole or not at all.

Tensors are made one at a time and written shard by shard, so at most one shard exists beside the parameters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from intttrain.config import ModelConfig
from intttrain.config.dotted import flatten
from intttrain.config.errors import UserError
from intttrain.config.registry import FAMILIES
from intttrain.interop.hf_config import make_hf_config, needs_modeling_file
from intttrain.interop.implemented import MODELING_FILE, MODELING_PATH
from intttrain.interop.names import HFTensor, leaf_shapes, list_tensors
from intttrain.storage.publish import check_target_free, publish_directory

RELEASE_TARGETS = ("input_embed", "hidden_states")  # of the published code of In-Place TTT
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9

Dtype = Literal["float32", "bfloat16"]
_NUMPY_DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
      output: the folder.
      files: names of all files in it, sorted.
      parameters: number of scalars.
      tensor_bytes: size of all tensors.
      notes: things the user should know, one sentence each.
    """

    output: Path
    files: tuple[str, ...]
    parameters: int
    tensor_bytes: int
    notes: tuple[str, ...]


def export_model(
    params: Mapping[str, Any],
    model_config: ModelConfig,
    output: Path,
    *,
    tokenizer_files: Sequence[Path],
    dtype: Dtype,
    end_of_document: int | None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_position_embeddings: int | None = None,
) -> ExportResult:
    """Writes ``output``: config, weights, modelling file, tokenizer.

    Args:
      params: our parameter tree, nested dict of numpy or JAX arrays (layers stacked on axis 0).
      model_config: the architecture of ``params``.
      output: a folder that does not exist or is empty.
      tokenizer_files: copied beside the weights; empty for a model without a tokenizer of Hugging Face's kind.
      dtype: of the written tensors.
      end_of_document: its token id, also used to stop and to pad in ``generate``.
      max_shard_bytes: size of one weight file; a single larger tensor gets a file of its own.
      max_position_embeddings: advertised context length in tokens; ``None`` derives it.

    Raises:
      UserError: ``output`` is occupied, a tokenizer file does not exist, ``params`` is not a model of ``model_config``
        (names the parameter and both shapes), or its update rule or target is not in the modelling file.
    """
    check_target_free(output)
    leaves = _check_params(params, model_config)
    config = make_hf_config(
        model_config, dtype=dtype, end_of_document=end_of_document, max_position_embeddings=max_position_embeddings
    )
    tensors = list_tensors(model_config)
    with publish_directory(output) as fresh:
        _write_json(fresh / "config.json", config)
        _write_json(fresh / "generation_config.json", _generation_config(end_of_document))
        if needs_modeling_file(model_config):
            (fresh / MODELING_FILE).write_text(modeling_text(model_config.family), encoding="utf-8")
        _write_tokenizer(fresh, tokenizer_files, end_of_document)
        _write_shards(fresh, leaves, plan_shards(tensors, dtype, max_shard_bytes), dtype)
        files = tuple(sorted(path.name for path in fresh.iterdir()))
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    tensor_bytes = parameters * _NUMPY_DTYPES[dtype].itemsize
    return ExportResult(output, files, parameters, tensor_bytes, _notes(model_config, tokenizer_files))


def modeling_text(family: str) -> str:
    """Returns the modelling file, with the classes of a family that it does not define by itself."""
    text = MODELING_PATH.read_text(encoding="utf-8")
    described = FAMILIES[family]
    line = f'define_classes("{described.class_stem}", knows_window={described.window != "none"})\n'
    return text if line in text else text + line


def plan_shards(tensors: Sequence[HFTensor], dtype: Dtype, max_shard_bytes: int) -> list[list[HFTensor]]:
    """Returns the tensors cut, in order, into groups of at most ``max_shard_bytes`` (one tensor at least)."""
    shards: list[list[HFTensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * _NUMPY_DTYPES[dtype].itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _check_params(params: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Returns the leaves by dotted path after comparing names and shapes with ``model``."""
    leaves, expected = flatten(params), leaf_shapes(model)
    for path, shape in expected.items():
        if path not in leaves:
            raise UserError(f"parameter {path} {shape} is missing; the checkpoint does not belong to this model config")
        if tuple(leaves[path].shape) != shape:
            raise UserError(
                f"parameter {path} has shape {tuple(leaves[path].shape)}, the model config says {shape}; "
                "use the config that the checkpoint was trained with"
            )
    extra = sorted(set(leaves) - set(expected))
    if extra:
        raise UserError(
            f"parameter {extra[0]} {tuple(leaves[extra[0]].shape)} has no place in this model config "
            f"({len(extra)} such); use the config that the checkpoint was trained with"
        )
    return leaves


def _write_shards(folder: Path, leaves: Mapping[str, Any], shards: list[list[HFTensor]], dtype: Dtype) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {t.name: t.export(leaves[t.rule.path]).astype(_NUMPY_DTYPES[dtype]) for t in shard}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
    if len(shards) > 1:
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _generation_config(end_of_document: int | None) -> dict[str, Any]:
    # Padding is masked everywhere, so any id serves; the end of a document is the one that every tokenizer has.
    return {"eos_token_id": end_of_document, "pad_token_id": end_of_document, "use_cache": True}


def _write_tokenizer(folder: Path, files: Sequence[Path], end_of_document: int | None) -> None:
    for source in files:
        if not source.is_file():
            raise UserError(f"tokenizer file {source} does not exist; check the path of the tokenizer")
        target = folder / _tokenizer_name(source)
        if target.exists():
            raise UserError(f"tokenizer files contain {target.name} twice (second: {source}); pass each file once")
        shutil.copyfile(source, target)
    fast = folder / "tokenizer.json"
    settings = folder / "tokenizer_config.json"
    if fast.exists() and not settings.exists():
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        piece = _piece_of(json.loads(fast.read_text(encoding="utf-8")), end_of_document)
        if piece is not None:
            config |= {"eos_token": piece, "pad_token": piece, "padding_side": "left"}
        _write_json(settings, config)


def _tokenizer_name(source: Path) -> str:
    """Returns the name under which ``AutoTokenizer`` looks for this kind of file."""
    if source.suffix == ".model":
        return "tokenizer.model"
    if source.suffix == ".json" and "tokenizer" not in source.stem:
        content = json.loads(source.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            return "tokenizer.json"
    return source.name


def _piece_of(tokenizer: Mapping[str, Any], token_id: int | None) -> str | None:
    """Returns the text of ``token_id`` in a parsed ``tokenizer.json``."""
    for added in tokenizer.get("added_tokens") or ():
        if added["id"] == token_id:
            return added["content"]
    vocab = tokenizer["model"].get("vocab")
    if isinstance(vocab, dict):
        return next((piece for piece, number in vocab.items() if number == token_id), None)
    if isinstance(vocab, list) and token_id is not None and token_id < len(vocab):
        return vocab[token_id][0]  # Unigram: [piece, score]
    return None


def _notes(model: ModelConfig, tokenizer_files: Sequence[Path]) -> tuple[str, ...]:
    notes = []
    if needs_modeling_file(model):
        notes.append("load with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)")
    if model.ttt is not None:
        notes.append("loaded without trust_remote_code the model runs with its update switched off")
    if model.ttt is not None and model.ttt.target not in RELEASE_TARGETS:
        notes.append(f'ttt_target "{model.ttt.target}" is not known to the In-Place TTT release')
    if model.sliding_window is not None and FAMILIES[model.family].window == "none":
        notes.append(f"stock {model.family} ignores sliding_window={model.sliding_window}: it needs trust_remote_code")
    if not tokenizer_files:
        notes.append("no tokenizer files were copied: prompts must be token ids")
    return tuple(notes)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
