"""Tokenizer files beside the weights: ``AutoTokenizer`` loads them, and generation stops where a document ends."""

from __future__ import annotations

import json

import pytest

from intttrain.config.errors import UserError
from tests.interop.cases import VOCAB, export, make_model

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.hf

END = VOCAB - 1


@pytest.fixture
def tokenizer_file(tmp_path):
    vocab = {f"w{i}": i for i in range(END)} | {"<|end|>": END}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|end|>"])
    path = tmp_path / "my_vocabulary.json"  # a name of the user's own
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_auto_tokenizer_loads_and_pads_left(tmp_path, tokenizer_file, family):
    result = export(make_model(family), tmp_path / "out", tokenizer_files=[tokenizer_file], end_of_document=END)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(result.files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|end|>", END, END)
    batch = tokenizer(["w3 w14", "w1 w5 w9"], padding=True)
    assert batch["input_ids"] == [[END, 3, 14], [1, 5, 9]]
    assert batch["attention_mask"] == [[0, 1, 1], [1, 1, 1]]
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id) == (END, END)


def test_files_keep_their_names_and_are_not_overwritten(tmp_path, tokenizer_file):
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"mine": 1}))
    result = export(make_model(), tmp_path / "out", tokenizer_files=[tokenizer_file, settings], end_of_document=END)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"mine": 1}
    assert not [note for note in result.notes if "tokenizer" in note]
    pieces = tmp_path / "pieces.model"
    pieces.write_bytes(b"sentencepiece")
    export(make_model(), tmp_path / "other", tokenizer_files=[pieces])
    assert (tmp_path / "other/tokenizer.model").read_bytes() == b"sentencepiece"
    with pytest.raises(UserError, match="tokenizer files contain tokenizer.json twice"):
        export(make_model(), tmp_path / "third", tokenizer_files=[tokenizer_file, tokenizer_file])
    assert not (tmp_path / "third").exists()
