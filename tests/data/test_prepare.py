"""``prepare``: every document goes to exactly one store, or is counted as left out, and output is whole or absent."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from intttrain.config import PrepareConfig, TextSource, TokenizerConfig
from intttrain.config.errors import UserError
from intttrain.data import TokenStore, make_tokenizer, prepare
from intttrain.data.prepare import heldout_share
from intttrain.storage.processes import boot
from tests.data.plain import one_line

BYTES = TokenizerConfig(kind="byte")


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    for i in range(40):
        path = root / f"d{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Dokument {i} größer 日本 🎉\r\n")
    (root / "zz.md").write_text("not matched")
    return root


def config_for(*paths, fraction=0.25, seed=0, **source):
    text = TextSource(kind="text", paths=tuple(map(str, paths)), **source)
    return PrepareConfig(source=text, tokenizer=BYTES, heldout_fraction=fraction, seed=seed)


def run(config, output):
    return prepare(config, output, lambda line: None)


def contents(path):
    store = TokenStore.open(path)
    store.verify()
    tokenizer = make_tokenizer(BYTES)
    return {store.name(i): tokenizer.decode(store.document(i)) for i in range(len(store))}


def refused(config, output, *parts):
    """Checks the message, and that nothing was left behind."""
    before = {p.name for p in output.parent.iterdir()} if output.parent.is_dir() else None
    with pytest.raises(UserError) as error:
        run(config, output)
    for part in parts:
        assert str(part) in one_line(error)
    if before is not None:
        assert {p.name for p in output.parent.iterdir()} == before


def test_what_killed_runs_left_is_removed_and_named(corpus, tmp_path):
    left, lines = tmp_path / f".out.partial-{boot()[:8]}-0a1b2c3d", []
    (left / "train").mkdir(parents=True)
    prepare(config_for(corpus), tmp_path / "out", lines.append)
    assert lines[0] == f"note: {left}, left unfinished by a process that was killed, was removed" and not left.exists()


def test_documents_are_split_and_unchanged(corpus, tmp_path):
    result = run(config_for(corpus), tmp_path / "out")
    train, heldout = contents(result.train), contents(result.heldout)
    expected = {p.relative_to(corpus).as_posix(): p.read_bytes().decode() for p in corpus.rglob("*.txt")}
    assert {**train, **heldout} == expected
    assert not set(train) & set(heldout)
    assert list(train) == sorted(train)
    assert set(heldout) == {name for name in expected if heldout_share(0, name) < 0.25}
    assert (result.train_documents, result.heldout_documents) == (len(train), len(heldout))
    assert result.train_tokens == TokenStore.open(result.train).num_tokens
    assert result.text_bytes == sum(len(text.encode()) for text in expected.values())
    assert result.train_tokens + result.heldout_tokens == result.text_bytes + 40
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"train", "heldout"}


def test_the_same_again_elsewhere(corpus, tmp_path):
    first = run(config_for(corpus), tmp_path / "a")
    moved = corpus.rename(tmp_path / "moved")
    second = run(config_for(moved), tmp_path / "b")
    assert TokenStore.open(first.train).fingerprint == TokenStore.open(second.train).fingerprint
    assert TokenStore.open(first.heldout).fingerprint == TokenStore.open(second.heldout).fingerprint
    third = run(config_for(moved, seed=1), tmp_path / "c")
    assert set(contents(third.heldout)) != set(contents(second.heldout))


def test_a_new_document_moves_no_other(corpus, tmp_path):
    before = contents(run(config_for(corpus), tmp_path / "a").heldout)
    (corpus / "a_new.txt").write_text("new")
    after = contents(run(config_for(corpus), tmp_path / "b").heldout)
    assert set(after) - {"a_new.txt"} == set(before)


def test_the_share_is_uniform_and_pinned():
    shares = [heldout_share(0, str(i)) for i in range(2000)]
    assert 0.45 < sum(shares) / 2000 < 0.55 and 0 <= min(shares) and max(shares) < 1
    assert heldout_share(0, "a.txt") == pytest.approx(0.6195, abs=1e-4)  # a change would leak old held-out text


def test_grouping_for_the_tokenizer_changes_nothing(corpus, tmp_path, monkeypatch):
    whole = run(config_for(corpus), tmp_path / "a")
    module = importlib.import_module("intttrain.data.prepare")
    monkeypatch.setattr(module, "_GROUP_DOCUMENTS", 3)
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    lines = []
    pieces = prepare(config_for(corpus), tmp_path / "b", lines.append)
    assert TokenStore.open(whole.train).fingerprint == TokenStore.open(pieces.train).fingerprint
    assert len(lines) == 15  # 14 groups and the last line
    assert lines[-1].startswith("40 documents, ") and "MB/s" in lines[-1]


def test_without_heldout(corpus, tmp_path):
    result = run(config_for(corpus, fraction=0.0), tmp_path / "out")
    assert result.heldout is None and result.train_documents == 40 and result.heldout_tokens == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["train"]


def test_duplicates_are_dropped_on_both_sides(corpus, tmp_path):
    for path in sorted(corpus.rglob("*.txt")):
        (corpus / f"copy_{path.name}").write_bytes(path.read_bytes())
    result = run(config_for(corpus), tmp_path / "out")
    assert result.duplicates == 40 and result.train_documents + result.heldout_documents == 40
    train, heldout = contents(result.train), contents(result.heldout)
    assert not set(train.values()) & set(heldout.values())


def test_empty_and_binary_files(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for name, data in {"a.txt": b"text", "b.txt": b"", "c.txt": b"a\0b", "d.txt": b"\xff\xfe", "e.txt": b"x"}.items():
        (root / name).write_bytes(data)
    result = run(config_for(root, fraction=0), tmp_path / "out")
    assert contents(result.train) == {"a.txt": "text", "e.txt": "x"}
    assert (result.empty, result.binary) == (1, 2)
    for name in ("c.txt", "d.txt"):  # named by itself: not to be skipped silently
        config = config_for(root / "a.txt", root / name, fraction=0)
        refused(config, tmp_path / "other", f"{root / name} is not UTF-8 text")
    refused(config_for(root / "b.txt", fraction=0), tmp_path / "other", "has no text", "1 empty")


def test_patterns_exclude_and_explicit_files(corpus, tmp_path):
    config = config_for(
        corpus, corpus / "zz.md", fraction=0, patterns=("0*.txt", "d2/1*"), exclude=("d0/*", "*/04.txt")
    )
    names = set(contents(run(config, tmp_path / "out").train))
    assert names == {"d1/01.txt", "d2/02.txt", "d2/05.txt", "d1/07.txt", "d2/08.txt", "d2/11.txt", "d2/14.txt",
                     "d2/17.txt", "zz.md"}  # fmt: skip


def test_max_bytes(corpus, tmp_path):
    size = (corpus / "d0" / "00.txt").stat().st_size
    result = run(config_for(corpus, fraction=0, max_bytes=2 * size), tmp_path / "a")
    assert list(contents(result.train)) == ["d0/00.txt", "d0/03.txt"]
    assert result.stopped_at_max_bytes
    whole = run(config_for(corpus, fraction=0, max_bytes=10**6), tmp_path / "b")
    assert not whole.stopped_at_max_bytes and whole.train_documents == 40
    refused(config_for(corpus, fraction=0, max_bytes=size - 1), tmp_path / "c", f"max_bytes={size - 1}", f"use {size}")


def test_sources_that_hold_nothing(corpus, tmp_path):
    refused(config_for(corpus / "no" / "thing"), tmp_path / "out", corpus / "no" / "thing", "does not exist")
    refused(config_for(corpus, tmp_path / "gone"), tmp_path / "out", tmp_path / "gone")
    refused(config_for(corpus, patterns=("*.rst",)), tmp_path / "out", "*.rst", corpus)
    refused(config_for(), tmp_path / "out", "prepare.source.paths is empty")


def test_one_sided_splits(corpus, tmp_path):
    refused(config_for(corpus, fraction=1.0), tmp_path / "out", "leaves none for training")
    refused(config_for(corpus / "zz.md", fraction=0.5), tmp_path / "out", "cannot be split")
    with pytest.raises(UserError) as error:
        run(config_for(corpus, fraction=1e-6), tmp_path / "out")
    advice = float(one_line(error).split("use ")[1].split(" ")[0])
    assert run(config_for(corpus, fraction=advice), tmp_path / "out").heldout_documents >= 1


def test_existing_output(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(config_for(corpus), tmp_path / "out", tmp_path / "out", "never overwritten")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_unwritable_output(corpus, tmp_path):
    (tmp_path / "file").touch()
    refused(config_for(corpus), tmp_path / "file" / "out", tmp_path / "file" / "out")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_nothing(corpus, tmp_path, monkeypatch, failure):
    before = {p.name for p in tmp_path.iterdir()}
    module = importlib.import_module("intttrain.data.prepare")
    monkeypatch.setattr(module, "_GROUP_DOCUMENTS", 10)
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    lines = []

    def interrupt(line):
        lines.append(line)
        if len(lines) == 3:
            raise failure

    with pytest.raises(failure):
        prepare(config_for(corpus), tmp_path / "new" / "out", interrupt)
    assert lines and {p.name for p in tmp_path.iterdir()} == before


def test_a_bad_tokenizer_leaves_nothing(corpus, tmp_path):
    config = dataclasses.replace(config_for(corpus), tokenizer=TokenizerConfig(kind="huggingface"))
    refused(config, tmp_path / "new", "tokenizer.path")
