"""Tokenizers behind one interface: bytes, Hugging Face ``tokenizer.json`` and SentencePiece models.

Encoding never adds a begin or end token: the token store appends ``end_of_document`` to every document, and nothing
else may produce it. Text that spells a special token ("<|endoftext|>") or a SentencePiece control symbol is encoded as
ordinary characters, so a corpus cannot forge a document end. Added tokens that the file does not mark as special
("<think>" of Qwen3) and user-defined symbols of SentencePiece are vocabulary like any other: text that spells one gets
its single id, and none of them can end a document.

Letters: N tokens of a text.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from intttrain.config import TokenizerConfig
from intttrain.config.errors import UserError

BYTE_END = 256
_REPLACEMENT = "\ufffd"
_HUGGINGFACE_COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      vocab_size: one more than the largest id.
      end_of_document: the id that ends every document.
      fingerprint: equal exactly for tokenizers that give equal ids.
      description: a few words for manifests and messages.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_document(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def description(self) -> str: ...

    def encode(self, text: str) -> np.ndarray:
        """Returns the uint32 ids of ``text``, without an end id."""

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns ``[encode(t) for t in texts]``, on all cores where the library can."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text; the end id is left out, ids outside the vocabulary become U+FFFD."""

    def files(self) -> list[Path]:
        """Returns the files that an exported model needs beside it (none for bytes)."""


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Returns the tokenizer that ``config`` describes.

    Raises:
      UserError: a field is missing or out of place, the file is missing or unreadable, or the end piece is unknown.
    """
    if config.kind == "byte":
        for name, value in (("path", config.path), ("end_of_document", config.end_of_document)):
            if value is not None:
                raise UserError(f'tokenizer.{name}={value!r} has no meaning with tokenizer.kind="byte"; set it to None')
        return ByteTokenizer()
    if config.path is None:
        wanted = "a tokenizer.json" if config.kind == "huggingface" else "a SentencePiece *.model file"
        raise UserError(f'tokenizer.path is not set; tokenizer.kind="{config.kind}" needs {wanted}')
    path = Path(config.path)
    if config.kind == "huggingface" and path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"tokenizer.path={config.path!r} is not a file; give the tokenizer file itself")
    if config.kind == "huggingface":
        return HuggingFaceTokenizer(path, config.end_of_document)
    return SentencePieceTokenizer(path, config.end_of_document)


class ByteTokenizer:
    """UTF-8 bytes: ids 0-255 are bytes, 256 ends a document."""

    vocab_size = BYTE_END + 1
    end_of_document = BYTE_END
    fingerprint = "byte"
    description = "byte"

    def encode(self, text: str) -> np.ndarray:
        """Returns the uint32 bytes of ``text``; undecodable bytes of a command line (surrogates) pass through."""
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), np.uint8).astype(np.uint32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the uint32 ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text; invalid UTF-8 and ids above 256 become U+FFFD."""
        ids_N = _as_ids(ids)
        ids_N = ids_N[ids_N != BYTE_END]
        inside_N = (ids_N >= 0) & (ids_N < BYTE_END)
        # 0xFF never occurs in UTF-8, so an id outside the vocabulary cannot be taken for text.
        return np.where(inside_N, ids_N, 0xFF).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def files(self) -> list[Path]:
        """Returns no file."""
        return []


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` read by the ``tokenizers`` library."""

    def __init__(self, path: Path, end_piece: str | None) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(
                f"tokenizer.path={str(path)!r} is not a readable tokenizer.json: {_one_line(error)}"
            ) from None
        # A file may carry truncation or padding from fine-tuning; documents must come through whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_of_document = _end_id(end_piece, vocabulary, path)
        self.fingerprint = _fingerprint(path, end_piece)
        self.description = f"huggingface {path.name}, documents end with {end_piece!r}"
        self._path = path
        _check_end(self, end_piece, self._tokenizer.decode([self.end_of_document], skip_special_tokens=False), path)

    def encode(self, text: str) -> np.ndarray:
        """Returns the uint32 ids of ``text``."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the uint32 ids of each text, computed on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text, with special tokens other than the end id spelled out."""
        return _decode_runs(
            ids, self.vocab_size, self.end_of_document,
            lambda run: self._tokenizer.decode(run, skip_special_tokens=False),
        )  # fmt: skip

    def files(self) -> list[Path]:
        """Returns ``tokenizer.json`` and those companions that lie beside it."""
        companions = (self._path.parent / name for name in _HUGGINGFACE_COMPANIONS)
        return [self._path, *(path for path in companions if path.is_file())]


class SentencePieceTokenizer:
    """A SentencePiece ``*.model``; its normaliser decides whether white space survives a round trip."""

    def __init__(self, path: Path, end_piece: str | None) -> None:
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer.path={str(path)!r} is not a SentencePiece model: {_one_line(error)}") from None
        self.vocab_size = int(self._processor.vocab_size())
        pieces = {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}
        self.end_of_document = _end_id(end_piece, pieces, path)
        self.fingerprint = _fingerprint(path, end_piece)
        self.description = f"sentencepiece {path.name}, documents end with {end_piece!r}"
        self._path = path
        _check_end(self, end_piece, self._processor.decode([self.end_of_document]), path)

    def encode(self, text: str) -> np.ndarray:
        """Returns the uint32 ids of ``text``."""
        return np.array(self._processor.encode(text, out_type=int), np.uint32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the uint32 ids of each text, computed on all cores."""
        return [np.array(ids, np.uint32) for ids in self._processor.encode(list(texts), out_type=int)]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text; control pieces have none."""
        return _decode_runs(ids, self.vocab_size, self.end_of_document, self._processor.decode)

    def files(self) -> list[Path]:
        """Returns the model file."""
        return [self._path]


def _as_ids(ids: Iterable[SupportsIndex]) -> np.ndarray:
    """Returns int64 ids from any iterable or array, so that comparisons cannot wrap around."""
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)


def _decode_runs(ids: Iterable[SupportsIndex], vocab_size: int, end: int, decode: Callable[[list[int]], str]) -> str:
    """Decodes the runs of known ids; a model with padded vocabulary rows may produce ids that have no text."""
    kept = [i for i in _as_ids(ids).tolist() if i != end]
    runs = itertools.groupby(kept, key=lambda i: 0 <= i < vocab_size)
    return "".join(decode(list(run)) if known else _REPLACEMENT * len(list(run)) for known, run in runs)


def _end_id(end_piece: str | None, vocabulary: dict[str, int], path: Path) -> int:
    """Returns the id of ``end_piece``; the error lists pieces that look like what was meant."""
    if end_piece is not None and end_piece in vocabulary:
        return vocabulary[end_piece]
    near = _near_pieces(end_piece, vocabulary)
    state = "is not set" if end_piece is None else f"={end_piece!r} is not a piece"
    raise UserError(
        f"tokenizer.end_of_document{' ' if end_piece is None else ''}{state} of {path}; "
        f"name the piece that ends a document, for example {', '.join(map(repr, near))}"
    )


def _check_end(tokenizer: Tokenizer, end_piece: str | None, text: str, path: Path) -> None:
    """Refuses an end piece that text can produce: a document that spells it would end there.

    Args:
      tokenizer: whose ``end_of_document`` is the id of ``end_piece``.
      end_piece: as the user and the vocabulary spell it.
      text: as the id decodes.
      path: of the file.

    Raises:
      UserError: encoding one of the spellings gives the id.
    """
    for spelling in (end_piece or "", text):
        if tokenizer.end_of_document in tokenizer.encode(spelling):
            raise UserError(
                f"tokenizer.end_of_document={end_piece!r} of {path} is ordinary vocabulary: the text {spelling!r} "
                f"gives its id {tokenizer.end_of_document}, so documents could end anywhere; name a special token or a "
                "control symbol"
            )


def _near_pieces(end_piece: str | None, vocabulary: dict[str, int]) -> list[str]:
    """Returns up to five pieces: close spellings first, then those that are written like special tokens."""
    special = [piece for piece in vocabulary if len(piece) > 2 and piece[0] in "<[" and piece[-1] in ">]"]
    close = difflib.get_close_matches(end_piece or "<|endoftext|>", special or vocabulary, n=5, cutoff=0.5)
    usual = sorted(special, key=lambda piece: ("end" not in piece and "/s" not in piece and "eos" not in piece, piece))
    return list(dict.fromkeys([*close, *usual, *sorted(vocabulary)[:5]]))[:5]


def _fingerprint(path: Path, end_piece: str | None) -> str:
    return hashlib.sha256(path.read_bytes() + b"\0" + (end_piece or "").encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
