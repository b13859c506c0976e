"""The token store: a corpus tokenised once, as flat files that are memory mapped.

A store is a directory on a local or mounted disk:

    tokens.bin     uint32, little endian: all documents one after the other, each with its end-of-document id
    offsets.bin    int64, little endian: n + 1 offsets in tokens; document i is tokens[offsets[i]:offsets[i + 1]]
    names.jsonl    one JSON string per document
    manifest.json  sizes, tokenizer, hashes and the fingerprint

The fingerprint covers what training sees (tokens, offsets, vocabulary, tokenizer) and neither names nor paths.

Letters: N tokens, of the store or of one document, n documents of the store.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from intttrain.config.errors import UserError
from intttrain.data.tokenizers import Tokenizer
from intttrain.storage.publish import publish_directory

FORMAT = "intttrain token store"
FORMAT_VERSION = 1
TOKEN_DTYPE = np.dtype("<u4")
OFFSET_DTYPE = np.dtype("<i8")
_FILES = ("tokens.bin", "offsets.bin", "names.jsonl")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
      num_documents, num_tokens: counts; tokens include one end id per document.
      names_bytes: size of ``names.jsonl``.
      vocab_size, end_of_document, max_token: of the tokenizer, and the largest id that occurs.
      tokenizer, tokenizer_fingerprint: description and identity of the tokenizer.
      source: where the text came from, for people.
      sha256: file name to hash of its content.
      fingerprint: identity of everything that training sees.
    """

    format: str
    version: int
    num_documents: int
    num_tokens: int
    names_bytes: int
    vocab_size: int
    end_of_document: int
    max_token: int
    tokenizer: str
    tokenizer_fingerprint: str
    source: str
    sha256: dict[str, str]
    fingerprint: str


class StoreWriter:
    """Writes a store one document at a time; use as a context manager.

    The store appears under ``target`` when the block ends normally and at least one document was added; otherwise
    nothing stays behind. Memory use does not grow with the corpus except for 8 bytes per document.

    Raises:
      UserError: the target is occupied or cannot be written, or the store would be empty.
    """

    def __init__(self, target: Path, *, tokenizer: Tokenizer, source: str) -> None:
        self.num_tokens = 0
        self._target = Path(target)
        self._tokenizer = tokenizer
        self._source = source
        self._ends = array.array("q")
        self._max_token = 0
        self._stack = contextlib.ExitStack()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._ends)

    def __enter__(self) -> StoreWriter:
        with contextlib.ExitStack() as stack:  # a failure in here removes the directory again
            self._directory = stack.enter_context(publish_directory(self._target))
            self._tokens = stack.enter_context(_HashedFile(self._directory / "tokens.bin"))
            self._names = stack.enter_context(_HashedFile(self._directory / "names.jsonl"))
            self._stack = stack.pop_all()
        return self

    def add(self, ids_N: np.ndarray, name: str) -> None:
        """Appends one document: its ids **without** the end id, which is added here.

        Raises:
          ValueError: an id is outside the tokenizer's vocabulary or is the end id itself.
        """
        ids_N = np.asarray(ids_N)
        end = self._tokenizer.end_of_document
        if ids_N.size:
            low, high = int(ids_N.min()), int(ids_N.max())
            if low < 0 or high >= self._tokenizer.vocab_size:
                outside = low if low < 0 else high
                raise ValueError(f"document {name!r}: id {outside} is outside 0..{self._tokenizer.vocab_size - 1}")
            if high >= end and (ids_N == end).any():
                raise ValueError(f"document {name!r}: the end-of-document id {end} occurs inside the document")
            self._max_token = max(self._max_token, high)
        self._tokens.write(np.append(ids_N, end).astype(TOKEN_DTYPE).tobytes())
        self._names.write(json.dumps(name).encode() + b"\n")
        self.num_tokens += len(ids_N) + 1
        self._ends.append(self.num_tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is not None:
            return self._stack.__exit__(kind, error, trace)
        with self._stack:  # an exception in here removes what was written
            self._finish()
        return None

    def _finish(self) -> None:
        if not self._ends:
            raise UserError(f"store {self._target}: no document to write; a store holds at least one")
        with _HashedFile(self._directory / "offsets.bin") as offsets:
            offsets.write(np.append(np.int64(0), self._ends).astype(OFFSET_DTYPE).tobytes())
        sha256 = {
            "tokens.bin": self._tokens.digest(), "offsets.bin": offsets.digest(), "names.jsonl": self._names.digest(),
        }  # fmt: skip
        manifest = Manifest(
            format=FORMAT,
            version=FORMAT_VERSION,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            names_bytes=self._names.num_bytes,
            vocab_size=self._tokenizer.vocab_size,
            end_of_document=self._tokenizer.end_of_document,
            max_token=max(self._max_token, self._tokenizer.end_of_document),
            tokenizer=self._tokenizer.description,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            source=self._source,
            sha256=sha256,
            fingerprint="",
        )
        manifest = dataclasses.replace(manifest, fingerprint=_fingerprint(manifest))
        with _HashedFile(self._directory / "manifest.json") as file:
            file.write(json.dumps(dataclasses.asdict(manifest), indent=2).encode() + b"\n")


class TokenStore:
    """A store opened for reading; tokens stay on disk and are paged in as they are touched.

    Attributes:
      path: the directory.
      manifest: its description.
      tokens_N: memory map, uint32, all documents.
      offsets_n: memory map, int64, n + 1 offsets.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.tokens_N: np.ndarray = np.memmap(path / "tokens.bin", TOKEN_DTYPE, mode="r")
        self.offsets_n: np.ndarray = np.memmap(path / "offsets.bin", OFFSET_DTYPE, mode="r")

    @classmethod
    def open(cls, path: Path | str) -> TokenStore:
        """Opens the store at ``path``; reads the manifest and file sizes only.

        Raises:
          UserError: nothing there, not a store, another format version, or a file is missing or has the wrong size.
        """
        path = Path(path)
        manifest = _load_manifest(path)
        expected = {
            "tokens.bin": manifest.num_tokens * TOKEN_DTYPE.itemsize,
            "offsets.bin": (manifest.num_documents + 1) * OFFSET_DTYPE.itemsize,
            "names.jsonl": manifest.names_bytes,
        }
        for name, size in expected.items():
            file = path / name
            if not file.is_file():
                raise UserError(f"token store {path}: {name} is missing; prepare the store again")
            if file.stat().st_size != size:
                raise UserError(
                    f"token store {path}: {name} has {file.stat().st_size} bytes but the manifest says {size}; "
                    "the copy is incomplete or changed; copy or prepare it again"
                )
        store = cls(path, manifest)
        if store.offsets_n[0] != 0 or store.offsets_n[-1] != manifest.num_tokens:
            raise UserError(f"token store {path}: offsets.bin does not span tokens.bin; prepare the store again")
        return store

    def __len__(self) -> int:
        """Number of documents."""
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        """Number of tokens, end ids included."""
        return self.manifest.num_tokens

    @property
    def end_of_document(self) -> int:
        """The id that ends every document and fills padding."""
        return self.manifest.end_of_document

    @property
    def fingerprint(self) -> str:
        """Identity of the content (64 hexadecimal digits), independent of where the store lies."""
        return self.manifest.fingerprint

    @property
    def lengths_n(self) -> np.ndarray:
        """Tokens of each document, int64, end id included."""
        return np.diff(self.offsets_n)

    def document(self, index: int) -> np.ndarray:
        """Returns a read-only uint32 view of document ``index``, end id included.

        Raises:
          IndexError: ``index`` is not in 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of a store with {len(self)} documents")
        return self.tokens_N[int(self.offsets_n[index]) : int(self.offsets_n[index + 1])]

    def name(self, index: int) -> str:
        """Returns the name of document ``index``; the first call reads all names."""
        return self._all_names[index]

    @functools.cached_property
    def _all_names(self) -> list[str]:
        return [json.loads(line) for line in (self.path / "names.jsonl").read_bytes().splitlines()]

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises ``UserError`` unless the store was made by the tokenizer with this fingerprint."""
        if fingerprint != self.manifest.tokenizer_fingerprint:
            raise UserError(
                f"token store {self.path} was made by another tokenizer: {self.manifest.tokenizer} "
                f"({self.manifest.tokenizer_fingerprint[:12]}) instead of {fingerprint[:12]}; "
                "use that tokenizer or prepare the text again"
            )

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ``UserError`` if the store holds an id that a model with ``vocab_size`` rows does not have."""
        if self.manifest.max_token >= vocab_size:
            raise UserError(
                f"token store {self.path} holds token id {self.manifest.max_token} but "
                f"model.vocab_size={vocab_size} ends at {vocab_size - 1}; "
                f"use model.vocab_size={self.manifest.vocab_size} or more"
            )

    def verify(self) -> None:
        """Reads everything and compares it with the hashes (slow on a large store).

        Raises:
          UserError: the content differs from the manifest, or the offsets are not strictly increasing.
        """
        for name in _FILES:
            if _hash_file(self.path / name) != self.manifest.sha256[name]:
                raise UserError(f"token store {self.path}: the content of {name} changed since it was written")
        if _fingerprint(self.manifest) != self.manifest.fingerprint:
            raise UserError(f"token store {self.path}: manifest.json was edited: its fingerprint does not fit")
        if (self.lengths_n < 1).any():
            raise UserError(f"token store {self.path}: offsets.bin holds an empty document")
        if int(self.tokens_N.max()) != self.manifest.max_token:
            raise UserError(f"token store {self.path}: the largest token id is not {self.manifest.max_token}")


class _HashedFile:
    """A file that hashes what is written into it and is on disk when closed."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("xb")
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())  # else the rename could reach the disk before the data


def _fingerprint(manifest: Manifest) -> str:
    """Hashes what training sees; the order and separators are part of format version 1."""
    parts = (
        str(manifest.version), manifest.sha256["tokens.bin"], manifest.sha256["offsets.bin"],
        str(manifest.vocab_size), str(manifest.end_of_document), manifest.tokenizer_fingerprint,
    )  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_manifest(path: Path) -> Manifest:
    if not path.exists():
        raise UserError(f"token store {path} does not exist; make it with 'intttrain prepare'")
    file = path / "manifest.json"
    if not file.is_file():
        inner = sorted(child.parent.name for child in path.glob("*/manifest.json")) if path.is_dir() else []
        hint = f"; did you mean {path / inner[-1]}?" if inner else "; make one with 'intttrain prepare'"
        raise UserError(f"{path} is not a token store: it has no manifest.json{hint}")
    try:
        content: Any = json.loads(file.read_bytes())
    except ValueError:  # covers broken JSON and broken UTF-8
        raise UserError(f"token store {path}: manifest.json is not readable JSON; prepare the store again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a token store: manifest.json describes something else")
    if content.get("version") != FORMAT_VERSION:
        raise UserError(
            f"token store {path} has format version {content.get('version')!r} but this program reads "
            f"{FORMAT_VERSION}; prepare the text again"
        )
    names = {field.name for field in dataclasses.fields(Manifest)}
    if set(content) != names:
        odd = ", ".join(sorted(set(content) ^ names))
        raise UserError(f"token store {path}: manifest.json has missing or unknown entries: {odd}")
    return Manifest(**content)
