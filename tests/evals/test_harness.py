"""Requests of lm-evaluation-harness are answered by the model that was trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.app.harness import load_respondent
from intttrain.config.errors import UserError
from intttrain.data.tokenizers import ByteTokenizer
from intttrain.evals.conditions import Condition
from intttrain.evals.harness import Respondent, padded_length, register_model
from intttrain.model import abstract_params, bind
from tests.evals.cases import CHUNK, MODEL

BYTES = dataclasses.replace(MODEL, vocab_size=257)
ROWS = 3
GREEDY = {"do_sample": False, "until": [], "max_gen_toks": 4}


def random_params() -> Any:
    """Parameters large enough that every update matters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), jnp.float32), abstract_params(BYTES)
    )


PARAMS = random_params()


def respondent(eta: float = 0.5) -> Respondent:
    return Respondent(Condition(BYTES, PARAMS, eta), ByteTokenizer(), rows=ROWS, report=lambda _: None)


def random_pairs() -> list[tuple[list[int], list[int]]]:
    """Padded to two lengths, that two programs serve; they end at, before and after chunk edges."""
    rng = np.random.default_rng(1)
    lengths = [(1, 8), (7, 3), (8, 8), (20, 5), (1, 15), (13, 18), (12, 4), (31, 1)]
    return [(rng.integers(0, 256, a).tolist(), rng.integers(0, 256, b).tolist()) for a, b in lengths]


PAIRS = random_pairs()
PADDED = 32


@jax.jit
def _logits(tokens_BT: jax.Array, segment_ids_BT: jax.Array, eta: jax.Array) -> jax.Array:
    decoder = bind(BYTES, PARAMS)
    positions_BT = jnp.broadcast_to(jnp.arange(PADDED, dtype=jnp.int32)[None], tokens_BT.shape)
    hidden_BTD = decoder(tokens_BT, segment_ids_BT, positions_BT, eta=eta).hidden_BTD
    return jnp.einsum("btd,vd->btv", hidden_BTD, decoder.output_weight())


def forward_logits(documents: list[list[int]], eta: float) -> np.ndarray:
    """Logits (documents x PADDED x vocabulary) of one full forward."""
    tokens, segment_ids = np.zeros((2, len(documents), PADDED), np.int32)
    for row, document in enumerate(documents):
        tokens[row, : len(document)], segment_ids[row, : len(document)] = document, 1
    return np.asarray(_logits(tokens, segment_ids, jnp.float32(eta)), np.float64)


@pytest.mark.parametrize("eta", [0.5, 0.0])
def test_likelihoods_are_those_of_a_full_forward(eta):
    logits = forward_logits([[*context, *wanted] for context, wanted in PAIRS], eta)
    log_share = logits - np.log(np.sum(np.exp(logits), axis=2, keepdims=True))
    expected = [
        sum(log_share[row, len(context) + n - 1, token] for n, token in enumerate(wanted))
        for row, (context, wanted) in enumerate(PAIRS)
    ]
    found = [value for value, _ in respondent(eta).score(PAIRS)]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_greedy_is_what_the_largest_logit_says():
    greedy, others = [], []
    for context in [
        [*context, *wanted][:end] for (context, wanted), end in zip(PAIRS, (6, 7, 13, 22, 12), strict=False)
    ]:
        document = list(context)
        for _ in range(3):
            document.append(int(np.argmax(forward_logits([document] * len(PAIRS), 0.5)[0, len(document) - 1])))
        greedy.append((context, document[-3:]))
        others.append((context, [*document[-3:-1], (document[-1] + 1) % 257]))
    assert [is_greedy for _, is_greedy in respondent().score(greedy)] == [True] * 5
    assert [is_greedy for _, is_greedy in respondent().score(others)] == [False] * 5


def test_order_and_neighbours_change_nothing():
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    together = respondent().score(PAIRS)
    assert respondent().score([PAIRS[n] for n in order]) == [together[n] for n in order]
    assert [respondent().score([pair])[0] for pair in PAIRS] == together
    prompts = ["first", "the second is longer", "3", "and a fourth, that has to wait"]
    texts = respondent().complete(prompts, [GREEDY] * 4)
    backwards = respondent().complete(prompts[::-1], [GREEDY] * 4)
    assert backwards[::-1] == texts
    assert [respondent().complete([prompt], [GREEDY])[0] for prompt in prompts] == texts


def test_options_belong_to_their_prompts():
    whole = respondent().complete(["a prompt"], [GREEDY])[0]
    short, stopped, same = respondent().complete(
        ["a prompt"] * 3, [{**GREEDY, "max_gen_toks": 1}, {**GREEDY, "until": ["", whole[1]]}, GREEDY]
    )
    assert same == whole and len(whole) > 1
    assert short == whole[:1]
    assert stopped == whole[: whole.index(whole[1])]


def test_a_prompt_without_a_token_is_answered_among_the_others():
    """It starts after the end of a document, like a likelihood without context."""
    first, empty, last = respondent().complete(["first", "", "last"], [GREEDY] * 3)
    assert [first, last] == respondent().complete(["first", "last"], [GREEDY] * 2)
    document = [256]
    for _ in range(GREEDY["max_gen_toks"]):
        document.append(int(np.argmax(forward_logits([document] * len(PAIRS), 0.5)[0, len(document) - 1])))
    assert empty == ByteTokenizer().decode(document[1 : (document[1:] + [256]).index(256) + 1])


@pytest.mark.parametrize("nulls", [{"until": []}, {"until": [None]}, {"until": [""]}, {"top_k": None, "top_p": None}])
def test_keywords_without_a_value_are_the_usual_ones(nulls):
    assert respondent().complete(["a prompt"], [{**GREEDY, **nulls}]) == respondent().complete(["a prompt"], [GREEDY])


def test_few_lengths_serve_all_documents():
    lengths = [padded_length(tokens, BYTES) for tokens in range(1, 32 * CHUNK + 1)]
    assert sorted({length // CHUNK for length in lengths}) == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32]
    assert all(length >= tokens for tokens, length in enumerate(lengths, start=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "workdir is missing"),
        ({"workdir": "x", "updates": "on"}, "did you mean 'update'"),
        ({"workdir": "x", "update": "no"}, "update=no is neither on nor off"),
        ({"workdir": "x", "batch_size": "auto"}, "--batch_size=auto is not a number of rows"),
        ({"workdir": "/nowhere"}, "holds no run"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        load_respondent(**arguments)


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    """The library, which knows our model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        module = pytest.importorskip("lm_eval", reason="needs the harness extra (pip install 'intttrain[harness]')")
        register_model(lambda **_: respondent())
        yield module


@pytest.mark.harness
@pytest.mark.filterwarnings("ignore")  # of the libraries that lm_eval brings
def test_the_harness_asks_and_scores(lm_eval):
    """Two tasks with data of their own: a choice by likelihood, whose answers are known, and a continuation."""
    import datasets

    model = respondent()
    contexts, choices = ["question?", "a question of 25 letters?"], [" yes", " no", " maybe"]
    scores = [
        [model.score([(list(context.encode()), list(choice.encode()))])[0][0] for choice in choices]
        for context in contexts
    ]
    gold = [int(np.argmax(scores[0])), int(np.argmin(scores[1]))]  # the first is right, the second wrong
    text = model.complete(contexts[:1], [GREEDY])[0]

    def rows(**_: Any) -> dict[str, Any]:
        found = [{"question": c, "gold": g, "text": text} for c, g in zip(contexts, gold, strict=True)]
        return {"test": datasets.Dataset.from_list(found)}

    base = {"custom_dataset": rows, "test_split": "test", "doc_to_text": "{{question}}"}
    choice = base | {
        "task": "choice", "output_type": "multiple_choice", "doc_to_choice": [c.strip() for c in choices],
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    continuation = base | {
        "task": "continuation", "output_type": "generate_until", "doc_to_target": "{{text}}",
        "generation_kwargs": GREEDY, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    rolling = base | {
        "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{question}}", "metric_list": [{"metric": "byte_perplexity"}],
    }  # fmt: skip
    results = lm_eval.simple_evaluate(
        model="intttrain", tasks=[choice, continuation, rolling], batch_size=ROWS, bootstrap_iters=0
    )["results"]
    assert results["choice"]["acc,none"] == 0.5
    assert results["continuation"]["exact_match,none"] == 0.5
    nll = -sum(model.score([([256], list(c.encode()))])[0][0] for c in contexts)
    expected = np.exp(nll / sum(len(c.encode()) for c in contexts))
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.harness
@pytest.mark.filterwarnings("ignore")  # of the libraries that lm_eval brings
def test_empty_requests_leave_the_others_their_answers(lm_eval):
    """Empty prompts, contexts, continuations and texts, among others."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    model = get_model("intttrain")()

    def ask(kind: str, *requests: tuple[Any, ...]) -> list[Any]:
        return getattr(model, kind)([Instance(kind, {}, args, 0) for args in requests], disable_tqdm=True)

    def scores(*pairs: tuple[list[int], bytes]) -> list[tuple[float, bool]]:
        return respondent().score([(context, list(wanted)) for context, wanted in pairs])

    expected = scores(([256], b"a"), ([256], b" a"), (list(b"context"), b" a"))
    found = ask("loglikelihood", ("", "a"), ("", ""), (" ", "a"), ("context", ""), ("context", " a"))
    assert [found[0], found[2], found[4]] == expected
    assert found[1] == found[3] == (0.0, True)
    assert ask("loglikelihood_rolling", ("a",), ("",)) == [expected[0][0], 0.0]
    prompts = ("first", ""), ("", "first")
    texts = [ask("generate_until", *((prompt, dict(GREEDY)) for prompt in order)) for order in prompts]
    assert texts[0] == texts[1][::-1]
