"""HumanEval without a model: the problems and their solutions, pass@k, what is asked, and what an answer file keeps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.config.evaluation import CodeConfig, EvalConfig
from intttrain.evals.code import Limits, evaluate_code, run_programs
from intttrain.evals.code.problems import STOP, load_problems
from intttrain.evals.code.report import make_code_report, pass_at_k
from intttrain.evals.code.sandbox import Verdict

SMALL = CodeConfig(problems=3, seconds=20.0, memory_mib=256)
EVAL = EvalConfig(seq_len=8, documents=1, min_document_tokens=2, position_edges=(8,), bootstrap_samples=50)
WRONG = "    return None\n"


class Scripted:
    """Stands for a model: answers every problem from ``solved`` with its solution, the others with a wrong one."""

    def __init__(self, solved: Sequence[int] = (), *, stop_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.sequences: list[int] = []
        self._completions = {p.prompt: p.solution if i in solved else WRONG for i, p in enumerate(load_problems())}
        self._stop_after = stop_after

    def __call__(self, prompts, *, max_new_tokens, sampling, stop=(), sequences=None) -> Iterator[tuple[int, str]]:
        assert tuple(stop) == STOP
        self.sequences += sequences
        for done, i in enumerate(reversed(range(len(prompts)))):  # not in the order in which they were given
            if done == self._stop_after:
                raise KeyboardInterrupt
            self.asked.append(prompts[i])
            yield i, self._completions[prompts[i]]


def evaluate(conditions, folder, config=SMALL, *, step=3, execute_untrusted_code=True):
    report = evaluate_code(
        conditions,
        name="tiny",
        folder=folder,
        settings={"step": step},
        config=dataclasses.replace(EVAL, code=config),
        report=lambda line: None,
        execute_untrusted_code=execute_untrusted_code,
    )
    assert report is not None
    return report


# --- problems ------------------------------------------------------------------------------------------------------


def test_every_solution_of_the_authors_passes():
    problems = load_problems()
    assert [problem.name for problem in problems] == [f"HumanEval/{i}" for i in range(164)]
    programs = [problem.program(problem.solution) for problem in problems]
    verdicts = dict(run_programs(programs, Limits(seconds=60.0, memory_mib=1024)))
    assert {problems[i].name: verdict for i, verdict in verdicts.items() if verdict.outcome != "passed"} == {}
    assert len(verdicts) == 164


def test_a_wrong_solution_fails_its_test():
    problems = load_problems(8)
    verdicts = dict(run_programs([p.program(WRONG) for p in problems], Limits(seconds=60.0, memory_mib=1024)))
    assert {verdict.outcome for verdict in verdicts.values()} == {"failed"}


def test_problems_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install intttrain\[code\]"):
        load_problems()


# --- pass@k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "k"), [(1, 1), (5, 1), (5, 2), (6, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(samples, k):
    for correct in range(samples + 1):
        subsets = list(itertools.combinations([i < correct for i in range(samples)], k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_is_finite_and_bounded():
    values = [pass_at_k(10_000, correct, 100) for correct in (0, 1, 50, 9_900, 9_901, 10_000)]
    assert values == sorted(values)
    assert values[0] == 0.0
    assert values[1] == pytest.approx(0.01)
    assert values[-2:] == [1.0, 1.0]


@pytest.mark.parametrize("k", [0, 3])
def test_k_outside_the_samples(k):
    with pytest.raises(ValueError, match="from 1 to samples=2"):
        pass_at_k(2, 1, k)


def fixed_report():
    passed, failed = Verdict("passed"), Verdict("failed", "AssertionError")
    slow, killed = Verdict("timed_out", "3 s"), Verdict("killed", "memory limit of 1024 MiB")
    on = [[passed, failed], [passed, passed], [failed, slow], [passed, killed]] * 5
    off = [[failed, failed], [passed, passed], [failed, slow], [failed, killed]] * 5
    return make_code_report({"on": on, "off": off}, (1, 2), name="tiny", bootstrap_samples=200, bootstrap_seed=0)


def test_table(golden):
    golden.check("evals/code_report.txt", fixed_report().table())


def test_json_holds_the_numbers_of_the_table():
    content = fixed_report().to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["levels"]["on"]["pass@1"]["value"] == pytest.approx(50.0)
    assert content["levels"]["on"]["pass@2"]["value"] == pytest.approx(75.0)
    difference = content["differences"]["on - off"]["pass@1"]
    assert difference["value"] == pytest.approx(25.0)
    assert 0.0 < difference["low"] < 25.0 < difference["high"]
    (warning,) = content["warnings"]
    assert warning.startswith("20 problems, fewer than 30")
    assert content["outcomes"]["on"] == {"passed": 20, "failed": 10, "timed_out": 5, "killed": 5}


# --- evaluation ----------------------------------------------------------------------------------------------------


def test_nothing_runs_unless_it_is_asked_for_by_name(tmp_path):
    model = Scripted()
    with pytest.raises(UserError, match="--execute_model_code"):
        evaluate({"on": model}, tmp_path, execute_untrusted_code=False)
    assert model.asked == []
    assert os.listdir(tmp_path) == []


def test_conditions_are_told_apart(tmp_path):
    report = evaluate({"on": Scripted((0, 1)), "off": Scripted((1,))}, tmp_path)
    values = {name: estimate.value_P[0] for name, estimate in (report.levels | report.differences).items()}
    assert values == pytest.approx({"on": 200 / 3, "off": 100 / 3, "on - off": 100 / 3})


def test_an_interrupted_evaluation_goes_on(tmp_path):
    """While it asks, and with lines that were not written to their ends."""
    config = CodeConfig(problems=3, samples=2, temperature=0.8, pass_at=(1, 2), seconds=20.0, memory_mib=256)
    with pytest.raises(KeyboardInterrupt):
        evaluate({"on": Scripted((0, 1), stop_after=4)}, tmp_path, config)
    with (tmp_path / "completions.jsonl").open("ab") as file:
        file.write(b'{"key": "on HumanEv')
    second = Scripted((0, 1))
    report = evaluate({"on": second}, tmp_path, config)
    assert len(second.asked) == 2
    assert second.sequences == [0, 1]  # the numbers of the samples that are missing
    np.testing.assert_allclose(report.levels["on"].value_P, [200 / 3, 200 / 3])

    # With a verdict less, the one program runs and nothing is asked.
    verdicts = tmp_path / "verdicts.jsonl"
    whole = verdicts.read_bytes()
    assert whole.count(b"\n") == 7
    verdicts.write_bytes(whole[:-9])
    third = Scripted()
    assert evaluate({"on": third}, tmp_path, config).table() == report.table()
    assert third.asked == []
    assert verdicts.read_bytes() == whole


def test_verdicts_are_kept(tmp_path, monkeypatch):
    report = evaluate({"on": Scripted((0,))}, tmp_path)
    ran = []
    monkeypatch.setattr("intttrain.evals.code.evaluate.run_programs", lambda programs, _: ran.extend(programs) or ())
    assert evaluate({"on": Scripted()}, tmp_path).table() == report.table()
    assert ran == []


@pytest.mark.parametrize(
    ("changes", "step", "message"),
    [
        ({"temperature": 0.5}, 3, "temperature=0.0, now it is 0.5"),
        ({}, 4, "step=3, now it is 4"),
        ({"memory_mib": 300}, 3, "memory_mib=256, now it is 300"),
    ],
)
def test_answers_of_other_settings_are_refused(tmp_path, changes, step, message):
    options = {"problems": 1, "seconds": 20.0, "memory_mib": 256}
    evaluate({"on": Scripted()}, tmp_path, CodeConfig(**options))
    before, model = [path.read_bytes() for path in sorted(tmp_path.iterdir())], Scripted()
    with pytest.raises(UserError, match=message):
        evaluate({"on": model}, tmp_path, CodeConfig(**{**options, **changes}), step=step)
    assert model.asked == []
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CodeConfig(pass_at=(1, 10)), r"pass_at=\[1, 10\] .* none above eval.code.samples=1"),
        (CodeConfig(samples=4), "temperature=0.0 gives equal completions"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        evaluate({"on": Scripted()}, tmp_path, config)
