"""Folders: written whole or not at all, read back exactly, every mismatch named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from intttrain.config.dotted import flatten, unflatten
from intttrain.config.errors import UserError
from intttrain.interop import export as export_module
from intttrain.interop.importer import load_hf_folder
from intttrain.interop.names import list_tensors
from tests.interop.cases import export, make_model, make_params, make_ttt

WHOLE = ("config.json", "generation_config.json", "model.safetensors", "modeling_intttrain.py")


def assert_same(params, other):
    ours, theirs = flatten(params), flatten(other)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(theirs[path], leaf, err_msg=path)


def edit_config(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "DELETE"}))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ttt", [None, make_ttt(), make_ttt(target="next_hidden")], ids=["dense", "ttt", "next"])
def test_folder_round_trip(tmp_path, family, tied, ttt):
    model = make_model(family, ttt, tie_embeddings=tied)
    params = make_params(model)
    result = export(model, tmp_path / "out", params)
    assert result.files == (WHOLE if ttt else WHOLE[:-1])
    assert result.parameters == sum(leaf.size for _, leaf in flatten(params).items())
    read_model, read_params = load_hf_folder(tmp_path / "out")
    assert (read_model.family, read_model.ttt, read_model.tie_embeddings) == (family, ttt, tied)
    assert_same(params, read_params)


def test_bfloat16_rounds_once(tmp_path):
    model = make_model()
    params = make_params(model)
    export(model, tmp_path / "out", params, dtype="bfloat16")
    with safe_open(tmp_path / "out/model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    _, read_params = load_hf_folder(tmp_path / "out")
    assert {leaf.dtype for _, leaf in flatten(read_params).items()} == {np.dtype(np.float32)}
    rounded = {path: leaf.astype(ml_dtypes.bfloat16).astype(np.float32) for path, leaf in flatten(params).items()}
    assert_same(unflatten(rounded), read_params)


def test_shards(tmp_path, monkeypatch):
    model = make_model(tie_embeddings=False)
    params = make_params(model)
    alive = []
    monkeypatch.setattr(
        export_module,
        "save_file",
        lambda arrays, path, metadata: (
            alive.append(sum(a.nbytes for a in arrays.values())),
            save_file(arrays, path, metadata),
        ),
    )
    limit = 6000
    result = export(model, tmp_path / "out", params, max_shard_bytes=limit)
    shards = [name for name in result.files if name.endswith(".safetensors")]
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert max(alive) <= limit and sum(alive) == result.tensor_bytes
    index = json.loads((tmp_path / "out" / export_module.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == result.tensor_bytes
    assert list(index["weight_map"]) == sorted(tensor.name for tensor in list_tensors(model))
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)
    assert_same(params, load_hf_folder(tmp_path / "out")[1])


def test_a_tensor_larger_than_a_shard_gets_its_own():
    tensors = list_tensors(make_model())
    assert [len(shard) for shard in export_module.plan_shards(tensors, "float32", 1)] == [1] * len(tensors)


def test_existing_output_is_never_touched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(make_model(), out)  # an empty folder may be there
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="is never overwritten|is not a directory"):
        export(make_model("llama"), out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is never overwritten|is not a directory"):
        export(make_model(), tmp_path / "file")


def test_leftovers_of_a_killed_export_of_the_same_process_id_do_not_block(tmp_path):
    for name in (f".out.partial-{os.getpid()}", ".out.partial-1"):  # a container numbers its processes from 1
        (tmp_path / name).mkdir()
    export(make_model(), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        export(make_model(), tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        export(make_model(), tmp_path / "out", tokenizer_files=[tmp_path / "none.json"])
    assert list(tmp_path.iterdir()) == []


def test_export_compares_parameters_with_the_config(tmp_path):
    params = make_params(make_model())
    with pytest.raises(UserError, match=r"parameter ttt.conv .* has no place"):
        export(make_model(ttt=None), tmp_path / "out", params)
    with pytest.raises(UserError, match=r"parameter head.weight \(50, 20\) is missing"):
        export(make_model(tie_embeddings=False), tmp_path / "out", params)
    with pytest.raises(
        UserError, match=r"layers.mlp.gate has shape \(3, 20, 28\), the model config says \(3, 20, 32\)"
    ):
        export(make_model(d_ff=32), tmp_path / "out", params)


# --- what the importer refuses -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    export(make_model(tie_embeddings=False), tmp_path / "out")
    return tmp_path / "out"


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        load_hf_folder(folder)
    assert "\n" not in str(error.value)


def test_ttt_tensors_without_keys(folder):
    """The known failure of other converters: the base config is saved, and the update is silently off."""
    ttt_keys = dict.fromkeys(("ttt_mode", "ttt_layers", "ttt_proj", "ttt_lr", "ttt_chunk", "ttt_target"), "DELETE")
    edit_config(folder, **ttt_keys)
    refused(folder, r"ttt_\w+.weight, but config.json has no TTT keys, so its update would be silently off")


def test_ttt_switched_off_or_moved(folder):
    edit_config(folder, ttt_mode=False)
    refused(folder, "silently off")
    edit_config(folder, ttt_mode=True, ttt_layers=[0])
    refused(folder, r"layers.2.mlp.ttt_conv.weight, but config.json has ttt_layers=\[0\]")


def test_ttt_keys_without_tensors(folder):
    change_weights(folder, lambda t: t.pop("model.layers.2.mlp.ttt_proj.weight"))
    refused(folder, r"ttt_layers=\[0, 2\].*have no model.layers.2.mlp.ttt_proj.weight")


def test_missing_extra_and_misshapen_tensors(folder):
    change_weights(folder, lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)}))
    refused(folder, r"model.norm.weight has shape \(7,\), config.json says \(20,\)")
    change_weights(folder, lambda t: t.update({"model.norm.weight": np.zeros(20, np.int8)}))
    refused(folder, r"model.norm.weight has dtype int8")
    change_weights(folder, lambda t: t.pop("model.norm.weight"))
    refused(folder, r"tensor model.norm.weight is missing \(1 in all\)")
    change_weights(folder, lambda t: t.update({"model.norm.weight": np.zeros(20, np.float32), "bias": np.zeros(1)}))
    refused(folder, "tensor bias has no place in a qwen3 model")


def test_tied_embeddings(folder):
    edit_config(folder, tie_word_embeddings=True)
    refused(folder, "lm_head.weight differs from model.embed_tokens.weight")
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    model, params = load_hf_folder(folder)  # some tied checkpoints store the head twice
    assert model.tie_embeddings and "head" not in params


def test_incomplete_folders(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor model.safetensors.index.json")
    (folder / export_module.INDEX_FILE).write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    refused(folder, "model-00001-of-00002.safetensors, which does not exist")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, "config.json does not exist")
