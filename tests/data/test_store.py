"""The token store: what is written reads back, damage is found, and nothing half-written is ever seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.data import StoreWriter, TokenStore
from intttrain.storage.publish import publish_directory
from tests.data.plain import END, PlainTokenizer, one_line


def write(path: Path, documents: list[list[int]], *, vocab_size: int = 1000, source: str = "test") -> TokenStore:
    with StoreWriter(path, tokenizer=PlainTokenizer(vocab_size), source=source) as writer:
        for i, ids in enumerate(documents):
            writer.add(np.array(ids, np.uint32), f"doc{i}")
    return TokenStore.open(path)


def test_everything_reads_back(tmp_path):
    documents = [[1, 2, 3], [], [999], list(range(100, 400))]
    store = write(tmp_path / "a", documents)
    assert len(store) == 4
    for i, ids in enumerate(documents):
        assert store.document(i).tolist() == [*ids, END]
        assert store.document(i).dtype == np.uint32
        assert store.name(i) == f"doc{i}"
    assert store.num_tokens == sum(map(len, documents)) + 4
    assert store.lengths_n.tolist() == [4, 1, 2, 301]
    assert store.end_of_document == END
    assert (store.manifest.max_token, store.manifest.vocab_size) == (999, 1000)
    assert (store.manifest.tokenizer, store.manifest.source) == ("plain plain", "test")
    store.verify()
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    assert {p.name for p in store.path.iterdir()} == {"tokens.bin", "offsets.bin", "names.jsonl", "manifest.json"}


def test_layout_on_disk(tmp_path):
    write(tmp_path / "a", [[1, 258], [3]])
    assert (tmp_path / "a" / "tokens.bin").read_bytes() == bytes(
        [1, 0, 0, 0, 2, 1, 0, 0, 7, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0]
    )
    assert np.fromfile(tmp_path / "a" / "offsets.bin", "<i8").tolist() == [0, 3, 5]


def test_names_survive_newlines_and_undecodable_bytes(tmp_path):
    names = ["a\nb", "größe", "bad\udcff", '"', "\u2028"]
    with StoreWriter(tmp_path / "a", tokenizer=PlainTokenizer(10), source="") as writer:
        for name in names:
            writer.add(np.array([1]), name)
    store = TokenStore.open(tmp_path / "a")
    assert [store.name(i) for i in range(5)] == names


def test_fingerprint_is_the_content_and_not_the_place(tmp_path):
    first = write(tmp_path / "a", [[1, 2], [3]])
    assert write(tmp_path / "deep" / "b", [[1, 2], [3]], source="elsewhere").fingerprint == first.fingerprint
    others = [
        write(tmp_path / "c", [[1, 2], [4]]),
        write(tmp_path / "d", [[1], [2, 3]]),  # the same ids, other documents
        write(tmp_path / "e", [[1, 2], [3]], vocab_size=999),
    ]
    assert len({first.fingerprint, *(store.fingerprint for store in others)}) == 4


@pytest.mark.parametrize("index", [-1, 1])
def test_documents_outside(make_store, index):
    with pytest.raises(IndexError):
        make_store([4]).document(index)


def test_tokens_cannot_be_changed_through_a_view(make_store):
    with pytest.raises(ValueError, match="read-only"):
        make_store([4]).document(0)[0] = 1


def test_tokenizer_and_vocabulary_checks(tmp_path):
    store = write(tmp_path / "a", [[1, 30]])
    store.check_tokenizer("plain")
    store.check_vocab(31)
    with pytest.raises(UserError) as error:
        store.check_vocab(30)
    assert "token id 30" in one_line(error) and "model.vocab_size=30" in one_line(error)
    with pytest.raises(UserError) as error:
        store.check_tokenizer("other")
    assert "plain" in one_line(error) and "other" in one_line(error)


def test_the_end_id_counts_for_the_vocabulary(tmp_path):
    store = write(tmp_path / "a", [[1]])
    assert store.manifest.max_token == END
    with pytest.raises(UserError):
        store.check_vocab(END)


@pytest.mark.parametrize("ids", [[1000], [-1], [1, END, 2]])
def test_the_writer_refuses_impossible_ids(tmp_path, ids):
    with pytest.raises(ValueError), StoreWriter(tmp_path / "a", tokenizer=PlainTokenizer(1000), source="") as writer:
        writer.add(np.array(ids, np.int64), "bad")
    assert list(tmp_path.iterdir()) == []


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "names.jsonl"])
def test_truncated_and_missing_files(make_store, name):
    path = make_store([4, 5]).path
    file = path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError) as error:
        TokenStore.open(path)
    assert name in one_line(error) and str(file.stat().st_size) in one_line(error)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        TokenStore.open(path)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "names.jsonl"])
def test_verify_finds_a_changed_byte(make_store, name):
    store = make_store([4, 5])
    data = bytearray((store.path / name).read_bytes())
    data[9] ^= 1
    (store.path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        TokenStore.open(store.path).verify()
    assert name in one_line(error)


def edit_manifest(path: Path, **changes: object) -> None:
    content = json.loads((path / "manifest.json").read_text())
    content.update(changes)
    (path / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "format version 2 but this program reads 1"),
        ({"format": "other"}, "not a token store"),
        ({"surprise": 1}, "surprise"),
        ({"num_tokens": 8}, "tokens.bin has 36 bytes but the manifest says 32"),
    ],
)
def test_foreign_manifests(make_store, changes, said):
    path = make_store([4, 5]).path
    edit_manifest(path, **changes)
    with pytest.raises(UserError) as error:
        TokenStore.open(path)
    assert said in one_line(error)


def test_verify_finds_an_edited_manifest(make_store):
    path = make_store([4, 5]).path
    edit_manifest(path, vocab_size=5000)
    with pytest.raises(UserError, match="edited"):
        TokenStore.open(path).verify()


def test_offsets_of_another_store(make_store):
    first, second = make_store([4, 5], "a"), make_store([4, 6], "b")
    shutil.copy(first.path / "offsets.bin", second.path / "offsets.bin")
    with pytest.raises(UserError, match="does not span"):
        TokenStore.open(second.path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null"])
def test_broken_manifest(make_store, content):
    path = make_store([4]).path
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenStore.open(path)
    assert str(path) in one_line(error)


def test_not_a_store(tmp_path, make_store):
    with pytest.raises(UserError, match="does not exist"):
        TokenStore.open(tmp_path / "nothing")
    make_store([4], "out/train")
    make_store([4], "out/heldout")
    with pytest.raises(UserError) as error:
        TokenStore.open(tmp_path / "out")
    assert f"did you mean {tmp_path / 'out' / 'train'}?" in one_line(error)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a token store"):
        TokenStore.open(tmp_path / "file")


# --- whole or not at all -------------------------------------------------------------------------------------------


def test_existing_output_is_kept(tmp_path):
    write(tmp_path / "a", [[1]])
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    with pytest.raises(UserError) as error:
        write(tmp_path / "a", [[2]])
    assert str(tmp_path / "a") in one_line(error)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a directory"):
        write(tmp_path / "file", [[2]])
    assert {p.name for p in tmp_path.iterdir()} == {"a", "file"}


def test_an_occupied_target_is_noticed_before_the_work(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "theirs").touch()
    with pytest.raises(UserError, match="already holds"), publish_directory(tmp_path / "a"):
        pytest.fail("the work was done first")


def test_an_empty_directory_may_be_the_target(tmp_path):
    (tmp_path / "a").mkdir()
    assert len(write(tmp_path / "a", [[1]])) == 1


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), StoreWriter(tmp_path / "new" / "a", tokenizer=PlainTokenizer(10), source="") as writer:
        writer.add(np.array([1]), "doc")
        assert not (tmp_path / "new" / "a").exists()
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_documents(tmp_path):
    with pytest.raises(UserError, match="no document"):
        write(tmp_path / "a", [])
    assert list(tmp_path.iterdir()) == []


def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as error:
        write(tmp_path / "file" / "a", [[1]])
    assert str(tmp_path / "file" / "a") in one_line(error)


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match="already holds"), publish_directory(tmp_path / "a") as directory:
        (directory / "mine").touch()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_parent_that_someone_else_uses_stays(tmp_path):
    with pytest.raises(RuntimeError), publish_directory(tmp_path / "new" / "a"):
        (tmp_path / "new" / "other").touch()
        raise RuntimeError
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["other"]
