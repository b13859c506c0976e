"""The authors' generator itself: all tasks, the model's tokenizer, lengths that are too short, and the scorer."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from intttrain.config import TokenizerConfig
from intttrain.config.errors import UserError
from intttrain.config.evaluation import RulerConfig
from intttrain.evals import evaluate_ruler, prepare_ruler
from intttrain.evals.ruler.generator import GENERATOR, PROGRAM, SENTENCES
from intttrain.evals.ruler.tasks import ALL_TASKS, is_question_answering, new_tokens, score_answer
from tests.evals.ruler.ruler_cases import CONFIG, SETTINGS, FakeModel

try:
    ROOT = Path(str(importlib.metadata.distribution(GENERATOR).locate_file("long_context_eval")))
    NLTK = Path(str(importlib.metadata.distribution(SENTENCES).locate_file("llama_index/core/_static/nltk_cache")))
except importlib.metadata.PackageNotFoundError as error:
    pytest.skip(f"needs the ruler extra ({error.name})", allow_module_level=True)

pytestmark = pytest.mark.ruler
BYTE = TokenizerConfig(kind="byte")
SHORT = 16384  # bytes; the smallest samples of qa_2 need about 14,000


def prepare(folder, *, tasks=ALL_TASKS, length=SHORT):
    config = RulerConfig(tasks=tasks, lengths=(length,), samples=2)
    return prepare_ruler(config, BYTE, folder, max_length=None, report=lambda line: None)


# One for each script of the generator and kind of needle; all eight niah tasks sort six million words each.
EACH_SCRIPT = ("niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe", "qa_2")


@pytest.mark.slow
def test_tasks_from_the_generator_to_the_report(tmp_path):
    sets = prepare(tmp_path / "data", tasks=EACH_SCRIPT)
    assert [ruler_set.task for ruler_set in sets] == list(EACH_SCRIPT)
    for ruler_set in sets:
        assert SHORT // 2 < ruler_set.max_tokens <= SHORT
        for sample in ruler_set.samples:
            assert sample.prompt_tokens == len(sample.prompt.encode())
            assert sample.answer_tokens <= new_tokens(ruler_set.task)
    assert prepare(tmp_path / "data", tasks=EACH_SCRIPT) == sets

    models = {"on": FakeModel(sets), "off": FakeModel(sets, right=0)}
    report = evaluate_ruler(
        sets, models, name="x", answers=tmp_path / "a", settings=SETTINGS, config=CONFIG, report=lambda line: None
    )
    (entry,) = report.to_json()["lengths"]
    assert all(column["levels"]["on"]["value"] == 100.0 for column in entry["tasks"].values())
    assert all(column["levels"]["off"]["value"] == 0.0 for column in entry["tasks"].values())


@pytest.mark.parametrize(("task", "length"), [("cwe", 5000), ("vt", 1000)])
def test_a_length_that_is_too_short_names_one_that_is_not(tmp_path, task, length):
    """The generator alone would never end."""
    with pytest.raises(UserError, match=f"eval.ruler.lengths={length} is too short for {task}") as caught:
        prepare(tmp_path, tasks=(task,), length=length)
    (enough,) = re.findall(r"use (\d+) or more", str(caught.value))
    (ruler_set,) = prepare(tmp_path, tasks=(task,), length=int(enough))
    assert ruler_set.max_tokens <= int(enough)


@pytest.mark.hf
def test_samples_equal_those_of_the_authors_own_command(tmp_path):
    """Their command loads a Hugging Face folder with transformers; ours counts with the same file."""
    pytest.importorskip("transformers")
    make_tokenizer(tmp_path / "tokenizer")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    command = [
        sys.executable, "prepare.py", f"--save_dir={theirs}", "--task=cwe", "--tokenizer_type=hf",
        f"--tokenizer_path={tmp_path / 'tokenizer'}", "--max_seq_length=2048", "--num_samples=3",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"NLTK_DATA": str(NLTK), "PATH": path}
    subprocess.run(command, cwd=ROOT / "data", env=environment, capture_output=True, check=True)
    tokenizer = {"kind": "huggingface", "path": str(tmp_path / "tokenizer"), "end_of_document": "<end>"}
    request = {
        "task": "cwe", "length": 2048, "samples": 3, "seed": 42, "tokenizer": tokenizer, "output": str(ours),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(request)], capture_output=True, check=True)
    wanted = (theirs / "cwe" / "validation.jsonl").read_text()
    assert len(wanted.splitlines()) == 3
    assert (ours / "cwe" / "validation.jsonl").read_text() == wanted


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words of the task's text and of bytes for all others."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([(ROOT / "data" / "template.py").read_text()], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


# --- the scorer ----------------------------------------------------------------------------------------------------


def wheel_module(path: str) -> dict:
    """Runs the assignments and functions of a file of the wheel; its imports need more than the scorer does."""
    tree = ast.parse((ROOT / path).read_text())
    kept = [
        n
        for n in tree.body
        if isinstance(n, ast.FunctionDef) or (isinstance(n, ast.Assign) and "TASKS" in ast.unparse(n.targets))
    ]
    names = {"re": re}
    exec(compile(ast.Module(kept, []), path, "exec"), names)
    return names


RECORDED = [
    ("The special magic number is 1234567.", ["1234567"]),
    (" 1234567 and 7654321\n", ["1234567", "7654321", "1111111", "2222222"]),
    ("", ["a"]),
    ("\x00\x1f\t \n", ["\n"]),
    ("one\x07two\x00", ["one\ntwo", "two\n", "one"]),
    ("\x1fx\x1f", ["\nx", "x"]),
    ("ABC abc", ["aBc", "abd"]),
    ("İstanbul STRASSE", ["i̇stanbul", "straße", "strasse"]),
    ("a\u2028b\x85 ", ["b\x85", "a\u2028b"]),
    ("yes", ["yes", "yes", "no"]),
    ("empty reference", [""]),
    ("1. word 2. other", ["word", "other", "wor", "rd 2"]),
]


def test_new_tokens_and_scores_equal_the_generators():
    functions = wheel_module("eval/synthetic/constants.py")
    clean = wheel_module("eval/evaluate.py")["postprocess_pred"]
    lengths = wheel_module("data/synthetic/constants.py")["TASKS"]
    tasks = dict(re.findall(r"^(\w+):\n  task: (\w+)", (ROOT / "synthetic.yaml").read_text(), flags=re.MULTILINE))
    assert sorted(tasks) == sorted(ALL_TASKS)

    generator = random.Random(0)
    letters = "aAbİß \t\n\x00\x1f\x85"
    word = lambda longest: "".join(generator.choices(letters, k=generator.randint(0, longest)))  # noqa: E731
    cases = RECORDED + [(word(12), [word(3) for _ in range(generator.randint(1, 4))]) for _ in range(500)]
    texts, references = zip(*cases, strict=True)
    for task, kind in tasks.items():
        assert new_tokens(task) == lengths[kind]["tokens_to_generate"]
        cleaned = [clean(text, {}) for text in texts]
        scores = [score_answer(task, text, answers) for text, answers in cases]
        assert scores == pytest.approx(functions["TASKS"][kind]["metric_fn_per_sample"](cleaned, references))
        assert round(sum(scores) / len(scores), 2) == functions["TASKS"][kind]["metric_fn"](cleaned, references)
        assert 0 < sum(scores) < 100 * len(scores)
        assert is_question_answering(task) == (kind == "qa")
