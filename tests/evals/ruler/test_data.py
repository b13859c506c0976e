"""RULER's samples: kept whole or not at all, used again, refused when they are others. The generator is played here by
small programs; test_ruler_generator.py runs the real one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import time

import pytest

from intttrain.config import TokenizerConfig
from intttrain.config.errors import UserError
from intttrain.config.evaluation import RulerConfig
from intttrain.evals import prepare_ruler
from intttrain.evals.ruler import data as ruler_data

BYTE = TokenizerConfig(kind="byte")
RULER = RulerConfig(tasks=("vt", "qa_2"), lengths=(64, 32), samples=3)
GOOD = """
import json, pathlib, sys
request = json.loads(sys.argv[1])
folder = pathlib.Path(request["output"], request["task"])
folder.mkdir()
answers = ["Ünal", "yes"] if "qa" in request["task"] else ["Ünal"]
lines = [
    json.dumps({"input": f"Wer? {n}: Ünal\\u2028{request['length']}", "outputs": answers})
    for n in range(request["samples"])
]
(folder / "validation.jsonl").write_text("\\n".join(lines) + "\\n", encoding="utf-8")
"""


@pytest.fixture
def program(monkeypatch):
    """Sets what runs instead of the generator, which counts as installed."""
    monkeypatch.setattr(ruler_data.importlib.metadata, "version", lambda name: "1.0")
    return lambda text: monkeypatch.setattr(ruler_data, "PROGRAM", text)


def prepare(folder, config=RULER, *, tokenizer=BYTE, max_length=None, report=lambda line: None):
    return prepare_ruler(config, tokenizer, folder, max_length=max_length, report=report)


def refused(folder, *arguments, **options) -> str:
    before = sorted(folder.rglob("*")) if folder.is_dir() else None
    with pytest.raises(UserError) as caught:
        prepare(folder, *arguments, **options)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert sorted(folder.rglob("*")) == before, "nothing is left behind"
    return str(caught.value)


def test_samples_are_counted_by_the_models_tokenizer(tmp_path, program):
    program(GOOD)
    sets = prepare(tmp_path / "a" / "b")
    assert [(s.length, s.task) for s in sets] == [(64, "vt"), (64, "qa_2"), (32, "vt"), (32, "qa_2")]
    for ruler_set in sets:
        assert [sample.prompt for sample in ruler_set.samples] == [
            f"Wer? {n}: Ünal\u2028{ruler_set.length}" for n in range(3)
        ]
        assert all(sample.prompt_tokens == len(sample.prompt.encode()) for sample in ruler_set.samples)
    assert sets[0].samples[0].answers == ("Ünal",) and sets[0].samples[0].answer_tokens == 6
    assert sets[1].samples[0].answers == ("Ünal", "yes") and sets[1].samples[0].answer_tokens == 4
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["32", "64"]


def test_samples_are_made_once_and_further_ones_join(tmp_path, program):
    program(GOOD)
    first, lines = prepare(tmp_path), []
    program("import sys; sys.exit('runs again')")
    assert prepare(tmp_path, report=lines.append) == first and lines == []
    more = dataclasses.replace(RULER, lengths=(64, 16), tasks=("vt", "vt"))
    assert "runs again" in refused(tmp_path, more)
    program(GOOD)
    assert [(s.length, s.task) for s in prepare(tmp_path, more)] == [(64, "vt"), (16, "vt")]


def test_other_samples_are_refused(tmp_path, program):
    program(GOOD)
    prepare(tmp_path)
    place = str(tmp_path / "64" / "vt")
    for field, value in (("samples", 4), ("seed", 7)):
        message = refused(tmp_path, dataclasses.replace(RULER, **{field: value}))
        assert place in message and f"now eval.ruler.{field}={value}; name another folder" in message
    settings = tmp_path / "64" / "vt" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer": "other"}))
    assert "were made with tokenizer='other', this is byte" in refused(tmp_path)
    settings.write_text("{")
    assert "no readable settings.json" in refused(tmp_path)
    settings.unlink()
    assert "no readable settings.json" in refused(tmp_path)


def test_broken_samples_are_refused(tmp_path, program):
    program(GOOD)
    prepare(tmp_path)
    (tmp_path / "32" / "vt" / "samples.jsonl").write_text('{"prompt": "x"}\n')
    assert "32/vt/samples.jsonl cannot be read as RULER samples" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pass", "wrote 0 of 3 samples for vt of 64 tokens"),  # what the generator does when it fails
        (GOOD.replace('["samples"]', '["samples"] - 1'), "wrote 2 of 3 samples for vt"),
        (GOOD.replace("Wer? {n}: Ünal", "Wer?"), "left answers out of 3 samples for vt"),
        ("raise OSError(28, 'No space left')", r"failed for vt of 64 tokens \(status 1\): OSError: .*No space left"),
        (
            "import json, sys; open(json.loads(sys.argv[1])['output'] + '/needed.json', 'w').write('{\"length\": 99}')",
            "eval.ruler.lengths=64 is too short for vt, whose smallest samples need 99 tokens .* use 99 or more",
        ),
    ],
)
def test_a_generator_that_fails_is_one_line(tmp_path, program, text, message):
    program(text)
    with pytest.raises(UserError, match=message) as caught:
        prepare(tmp_path / "data", dataclasses.replace(RULER, tasks=("vt",), lengths=(64,)))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_an_interrupt_ends_the_generator_too(tmp_path, program):
    """What is done stays; a process that would never end is killed."""
    pid = tmp_path / "pid"
    program(
        GOOD + f"if request['task'] == 'qa_2':\n    import os, time\n    pathlib.Path({str(pid)!r} + str(os.getpid()))"
        ".touch()\n    (folder / 'validation.jsonl').unlink()\n    time.sleep(600)\n"
    )

    def interrupt(line):
        if line.startswith("generated"):
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("pid*")) and time.monotonic() < deadline and (os.cpu_count() or 1) > 1:
                time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "data", dataclasses.replace(RULER, lengths=(64,)), report=interrupt)
    for path in tmp_path.glob("pid*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.removeprefix("pid")), 0)
    assert sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*")) == [
        "64", "64/vt", "64/vt/samples.jsonl", "64/vt/settings.json",
    ]  # fmt: skip


def test_bad_wishes_are_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    assert "128 tokens are more than the 100 that the model takes; use lengths up to 100" in refused(
        folder, dataclasses.replace(RULER, lengths=(64, 128)), max_length=100
    )
    for empty in ({"tasks": ()}, {"lengths": ()}):
        assert "name at least one task and one length" in refused(folder, dataclasses.replace(RULER, **empty))
    assert not folder.exists()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ruler_data.importlib.metadata, "version", missing)
    assert "pip install 'intttrain[ruler]'" in refused(folder)
    assert not folder.exists()


def test_a_folder_that_cannot_be_is_one_line(tmp_path, program):
    program(GOOD)
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(tmp_path / "file" / "below")
