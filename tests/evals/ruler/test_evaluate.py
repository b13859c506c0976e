"""RULER with models that answer from the samples: scores, the report, and answers that survive a stop."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.evals import AnswerFile, evaluate_ruler
from intttrain.evals.ruler.tasks import ALL_TASKS, new_tokens, score_answer
from tests.evals.ruler.ruler_cases import CONFIG, SETTINGS, TASKS, FakeModel, lines_of, make_set, make_sets

REPO = Path(__file__).resolve().parents[3]


def evaluate(sets, models, path, *, settings=SETTINGS, report=lambda line: None):
    return evaluate_ruler(sets, models, name="tiny", answers=path, settings=settings, config=CONFIG, report=report)


# --- scores --------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_gets_100_and_one_that_is_silent_gets_0(tmp_path):
    sets = make_sets(ALL_TASKS)
    models = {"on": FakeModel(sets), "off": FakeModel(sets, right=0)}
    content = evaluate(sets, models, tmp_path / "answers.jsonl").to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert [entry["length"] for entry in content["lengths"]] == [64, 128]
    (warning,) = content["warnings"]
    assert warning.startswith("12 samples of each task, fewer than 30")
    for entry in content["lengths"]:
        assert list(entry["tasks"]) == list(ALL_TASKS)
        for column in (*entry["tasks"].values(), entry["average"]):
            assert column["levels"]["on"] == {"value": 100.0, "low": 100.0, "high": 100.0}
            assert column["levels"]["off"] == {"value": 0.0, "low": 0.0, "high": 0.0}
            assert column["differences"] == {"on - off": {"value": 100.0, "low": 100.0, "high": 100.0}}
        assert all(column["empty"] == {"on": 0, "off": 12} for column in entry["tasks"].values())
    assert models["on"].max_new_tokens == {128, 30, 120, 50, 32}
    assert len(models["on"].asked) == 2 * 13 * 12


@pytest.mark.parametrize(
    ("task", "text", "answers", "wanted"),
    [
        ("vt", "ABC and def", ("ABC", "DEF", "GHI", "JKL"), 50.0),
        ("qa_1", "ABC and def", ("xyz", "DEF"), 100.0),
        ("qa_1", "", ("xyz", "DEF"), 0.0),
        ("cwe", "a\x00b", ("a\nb",), 100.0),
        ("cwe", " \x1f a \n", (" a",), 0.0),
        ("niah_single_1", "is 12345.", ("1234",), 100.0),
    ],
)
def test_score_of_one_answer(task, text, answers, wanted):
    assert score_answer(task, text, answers) == wanted


def test_intervals_are_over_samples_and_paired(tmp_path):
    """Two models that know the same half differ by nothing, though each alone is uncertain."""
    sets = make_sets(lengths=(64,))
    models = {"on": FakeModel(sets, right=6), "gate": FakeModel(sets, right=6), "off": FakeModel(sets, right=3)}
    content = evaluate(sets, models, tmp_path / "answers.jsonl").to_json()
    (entry,) = content["lengths"]
    column = entry["tasks"]["vt"]
    assert list(column["differences"]) == ["on - gate", "on - off", "gate - off"]
    assert column["levels"]["on"]["value"] == 50.0
    assert 5 < column["levels"]["on"]["low"] < 40 and 60 < column["levels"]["on"]["high"] < 95
    assert column["differences"]["on - gate"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert column["differences"]["on - off"]["value"] == 25.0
    assert -10 <= column["differences"]["on - off"]["low"] < 25 < column["differences"]["on - off"]["high"] <= 60
    assert entry["average"]["levels"]["off"]["value"] == 25.0
    assert entry["tasks"]["vt"]["prompt_tokens"] == np.mean(range(7, 19))
    assert content["warnings"] == [
        "3 of 13 tasks: published averages are over all of them",
        "12 samples of each task, fewer than 30: intervals are wide for that, and rough where a few stand out",
    ]


def test_the_average_is_over_tasks(tmp_path):
    sets = make_sets(("vt", "cwe"), (64,))
    model = FakeModel([sets[0]])
    (entry,) = evaluate(sets, {"on": model}, tmp_path / "a").to_json()["lengths"]
    assert [column["levels"]["on"]["value"] for column in entry["tasks"].values()] == [100.0, 0.0]
    assert entry["average"]["levels"]["on"]["value"] == 50.0
    assert entry["average"]["differences"] == {}


def test_table_and_warnings(tmp_path, golden):
    sets = make_sets(samples=5)
    long = dataclasses.replace(sets[1].samples[0], answer_tokens=31)
    sets[1] = dataclasses.replace(sets[1], samples=(long, *sets[1].samples[1:]))
    models = {"on": FakeModel(sets, right=3), "off": FakeModel(sets, right=1)}
    golden.check("evals/ruler.txt", evaluate(sets, models, tmp_path / "answers.jsonl").table())


def test_one_sample_has_no_interval(tmp_path):
    sets = make_sets(("vt",), (64,), samples=1)
    report = evaluate(sets, {"on": FakeModel(sets)}, tmp_path / "answers.jsonl")
    assert report.to_json()["lengths"][0]["average"]["levels"]["on"] == {"value": 100.0, "low": None, "high": None}
    assert "100.0" in report.table() and "[" not in report.table().splitlines()[4]


def test_a_model_holds_the_longest_prompt_and_its_answer():
    assert make_set("vt", 16, samples=4).max_tokens == 10 + new_tokens("vt")


# --- answers on disk -----------------------------------------------------------------------------------------------


def test_a_stopped_evaluation_asks_only_for_the_rest(tmp_path):
    sets, path = make_sets(), tmp_path / "new" / "answers.jsonl"
    straight = evaluate(sets, {"on": FakeModel(sets, right=5), "off": FakeModel(sets, right=2)}, tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        evaluate(sets, {"on": FakeModel(sets, right=5, stop_after=30)}, path)
    assert len(lines_of(path)) == 1 + 30

    torn = path.read_bytes()[:-7]
    path.write_bytes(torn)
    models = {"on": FakeModel(sets, right=5), "off": FakeModel(sets, right=2)}
    report = evaluate(sets, models, path)
    assert report.to_json() == straight.to_json()
    asked = 3 * 2 * 12
    assert len(models["on"].asked) == asked - 29, "the torn answer is asked for again"
    assert len(models["off"].asked) == asked
    assert len(lines_of(path)) == 1 + 2 * asked and all(json.loads(line) for line in lines_of(path))

    again = {"on": FakeModel(sets, right=0), "off": FakeModel(sets, right=0)}
    assert evaluate(sets, again, path).to_json() == straight.to_json()
    assert again["on"].asked == again["off"].asked == []


def test_further_samples_tasks_and_conditions_join(tmp_path):
    path, many = tmp_path / "answers.jsonl", make_sets(samples=14)
    evaluate(make_sets(TASKS[:1], samples=12), {"on": FakeModel(many)}, path)
    models = {"on": FakeModel(many), "gate": FakeModel(many)}
    evaluate(many, models, path)
    assert len(models["on"].asked) == 6 * 14 - 2 * 12
    assert len(models["gate"].asked) == 6 * 14


def refused(path, sets, **options) -> str:
    """The message of an evaluation that is refused before anything is asked or written."""
    before, model = path.read_bytes(), FakeModel(sets)
    with pytest.raises(UserError) as caught:
        evaluate(sets, {"on": model}, path, **options)
    assert model.asked == [] and path.read_bytes() == before
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_answers_of_something_else_are_refused(tmp_path):
    sets, path = make_sets(), tmp_path / "answers.jsonl"
    evaluate(sets, {"on": FakeModel(sets)}, path)
    assert "were given with step=3, now it is 4" in refused(path, sets, settings=SETTINGS | {"step": 4})
    assert "were given with gate=None, now it is 'x'" in refused(path, sets, settings=SETTINGS | {"gate": "x"})
    other = dataclasses.replace(sets[2].samples[4], prompt="another")
    changed = dataclasses.replace(sets[2], samples=(*sets[2].samples[:4], other, *sets[2].samples[5:]))
    assert "on qa_1 64 4 was given to another prompt" in refused(path, [*sets[:2], changed, *sets[3:]])


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        b"[]\n",
        b'{"key": "x"}\n',
        b'{"settings": 5}\n',
        b'{"settings": {}}\nxx\n',
        b"\xff\n",
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"line \d is no answer"):
        AnswerFile(path, {})
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"set', b'{"settings": {"a"'])
def test_a_torn_beginning_is_begun_again(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    text = "two\nlines \ud83d\ufffd"
    with AnswerFile(path, {"a": 1}) as file:
        file.add("k", "prompt", text)
    with AnswerFile(path, {"a": 1}) as file:
        assert file.find("k", "prompt") == text
        assert file.find("other", "prompt") is None


def test_two_evaluations_do_not_write_into_one_file(tmp_path):
    with AnswerFile(tmp_path / "answers.jsonl", {}) as file:
        file.add("key", "prompt", "text")
        with pytest.raises(UserError, match="another process is writing answers to"):
            AnswerFile(tmp_path / "answers.jsonl", {})
        file.add("other", "prompt", "text")
    with AnswerFile(tmp_path / "answers.jsonl", {}) as file:
        assert file.find("key", "prompt") == file.find("other", "prompt") == "text"


def test_no_space_is_one_line(tmp_path):
    with AnswerFile(tmp_path / "answers.jsonl", {}) as file:
        file._file.close()
        file._file = open("/dev/full", "wb")  # noqa: SIM115
        with pytest.raises(UserError, match=r"cannot be written to .*\(No space left on device\); choose another"):
            file.add("key", "prompt", "text")
    with pytest.raises(UserError, match="answers cannot be written to"):
        AnswerFile(tmp_path / "answers.jsonl" / "below", {})
    with pytest.raises(UserError, match=r"answers cannot be written to .*\(Is a directory\)"):
        AnswerFile(tmp_path, {})


def test_a_model_that_leaves_an_answer_out_is_noticed(tmp_path):
    sets = make_sets(lengths=(64,))

    def lazy(prompts, **options):
        yield 0, "x"

    with pytest.raises(ValueError, match="the model gave no answer on niah_multikey_1 64 1"):
        evaluate(sets, {"on": lazy}, tmp_path / "answers.jsonl")


def test_all_processes_ask_what_the_first_one_lacks(tmp_path):
    sets = make_sets()
    with pytest.raises(KeyboardInterrupt):
        evaluate(sets, {"on": FakeModel(sets, stop_after=30)}, tmp_path / "process0" / "answers.jsonl")
    command = [
        REPO / "launch" / "local.sh",
        "2",
        "1",
        sys.executable,
        "-m",
        "tests.evals.ruler.ruler_processes",
        tmp_path,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("INTTTRAIN_", "XLA_FLAGS"))}
    environment["PYTHONPATH"] = str(REPO)
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for process, outcome, folder in ((0, "report", True), (1, "no report", False)):
        said = re.findall(rf"^\[{process}\] {process}: (.*)$", done.stdout, flags=re.MULTILINE)
        twice = [f"{outcome}, 42 + 0 asked"] * 2
        assert said == [*twice, "refused: now it is 4, 42 + 0 asked", f"folder {folder}"], done.stdout
