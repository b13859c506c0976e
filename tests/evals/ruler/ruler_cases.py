"""Made-up RULER samples and models that answer from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from intttrain.config import EvalConfig
from intttrain.evals import RulerSample, RulerSet
from intttrain.evals.ruler.tasks import is_question_answering
from intttrain.model.sampling import Sampling

CONFIG = EvalConfig(
    seq_len=8, documents=1, min_document_tokens=4, position_edges=(8,), bootstrap_samples=200, seed=0
)  # fmt: skip
SETTINGS = {"run": "tiny", "step": 3, "tokenizer": "byte"}
TASKS = ("niah_multikey_1", "vt", "qa_1")


def make_set(task: str, length: int, *, samples: int = 12) -> RulerSet:
    answers = [tuple(f"{task} Answer {n}.{k}" for k in range(2)) for n in range(samples)]
    made = [RulerSample(f"{task} {length} prompt {n}", answers[n], 7 + n, 20) for n in range(samples)]
    return RulerSet(task, length, tuple(made))


def make_sets(tasks: Sequence[str] = TASKS, lengths: Sequence[int] = (64, 128), **options: Any) -> list[RulerSet]:
    return [make_set(task, length, **options) for length in lengths for task in tasks]


class FakeModel:
    """Continues the prompts of ``sets``, the last first, and remembers what it was asked.

    Attributes:
      right: it knows the answers of so many of the first samples of each set; ``None`` = of all.
      stop_after: raises ``KeyboardInterrupt`` instead of giving a further answer.
    """

    def __init__(self, sets: Sequence[RulerSet], *, right: int | None = None, stop_after: int | None = None) -> None:
        self._answers = {
            sample.prompt: self._good_answer(ruler_set, sample)
            for ruler_set in sets
            for sample in ruler_set.samples[:right]
        }
        self.stop_after = stop_after
        self.asked: list[str] = []
        self.max_new_tokens: set[int] = set()

    @staticmethod
    def _good_answer(ruler_set: RulerSet, sample: RulerSample) -> str:
        one = is_question_answering(ruler_set.task)
        return "\tThey are " + (sample.answers[-1] if one else ", ".join(sample.answers)).upper()

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Iterator[tuple[int, str]]:
        assert prompts and sampling == Sampling() and stop == ()
        self.max_new_tokens.add(max_new_tokens)
        for number, prompt in reversed([*enumerate(prompts)]):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            yield number, self._answers.get(prompt, "")


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)
