"""Text in, text out: characters that are not whole yet, stop strings, prompts of any length."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.data.tokenizers import ByteTokenizer
from intttrain.evals.completion import Completer, TextStream
from intttrain.model import Generator, Sampling
from tests.model.test_decode import BASE, random_params

MODEL = dataclasses.replace(BASE, vocab_size=257, sliding_window=8)
PARAMS = random_params(MODEL)


def test_characters_wait_for_their_bytes() -> None:
    stream = TextStream(ByteTokenizer())
    ids = np.frombuffer("aä€".encode(), np.uint8)
    assert [stream.feed(ids[n : n + 1]) for n in range(len(ids))] == ["a", "", "ä", "", "", "€"]
    assert stream.feed(np.array([0xE2])) == "" and stream.feed(np.zeros(0, int), last=True) == "\ufffd"
    assert stream.text == "aä€\ufffd"


class Counting:
    """Makes generators and remembers for how long a document."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, max_tokens: int) -> Generator:
        self.asked.append(max_tokens)
        return Generator(MODEL, PARAMS, rows=2, max_tokens=max_tokens, draws=4)


@pytest.fixture(scope="module")
def counting() -> Counting:
    return Counting()


def complete(make: Any, prompts: list[str], **more: Any) -> dict[int, str]:
    settings: dict[str, Any] = {"max_new_tokens": 8, "sampling": Sampling(1.0, seed=1)} | more
    return dict(Completer(make, ByteTokenizer())(prompts, **settings))


def test_continuations_end_before_a_stop_string_and_do_not_see_each_other(counting: Counting) -> None:
    prompts = ["ab", "a longer prompt", "c"]
    free = complete(counting, prompts)
    assert set(free) == {0, 1, 2} and counting.asked[-1] == len(prompts[1]) + 8
    mark = free[1][2:4]
    assert mark
    stopped = complete(counting, prompts, stop=(mark,))
    assert stopped[1] == free[1][: free[1].find(mark)]
    assert stopped[0] == (free[0] if mark not in free[0] else free[0][: free[0].find(mark)])
    assert complete(counting, ["", "b"][1:], max_new_tokens=1)[0] is not None


def test_what_is_drawn_follows_the_number_and_not_the_place(counting: Counting) -> None:
    """So that an evaluation that was interrupted draws what it would have drawn."""
    whole = complete(counting, ["ab", "ab", "c", "ab"])
    assert len({whole[0], whole[1], whole[3]}) == 3
    rest = complete(counting, ["ab", "ab"], sequences=[3, 1])
    assert [rest[0], rest[1]] == [whole[3], whole[1]]


def test_a_prompt_without_a_token_is_refused(counting: Counting) -> None:
    with pytest.raises(UserError, match="prompt 1 has no token"):
        complete(counting, ["a", ""])
