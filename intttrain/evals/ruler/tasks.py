"""The tasks of RULER: how many tokens an answer may have, and how it is scored.

Both are the authors' (arXiv 2404.06654, the wheel ``nvidia-long-context-eval``); the tests compare them with the wheel.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from intttrain.config.evaluation import RulerTask

ALL_TASKS: tuple[RulerTask, ...] = RulerTask.__args__  # type: ignore[attr-defined]
_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # by the first part of a task's name
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclasses.dataclass(frozen=True)
class RulerSample:
    """One question.

    Attributes:
      prompt: what the model continues; it ends with the beginning of the answer.
      answers: all of them have to appear in the continuation, for ``qa`` any.
      prompt_tokens: of the model's tokenizer.
      answer_tokens: that the answers need, separated by spaces; for ``qa`` the shortest of them.
    """

    prompt: str
    answers: tuple[str, ...]
    prompt_tokens: int
    answer_tokens: int


@dataclasses.dataclass(frozen=True)
class RulerSet:
    """The samples of one task and length; ``length`` counts the tokens of prompt and answer together."""

    task: RulerTask
    length: int
    samples: tuple[RulerSample, ...]

    @property
    def max_tokens(self) -> int:
        """Tokens that a model has to hold: the longest prompt and its answer.

        It can be larger than ``length``: the generator forgets the answer for ``fwe``, and for ``vt`` it counts the
        worked example before it renames its variables.
        """
        return max(sample.prompt_tokens for sample in self.samples) + new_tokens(self.task)


def new_tokens(task: RulerTask) -> int:
    """Returns the bound on an answer in tokens."""
    return _NEW_TOKENS[task.split("_")[0]]


def is_question_answering(task: RulerTask) -> bool:
    """Tells whether one of the answers is enough."""
    return task.startswith("qa_")


def score_answer(task: RulerTask, text: str, answers: Sequence[str]) -> float:
    """Returns the authors' score of one continuation, 0 to 100.

    The share of the answers that appear in it, whatever their case (``string_match_all``); for ``qa`` 100 if any of
    them does (``string_match_part``). Control characters become line ends and the ends are stripped first.
    """
    cleaned = _CONTROL.sub("\n", text.strip()).strip().lower()
    found = [answer.lower() in cleaned for answer in answers]
    return 100.0 * (max(found) if is_question_answering(task) else sum(found) / len(found))
