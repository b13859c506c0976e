"""HumanEval of one model under several conditions: completions, verdicts, report.

Letters: N completions of all problems.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from intttrain.config import EvalConfig
from intttrain.config.errors import UserError
from intttrain.config.evaluation import CodeConfig
from intttrain.config.registry import EVAL_TASKS
from intttrain.evals.answers import AnswerFile, Settings, open_answers
from intttrain.evals.code.problems import STOP, Problem, load_problems
from intttrain.evals.code.report import CodeReport, make_code_report
from intttrain.evals.code.sandbox import Limits, Verdict, check_sandbox, run_programs
from intttrain.evals.completion import Complete
from intttrain.evals.run import EvalRun
from intttrain.logs.progress import LineStream, Progress
from intttrain.model.sampling import Sampling
from intttrain.pod.agreement import decided_by_first, on_first_process

Report = Callable[[str], None]


class _Question(NamedTuple):
    key: str
    problem: Problem


@EVAL_TASKS.register("code")
def evaluate_checkpoint(run: EvalRun) -> None:
    """Reports the pass@k of a checkpoint under each of its conditions."""
    result = evaluate_code(
        run.completers(), name=run.config.name, folder=run.folder / "code", settings=run.settings,
        config=run.config.eval, report=run.report, execute_untrusted_code=run.execute_model_code,
    )  # fmt: skip
    run.finish(result)


def evaluate_code(
    conditions: Mapping[str, Complete],
    *,
    name: str,
    folder: Path,
    settings: Settings,
    config: EvalConfig,
    report: Report,
    execute_untrusted_code: bool,
) -> CodeReport | None:
    """Asks every condition for the completions that ``folder`` does not hold yet, runs them, and returns pass@k.

    Args:
      conditions: ``on``, ``off`` and so on, at least one; differences are taken to the first.
      name: of the run.
      folder: of the files ``completions.jsonl`` and ``verdicts.jsonl``; only process 0 reads and writes them.
      settings: what completions depend on besides condition, prompt and sampling: run, checkpoint, tokenizer.
      config: ``code``, and number and seed of the resamples.
      report: receives progress lines.
      execute_untrusted_code: must be True: programs that the model wrote are executed, in the sandbox.

    Returns:
      The report; ``None`` on every process but the first.

    Raises:
      UserError: not asked for, a layer of the sandbox is missing, settings that make no sense or differ from those
        of the files, or the problems are not installed.
    """
    if not execute_untrusted_code:
        raise UserError("HumanEval executes programs that the model wrote; ask for it by name: --execute_model_code")
    code = config.code
    _check(code)
    limits = Limits(code.seconds, code.memory_mib)
    on_first_process(lambda: check_sandbox(limits))  # before hours of sampling
    problems = load_problems(code.problems)
    questions = {
        condition: [_Question(f"{condition} {p.name} {n}", p) for p in problems for n in range(code.samples)]
        for condition in conditions
    }
    drawn = {name: getattr(code, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    with open_answers(folder / "completions.jsonl", {**settings, **drawn}) as completions:
        for condition, complete in conditions.items():
            _ask(condition, complete, questions[condition], code, completions, report)
        if completions is None:
            return None
        programs = {q.key: q.problem.program(_known(completions, q)) for asked in questions.values() for q in asked}
    verdicts = _judge(programs, limits, folder / "verdicts.jsonl", report)
    by_problem = {
        condition: [[verdicts[q.key] for q in asked[i : i + code.samples]] for i in range(0, len(asked), code.samples)]
        for condition, asked in questions.items()
    }
    return make_code_report(
        by_problem, code.pass_at, name=name, bootstrap_samples=config.bootstrap_samples, bootstrap_seed=config.seed
    )


def _check(code: CodeConfig) -> None:
    if not code.pass_at or max(code.pass_at) > code.samples:
        raise UserError(
            f"eval.code.pass_at={list(code.pass_at)} needs at least one k and none above "
            f"eval.code.samples={code.samples}; use for example [1, {code.samples}]"
        )
    if code.temperature == 0.0 and code.samples > 1:
        raise UserError(
            f"eval.code.samples={code.samples} with eval.code.temperature=0.0 gives equal completions; use 1 sample, "
            "or a temperature such as 0.8"
        )


def _ask(
    condition: str,
    complete: Complete,
    questions: Sequence[_Question],
    code: CodeConfig,
    file: AnswerFile | None,
    report: Report,
) -> None:
    """Adds the completions of one condition that are missing."""
    known_N = np.array(
        [file is not None and file.find(q.key, q.problem.prompt) is not None for q in questions], np.uint8
    )
    known_N = decided_by_first(known_N)
    places = np.flatnonzero(known_N == 0).tolist()
    if not places:
        return
    wanted = [questions[place] for place in places]
    sampling = Sampling(temperature=code.temperature, top_p=code.top_p, seed=np.uint32(code.seed))
    progress = Progress(f"{condition} HumanEval", total=len(wanted), stream=LineStream(report))
    prompts = [question.problem.prompt for question in wanted]
    for number, text in complete(
        prompts, max_new_tokens=code.max_new_tokens, sampling=sampling, stop=STOP, sequences=places
    ):  # after an interruption too a sample is what it would have been
        if file is not None:
            file.add(wanted[number].key, prompts[number], text)
        progress.advance()
    report(progress.line())


def _known(file: AnswerFile, question: _Question) -> str:
    text = file.find(question.key, question.problem.prompt)
    if text is None:
        raise ValueError(f"the model gave no answer {question.key}")
    return text


def _judge(programs: Mapping[str, str], limits: Limits, path: Path, report: Report) -> dict[str, Verdict]:
    """Returns the verdict on every program by its key; runs those on which ``path`` has none."""
    with AnswerFile(path, limits._asdict()) as file:
        wanted = [key for key, program in programs.items() if file.find(key, program) is None]
        progress = Progress("programs", total=len(wanted), stream=LineStream(report))
        for number, verdict in run_programs([programs[key] for key in wanted], limits):
            file.add(wanted[number], programs[wanted[number]], json.dumps(verdict))
            progress.advance()
        return {key: Verdict(*json.loads(file.find(key, program) or "")) for key, program in programs.items()}
