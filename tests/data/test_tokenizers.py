"""Tokenizers: text survives, the end id is never produced by text, and mistakes are explained."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers

from intttrain.config import TokenizerConfig
from intttrain.config.errors import UserError
from intttrain.data import Tokenizer, make_tokenizer
from tests.data.plain import one_line

END = "<|endoftext|>"
TEXTS = ["", "hello world", "zwölf Größen", "日本語 🎉", "a\r\n\tb  c\n", "\ufeffmark", "e\u0301 nfd"]


@pytest.fixture
def huggingface_file(tmp_path):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(["hello world, the quick brown fox"] * 20, trainer)
    bpe.enable_truncation(4)  # as some published files do
    bpe.enable_padding(length=4)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, bpe.token_to_id(END))]
    )
    path = tmp_path / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.fixture(scope="session")
def sentencepiece_model():
    draw = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(draw.choices("hello wrd", k=30)) for _ in range(200)]), model_writer=model,
        vocab_size=300, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=9,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture
def sentencepiece_file(tmp_path, sentencepiece_model):
    (tmp_path / "sp.model").write_bytes(sentencepiece_model)
    return tmp_path / "sp.model"


@pytest.fixture(params=["byte", "huggingface", "sentencepiece"])
def tokenizer(request):
    if request.param == "byte":
        return make_tokenizer(TokenizerConfig(kind="byte"))
    path = request.getfixturevalue(f"{request.param}_file")
    end = END if request.param == "huggingface" else "</s>"
    return make_tokenizer(TokenizerConfig(kind=request.param, path=str(path), end_of_document=end))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text
    assert not len(ids) or ids.max() < tokenizer.vocab_size


def test_many_equals_one_by_one(tokenizer):
    for many, text in zip(tokenizer.encode_many(TEXTS), TEXTS, strict=True):
        assert many.dtype == np.uint32
        np.testing.assert_array_equal(many, tokenizer.encode(text))


def test_interface(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert 0 <= tokenizer.end_of_document < tokenizer.vocab_size
    assert tokenizer.description and tokenizer.fingerprint


@pytest.mark.parametrize("text", [END, f"a{END}b", "<|im_end|>", "</s>", "x</s>"])
def test_text_cannot_forge_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == text


def test_added_tokens_that_are_not_special_are_vocabulary(huggingface_file):
    bpe = tokenizers.Tokenizer.from_file(str(huggingface_file))
    bpe.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    bpe.save(str(huggingface_file))

    def make(end):
        return make_tokenizer(TokenizerConfig(kind="huggingface", path=str(huggingface_file), end_of_document=end))

    ids = make(END).encode(f"a<think>{END}").tolist()
    assert ids.count(bpe.token_to_id("<think>")) == 1 and bpe.token_to_id(END) not in ids
    for ordinary in ("<think>", "l", "\u0120the"):  # which text spells " the"
        with pytest.raises(UserError) as error:
            make(ordinary)
        assert repr(ordinary) in one_line(error) and "special token" in one_line(error)


def test_user_defined_symbols_are_vocabulary(tmp_path):
    path = tmp_path / "symbols.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["hello world"] * 50), model_writer=file, vocab_size=300, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, minloglevel=9, user_defined_symbols=["<end_of_turn>"],
            control_symbols=["<end>"],
        )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def make(end):
        return make_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path), end_of_document=end))

    ids = make("<end>").encode("hello<end_of_turn><end>").tolist()
    assert ids.count(sp.piece_to_id("<end_of_turn>")) == 1 and sp.piece_to_id("<end>") not in ids
    with pytest.raises(UserError, match="<end_of_turn>"):
        make("<end_of_turn>")


def test_long_text_is_not_truncated(tokenizer):
    assert tokenizer.decode(tokenizer.encode("hello world " * 50)) == "hello world " * 50


def test_ids_outside_the_vocabulary_are_visible(tokenizer):
    ids = tokenizer.encode("ab")
    shown = tokenizer.decode([*ids[:1], tokenizer.vocab_size, tokenizer.vocab_size + 99, *ids[1:]])
    assert shown.count("\ufffd") == 2 and shown.replace("\ufffd", "") == "ab"


def test_bytes():
    tokenizer = make_tokenizer(TokenizerConfig(kind="byte"))
    assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.fingerprint) == (257, 256, "byte")
    assert tokenizer.encode("aß").tolist() == [97, 0xC3, 0x9F]
    assert tokenizer.decode(np.array([0xC3], np.uint8)) == "\ufffd"
    assert tokenizer.encode("bad\udcff").tolist() == [98, 97, 100, 0xFF]  # an undecodable command-line argument
    assert tokenizer.files() == []


def test_files_and_directory(huggingface_file, sentencepiece_file):
    (huggingface_file.parent / "tokenizer_config.json").write_text("{}")
    config = TokenizerConfig(kind="huggingface", path=str(huggingface_file.parent), end_of_document=END)
    assert make_tokenizer(config).files() == [huggingface_file, huggingface_file.parent / "tokenizer_config.json"]
    config = TokenizerConfig(kind="sentencepiece", path=str(sentencepiece_file), end_of_document="</s>")
    assert make_tokenizer(config).files() == [sentencepiece_file]


def test_fingerprint_is_content_and_end_piece(huggingface_file, tmp_path):
    def fingerprint(path, end=END):
        return make_tokenizer(TokenizerConfig(kind="huggingface", path=str(path), end_of_document=end)).fingerprint

    copy = tmp_path / "copy.json"
    copy.write_bytes(huggingface_file.read_bytes())
    assert fingerprint(copy) == fingerprint(huggingface_file)
    assert fingerprint(copy, "<|im_end|>") != fingerprint(huggingface_file)
    copy.write_bytes(huggingface_file.read_bytes() + b"\n")
    assert fingerprint(copy) != fingerprint(huggingface_file)


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_end_piece_mistakes(kind, request):
    path = str(request.getfixturevalue(f"{kind}_file"))
    near = END if kind == "huggingface" else "</s>"
    for piece in (None, "<|endoftxt|>" if kind == "huggingface" else "<s/>"):
        with pytest.raises(UserError) as error:
            make_tokenizer(TokenizerConfig(kind=kind, path=path, end_of_document=piece))
        assert repr(near) in one_line(error) and path in one_line(error)
        assert "tokenizer.end_of_document" in one_line(error)


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_file_mistakes(kind, tmp_path):
    with pytest.raises(UserError) as error:
        make_tokenizer(TokenizerConfig(kind=kind, end_of_document=END))
    assert "tokenizer.path is not set" in one_line(error)
    with pytest.raises(UserError) as error:
        make_tokenizer(TokenizerConfig(kind=kind, path=str(tmp_path / "no"), end_of_document=END))
    assert str(tmp_path / "no") in one_line(error)
    for content in (b"", b"junk", b"{}"):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError) as error:
            make_tokenizer(TokenizerConfig(kind=kind, path=str(tmp_path / "bad"), end_of_document=END))
        assert str(tmp_path / "bad") in one_line(error)


@pytest.mark.parametrize("field", ["path", "end_of_document"])
def test_bytes_take_no_settings(field):
    with pytest.raises(UserError, match=f"tokenizer.{field}='x' has no meaning"):
        make_tokenizer(TokenizerConfig(kind="byte", **{field: "x"}))
