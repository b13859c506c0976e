"""Text from a trained model: what evaluations by generation ask of it, and how it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from intttrain.data import Tokenizer
from intttrain.model import Generator, Request, Sampling


@runtime_checkable
class Complete(Protocol):
    """Continues prompts with a trained model and its tokenizer."""

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int, sampling: Sampling, stop: Sequence[str] = (),
        sequences: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, str]]:  # fmt: skip
        """Yields the number of a prompt and its continuation, in the order in which they are finished.

        Args:
          prompts: text, each with a token at least.
          max_new_tokens: bound on each continuation.
          sampling: how tokens are drawn.
          stop: a continuation ends before the first of these, or at the end of a document.
          sequences: different numbers that the draws of the prompts depend on; by default 0, 1, 2, ...

        Raises:
          UserError: a prompt without a token, or one that with ``max_new_tokens`` is longer than the model's cache.
        """
        ...


class TextStream:
    """Turns the pieces of a growing continuation into text; characters of which bytes are missing wait."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""

    def feed(self, tokens: np.ndarray, *, last: bool = False) -> str:
        """Takes new ids and returns the new text; ``last`` gives out what was held back."""
        self._ids += tokens.tolist()
        whole = self._tokenizer.decode(self._ids)
        if not last:
            whole = whole.rstrip("\ufffd")
        new, self.text = whole[len(self.text) :], whole
        return new


class Completer:
    """``Complete`` by a ``Generator``: its rows are never idle while prompts wait.

    Args:
      make_generator: called with the longest prompt and continuation, in tokens.
      tokenizer: of the model.
      empty: ids that are read in place of a prompt without a token; if there are none, such a prompt is refused.
    """

    def __init__(
        self, make_generator: Callable[[int], Generator], tokenizer: Tokenizer, empty: Sequence[int] = ()
    ) -> None:
        self._make_generator, self._tokenizer, self._empty = make_generator, tokenizer, empty
        self._generator: Generator | None = None

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int, sampling: Sampling, stop: Sequence[str] = (),
        sequences: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, str]]:  # fmt: skip
        """See ``Complete``; one compiled program serves prompts of all lengths up to the longest."""
        encoded = self._tokenizer.encode_many(prompts)
        numbers = list(range(len(encoded)) if sequences is None else sequences)
        chosen = [np.asarray(ids if len(ids) else self._empty, np.int32) for ids in encoded]
        requests = [Request(n, prompt, max_new_tokens) for n, prompt in zip(numbers, chosen, strict=True)]
        longest = max((len(request.prompt) for request in requests), default=0) + max_new_tokens
        if self._generator is None or self._generator.max_tokens < longest:
            self._generator = self._make_generator(longest)
        streams = {request.sequence: TextStream(self._tokenizer) for request in requests}
        stopped: set[int] = set()

        def is_finished(sequence: int, tokens: np.ndarray) -> bool:
            streams[sequence].feed(tokens)
            if any(mark in streams[sequence].text for mark in stop):
                stopped.add(sequence)
            return sequence in stopped

        end = self._tokenizer.end_of_document
        for piece in self._generator.run(requests, sampling, stop_tokens=(end,), is_finished=is_finished):
            if piece.finished:
                stream = streams.pop(piece.sequence)
                stream.feed(np.zeros(0, np.int32), last=True)
                yield numbers.index(piece.sequence), _before(stream.text, stop)


def _before(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first of the marks."""
    return text[: min((at for mark in stop if (at := text.find(mark)) >= 0), default=len(text))]
