"""RULER (arXiv 2404.06654): samples in, answers of every condition, scores and a report out.

sets = prepare_ruler(config.eval.ruler, tokenizer, folder, max_length=..., report=...)
tokens = max(ruler_set.max_tokens for ruler_set in sets)     what a model has to hold
report = evaluate_ruler(sets, {"on": ..., "off": ...}, answers=..., settings=..., ...)

Letters: N samples of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from intttrain.config import EvalConfig
from intttrain.config.errors import UserError
from intttrain.config.registry import EVAL_TASKS
from intttrain.evals.answers import AnswerFile, Settings, open_answers
from intttrain.evals.completion import Complete
from intttrain.evals.ruler.data import prepare_ruler
from intttrain.evals.ruler.report import RulerReport, make_ruler_report
from intttrain.evals.ruler.tasks import RulerSet, new_tokens
from intttrain.evals.run import EvalRun
from intttrain.logs.progress import LineStream, Progress
from intttrain.model.sampling import Sampling
from intttrain.pod.agreement import decided_by_first, on_first_process
from intttrain.pod.distributed import process_count

Report = Callable[[str], None]


@EVAL_TASKS.register("ruler")
def evaluate_checkpoint(run: EvalRun) -> None:
    """Reports the scores of a checkpoint under each of its conditions."""
    place = run.workdir.place
    if not isinstance(place, Path) and process_count() > 1 and run.ruler_data is None:
        raise UserError(
            f"--workdir={place} gives every process a folder of its own, and all of {process_count()} read "
            "the samples of RULER; name a folder that all of them see with --ruler_data"
        )
    sets = prepare_ruler(
        run.config.eval.ruler, run.config.prepare.tokenizer, run.ruler_data or run.folder / "ruler",
        max_length=None, report=run.report,
    )  # fmt: skip
    result = evaluate_ruler(
        sets, run.completers(), name=run.config.name, answers=run.folder / "ruler_answers.jsonl",
        settings=run.settings, config=run.config.eval, report=run.report,
    )  # fmt: skip
    run.finish(result)


def evaluate_ruler(
    sets: Sequence[RulerSet],
    conditions: Mapping[str, Complete],
    *,
    name: str,
    answers: Path,
    settings: Settings,
    config: EvalConfig,
    report: Report,
) -> RulerReport | None:
    """Asks every condition for what ``answers`` does not hold yet, and scores all of it.

    The most likely token is taken each time, as the authors do.

    Args:
      sets: from ``prepare_ruler``, the same on every process.
      conditions: ways to continue a prompt (update on, off, a gate, another model) by name; the report compares each
        with those after it.
      name: of the run.
      answers: file of the answers. Only process 0 reads and writes it.
      settings: what the answers depend on besides condition and prompt: run, checkpoint, tokenizer.
      config: number and seed of the resamples.
      report: receives progress lines.

    Returns:
      The report; ``None`` on every process but the first.

    Raises:
      UserError: the file holds answers of other settings or to other prompts, or cannot be written; a prompt does not
        fit a model.
    """
    with open_answers(answers, settings) as file:
        _check_known(file, sets, conditions)
        for condition, complete in conditions.items():
            _ask(file, sets, condition, complete, report)
        if file is None:
            return None
        texts = {
            condition: [[_known(file, key, prompt) for key, prompt in _questions(s, condition)] for s in sets]
            for condition in conditions
        }
    return make_ruler_report(sets, texts, config, name=name)


def _questions(ruler_set: RulerSet, condition: str) -> list[tuple[str, str]]:
    """Returns key and prompt of every sample."""
    place = f"{condition} {ruler_set.task} {ruler_set.length}"
    return [(f"{place} {n}", sample.prompt) for n, sample in enumerate(ruler_set.samples)]


def _known(file: AnswerFile, key: str, prompt: str) -> str:
    text = file.find(key, prompt)
    if text is None:
        raise ValueError(f"the model gave no answer {key}")
    return text


def _check_known(file: AnswerFile | None, sets: Sequence[RulerSet], conditions: Mapping[str, Complete]) -> None:
    """Refuses a file of other samples before anything is asked, on every process."""

    def find_all() -> None:
        assert file is not None
        for condition in conditions:
            for ruler_set in sets:
                for key, prompt in _questions(ruler_set, condition):
                    file.find(key, prompt)

    on_first_process(find_all)


def _ask(file: AnswerFile | None, sets: Sequence[RulerSet], condition: str, complete: Complete, report: Report) -> None:
    """Adds the answers of one condition that are missing."""
    for ruler_set in sets:
        questions = _questions(ruler_set, condition)
        known_N = np.array([file is not None and file.find(*question) is not None for question in questions], np.uint8)
        open_ = [question for question, known in zip(questions, decided_by_first(known_N), strict=True) if not known]
        if not open_:
            continue
        label = f"{condition} {ruler_set.task} {ruler_set.length}"
        progress = Progress(label, total=len(open_), stream=LineStream(report))
        continuations = complete(
            [prompt for _, prompt in open_], max_new_tokens=new_tokens(ruler_set.task), sampling=Sampling()
        )
        for number, text in continuations:
            if file is not None:
                file.add(*open_[number], text)
            progress.advance()
        report(progress.line())
