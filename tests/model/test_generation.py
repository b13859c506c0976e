"""Generation: every document goes its own way, whoever shares the batch with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.model import Generator, Request, Sampling, sample_tokens
from tests.model.test_decode import BASE, CHUNK, forward, random_params

PARAMS = random_params(BASE)
PROMPTS = [np.random.default_rng(2).integers(0, BASE.vocab_size, n).astype(np.int32) for n in (1, 4, 9, 5, 3)]
NEW = 6


def requests(numbers: Any = None) -> list[Request]:
    return [Request(n, PROMPTS[n], NEW) for n in (range(len(PROMPTS)) if numbers is None else numbers)]


@pytest.fixture(scope="module")
def generator() -> Generator:
    """Two rows for five documents: rows are left and joined at different times."""
    return Generator(BASE, PARAMS, rows=2, max_tokens=15, draws=4)


def continuations(generator: Generator, wanted: list[Request], sampling: Sampling, **more: Any) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {request.sequence: [] for request in wanted}
    ended = set()
    for piece in generator.run(wanted, sampling, **more):
        assert piece.sequence not in ended
        found[piece.sequence] += piece.tokens.tolist()
        ended |= {piece.sequence} if piece.finished else set()
    assert ended == set(found)
    return found


def test_greedy_generation_follows_the_full_forward_whatever_the_batch(generator: Generator) -> None:
    found = continuations(generator, requests(), Sampling())
    for number, prompt in enumerate(PROMPTS):
        assert len(found[number]) == NEW
        text = prompt
        for token in found[number]:
            assert token == forward(BASE, PARAMS, text[None])[0][0, -1].argmax()
            text = np.append(text, np.int32(token))
    assert continuations(generator, requests([3]), Sampling()) == {3: found[3]}


def test_draws_depend_on_seed_and_document_and_not_on_neighbours_or_order(generator: Generator) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    found = continuations(generator, requests(), sampling)
    assert continuations(generator, requests([4, 2, 0, 1, 3]), sampling) == found
    assert continuations(generator, requests(), sampling._replace(seed=6)) != found
    twins = [Request(n, PROMPTS[2], NEW) for n in (7, 8)]
    assert len({tuple(tokens) for tokens in continuations(generator, twins, sampling).values()}) == 2


def test_a_stop_token_or_the_caller_ends_a_continuation(generator: Generator) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    free = continuations(generator, requests(), sampling)
    stop = free[2][2]
    stopped = continuations(generator, requests(), sampling, stop_tokens=(stop,))
    for number, tokens in free.items():
        ends = tokens.index(stop) + 1 if stop in tokens else NEW
        assert stopped[number] == tokens[:ends]
    ended = continuations(generator, requests(), sampling, is_finished=lambda sequence, tokens: sequence == 1)
    assert ended[1] == free[1][:4] and ended[3] == free[3]


def test_eta_zero_generates_with_the_plain_model(generator: Generator) -> None:
    off = Generator(BASE, PARAMS, rows=2, max_tokens=15, draws=4, eta=0.0)
    found = continuations(off, requests([2]), Sampling())[2]
    text = np.append(PROMPTS[2], np.asarray(found[:-1], np.int32))
    assert found[-1] == forward(BASE, PARAMS, text[None], 0.0)[0][0, -1].argmax()
    assert found != continuations(generator, requests([2]), Sampling())[2]


@pytest.mark.parametrize(
    ("request_", "parts"),
    [
        (Request(3, np.zeros(0, np.int32), 4), ["prompt 3", "no token"]),
        (Request(3, np.zeros(10, np.int32), 6), ["10 tokens", "6 more", "15", "at most 5 new ones"]),
        (Request(3, np.array([24], np.int32), 4), ["24", "model.vocab_size=24"]),
    ],
)
def test_requests_that_cannot_be_continued_are_refused(generator: Generator, request_: Request, parts: Any) -> None:
    with pytest.raises(UserError) as error:
        list(generator.run([request_], Sampling()))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_a_window_keeps_only_what_is_seen() -> None:
    config = dataclasses.replace(BASE, sliding_window=3)
    generator = Generator(config, PARAMS, rows=1, max_tokens=400, draws=4)
    assert generator.state.keys.k_LBSKH.shape[2] == 3 + CHUNK - 1


def frequencies(sampling: Sampling, logits: list[float], draws: int = 4000) -> np.ndarray:
    logits_BV = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    rows = jnp.arange(draws)
    drawn = jax.jit(sample_tokens)(logits_BV, sampling, rows, jnp.zeros_like(rows))
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / draws


def test_sampling_keeps_to_temperature_top_k_and_top_p() -> None:
    share = np.array([0.1, 0.5, 0.15, 0.25])
    logits = np.log(share).tolist()
    np.testing.assert_allclose(frequencies(Sampling(1.0), logits), share, atol=0.03)
    warm = share**0.5 / (share**0.5).sum()
    np.testing.assert_allclose(frequencies(Sampling(2.0), logits), warm, atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_k=2), logits), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    # .5 + .25 reach .7, so the third is left out; .8 needs it
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_p=0.7), logits), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_p=0.8), logits), [0, 5 / 9, 1 / 6, 5 / 18], atol=0.03)
    assert frequencies(Sampling(1.0, top_p=0.0), logits)[1] == frequencies(Sampling(0.0), logits)[1] == 1.0
