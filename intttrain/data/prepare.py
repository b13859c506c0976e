"""``intttrain prepare``: text -> OUTPUT/train and OUTPUT/heldout token stores.

One pass, streaming. Exact duplicates are dropped before anything else, so no held-out text stands in the training
store under another name. A document is held out if a hash of the seed and its name falls below
``heldout_fraction``: the split does not depend on order or on which other documents there are.

Letters: N tokens of a document.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from intttrain.config import PrepareConfig
from intttrain.config.errors import UserError
from intttrain.config.registry import SOURCES
from intttrain.data.store import StoreWriter
from intttrain.data.text_files import FileCounts
from intttrain.data.tokenizers import Tokenizer, make_tokenizer
from intttrain.storage.partial import remove_leftovers
from intttrain.storage.publish import publish_directory

# What is registered for a source: its section, what it counts, and where progress is told -> (name, text) of documents.
ReadSource = Callable[[Any, FileCounts, Callable[[str], None]], Iterator[tuple[str, str]]]
_REPORT_SECONDS = 2.0
_GROUP_CHARACTERS = 1 << 22  # documents are handed to the tokenizer in groups of about this size
_GROUP_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True)
class PrepareResult:
    """What was written and what was left out.

    Attributes:
      train, heldout: the stores (heldout is None when ``heldout_fraction`` is 0).
      train_documents, train_tokens, heldout_documents, heldout_tokens: counts; tokens include end ids.
      text_bytes: UTF-8 bytes of the documents that were kept.
      duplicates: documents dropped because an earlier one has the same text.
      empty: documents dropped because they have no text or no tokens.
      binary: files skipped because they are not UTF-8 text.
      stopped_at_max_bytes: True if ``max_bytes`` ended the reading.
    """

    train: Path
    heldout: Path | None
    train_documents: int
    train_tokens: int
    heldout_documents: int
    heldout_tokens: int
    text_bytes: int
    duplicates: int
    empty: int
    binary: int
    stopped_at_max_bytes: bool


@dataclasses.dataclass
class _Counts:
    documents: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    lowest_share: float = 1.0  # of the documents kept; a fraction above it holds at least one document out


def prepare(config: PrepareConfig, output: Path, report: Callable[[str], None]) -> PrepareResult:
    """Reads the source, tokenises it and writes the stores; OUTPUT appears whole or not at all.

    Args:
      config: the ``prepare`` section.
      output: a path that does not exist, or an empty directory.
      report: receives progress lines, at most one every two seconds, and a last one.

    Raises:
      UserError: the output is occupied or not writable, the source or tokenizer cannot be read, the source has no
        text, or one side of the split came out empty.
    """
    tokenizer = make_tokenizer(config.tokenizer)
    remove_leftovers(Path(output), report)
    counts, files = _Counts(), FileCounts()
    read: ReadSource = SOURCES.choice(config.source)
    description = config.source.describe()
    with publish_directory(Path(output)) as directory, contextlib.ExitStack() as stack:
        writers = [stack.enter_context(StoreWriter(directory / "train", tokenizer=tokenizer, source=description))]
        if config.heldout_fraction > 0:
            heldout = StoreWriter(directory / "heldout", tokenizer=tokenizer, source=description)
            writers.append(stack.enter_context(heldout))
        documents = _without_duplicates(read(config.source, files, report), counts)
        _write(documents, tokenizer, config, writers, counts, report)
        _check_split(config, writers, counts, files)
    return PrepareResult(
        train=Path(output) / "train",
        heldout=Path(output) / "heldout" if len(writers) > 1 else None,
        train_documents=writers[0].num_documents,
        train_tokens=writers[0].num_tokens,
        heldout_documents=writers[1].num_documents if len(writers) > 1 else 0,
        heldout_tokens=writers[1].num_tokens if len(writers) > 1 else 0,
        text_bytes=counts.text_bytes,
        duplicates=counts.duplicates,
        empty=counts.empty,
        binary=files.binary,
        stopped_at_max_bytes=files.stopped_at_max_bytes,
    )


def heldout_share(seed: int, name: str) -> float:
    """Returns the number in [0, 1) of a document name; a document whose number is below the fraction is held out."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _without_duplicates(documents: Iterator[tuple[str, str]], counts: _Counts) -> Iterator[tuple[str, str]]:
    """Passes on the first document of each content; remembers 16 bytes per document."""
    seen: set[bytes] = set()
    for name, text in documents:
        if not text:
            counts.empty += 1
            continue
        data = text.encode("utf-8", errors="surrogateescape")
        digest = hashlib.sha256(data).digest()[:16]
        if digest in seen:
            counts.duplicates += 1
            continue
        seen.add(digest)
        counts.text_bytes += len(data)
        yield name, text


def _groups(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Collects documents so that tokenizers that use all cores have something to share out."""
    group: list[tuple[str, str]] = []
    characters = 0
    for name, text in documents:
        group.append((name, text))
        characters += len(text)
        if characters >= _GROUP_CHARACTERS or len(group) >= _GROUP_DOCUMENTS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _write(
    documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, config: PrepareConfig, writers: list[StoreWriter],
    counts: _Counts, report: Callable[[str], None],
) -> None:  # fmt: skip
    start = reported = time.monotonic()
    for group in _groups(documents):
        for (name, _), ids_N in zip(group, tokenizer.encode_many([text for _, text in group]), strict=True):
            if not len(ids_N):
                counts.empty += 1
                continue
            share = heldout_share(config.seed, name)
            counts.lowest_share = min(counts.lowest_share, share)
            counts.documents += 1
            writers[1 if share < config.heldout_fraction else 0].add(ids_N, name)
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            report(_progress(writers, counts, reported - start))
    report(_progress(writers, counts, time.monotonic() - start))


def _progress(writers: list[StoreWriter], counts: _Counts, seconds: float) -> str:
    tokens = sum(writer.num_tokens for writer in writers)
    megabytes = counts.text_bytes / 1e6
    return (
        f"{counts.documents:,} documents, {tokens:,} tokens, {megabytes:,.1f} MB of text, "
        f"{megabytes / max(seconds, 1e-9):,.1f} MB/s"
    )


def _check_split(config: PrepareConfig, writers: list[StoreWriter], counts: _Counts, files: FileCounts) -> None:
    """Refuses a corpus without text and a split with an empty side."""
    if not counts.documents:
        raise UserError(
            f"prepare.source: {config.source.describe()} has no text: {counts.empty} empty documents, "
            f"{files.binary} files that are not UTF-8 text"
        )
    split = f"prepare.heldout_fraction={config.heldout_fraction} of {counts.documents} documents"
    if counts.documents == 1 and len(writers) > 1:
        raise UserError(f"{split} cannot be split; use prepare.heldout_fraction=0, or more documents")
    if not writers[0].num_documents:
        raise UserError(f"{split} leaves none for training; use a smaller fraction, or 0 to hold out nothing")
    if len(writers) > 1 and not writers[1].num_documents:
        enough = min(1.0, counts.lowest_share * 1.01 + 1e-4)
        raise UserError(
            f"{split} holds out none; use {enough:.4f} or more, another prepare.seed, or 0 to hold out nothing"
        )
