"""``intttrain generate``: continuations of prompts, or one long document that a reader and the model write in turns."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from intttrain import ttt
from intttrain.app.runs import Trained, load_trained, read_config
from intttrain.config import MeshConfig
from intttrain.config.errors import UserError
from intttrain.config.registry import GATE_RULES, GATE_SIGNALS
from intttrain.evals.completion import TextStream
from intttrain.evals.conditions import gate_settings
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import pieces_of
from intttrain.logs.workdir import make_place
from intttrain.model import Generator, Request, Sampling
from intttrain.pod.devices import open_single
from intttrain.storage.files import write_json

LONGEST_TALK = 8  # rows of training, as far as an interactive document may grow


def generate_text(values: flags.FlagValues) -> int:
    """Prints what follows each ``--prompt`` as it is drawn; without one, reads prompts from the terminal."""
    open_single("intttrain generate")
    mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
    place = make_place(values.workdir)
    read_config(place)  # imports the plugins of the run, which may define the gate
    _gate(values)
    trained = load_trained(place, values.step, mesh=mesh)
    if values.top_k > (vocabulary := trained.config.model.vocab_size):
        raise UserError(f"--top_k={values.top_k} is more than model.vocab_size={vocabulary}; use 0 for all tokens")
    sampling = Sampling(values.temperature, values.top_k, values.top_p, np.uint32(values.seed))
    if not values.prompt:
        return _talk(trained, values, sampling)
    requests = [
        Request(number, np.asarray(trained.tokenizer.encode(prompt), np.int32), values.max_new_tokens)
        for number, prompt in enumerate(values.prompt)
    ]
    for request in requests:
        if not len(request.prompt):
            raise UserError('--prompt="" has no token to start from; give some text')
    pieces = 1 if mesh is None else pieces_of(mesh, "batch")
    rows = -(-len(requests) // pieces) * pieces
    longest = max(len(request.prompt) for request in requests) + values.max_new_tokens
    generator = make_generator(trained, values, rows, longest, mesh)
    streams = [TextStream(trained.tokenizer) for _ in requests]
    if len(requests) == 1:
        _show(values.prompt[0], end=False)
    for piece in generator.run(requests, sampling, stop_tokens=(trained.tokenizer.end_of_document,)):
        new = streams[piece.sequence].feed(piece.tokens, last=piece.finished)
        if len(requests) == 1:
            _show(new, end=piece.finished)
        elif piece.finished:
            print(f"[{piece.sequence}] {values.prompt[piece.sequence]}{streams[piece.sequence].text}", flush=True)
    texts = [{"prompt": prompt, "text": stream.text} for prompt, stream in zip(values.prompt, streams, strict=True)]
    if values.json:
        write_json(Path(values.json), {"step": trained.step, "update": values.update, "continuations": texts})
    return 0


def make_generator(
    trained: Trained, values: flags.FlagValues, rows: int, max_tokens: int, mesh: Any = None
) -> Generator:
    """Returns a generator with the update and the gate that the flags ask for."""
    gate = _gate(values)
    if values.gate != "always" and trained.config.model.ttt is None:
        raise UserError(
            f"--gate={values.gate}: the run has model.ttt=None, so there is no update to gate; leave it out"
        )
    thresholds = _thresholds(values.gate_thresholds)
    settings = gate_settings(
        gate, values.gate_rate, thresholds, trained.config.model, where="--gate", flag="--gate_thresholds"
    )
    return Generator(
        trained.config.model, trained.params, rows=rows, max_tokens=max_tokens,
        eta=0.0 if values.update == "off" else None, gate=gate, settings=settings, mesh=mesh,
    )  # fmt: skip


def _gate(values: flags.FlagValues) -> ttt.GateRule:
    """Returns the rule of the flags. Raises ``UserError`` for a name that is not registered, by a plugin of the run."""
    if problem := GATE_RULES.problem(values.gate, lambda rule: "generate" in rule.offered):
        raise UserError(f"--gate={values.gate}: {problem}")
    if problem := GATE_SIGNALS.problem(values.gate_signal):
        raise UserError(f"--gate_signal={values.gate_signal}: {problem}")
    gate = ttt.GateRule(values.gate, values.gate_signal, values.gate_on)
    if problem := gate.problem():
        raise UserError(f"--gate={values.gate}: {problem}")
    return gate


def _thresholds(texts: Sequence[str]) -> tuple[float, ...]:
    try:
        thresholds = tuple(map(float, texts))
    except ValueError:
        thresholds = (math.nan,)
    if not all(map(math.isfinite, thresholds)):
        raise UserError(f"--gate_thresholds={','.join(texts)}: these are not finite numbers between commas")
    return thresholds


def _talk(trained: Trained, values: flags.FlagValues, sampling: Sampling) -> int:
    """Lines of standard input and continuations make one document, all of which the model has learned from."""
    if jax.device_count() > 1:
        raise UserError(f"without --prompt one device is needed, not {jax.device_count()}; give --prompt=TEXT")
    longest = LONGEST_TALK * trained.config.data.seq_len
    generator = make_generator(trained, values, 1, longest)
    if sys.stdin.isatty():
        print(f"one line is one prompt; an empty one or Ctrl-D ends; up to {longest} tokens", file=sys.stderr)
    turns = []
    for number, line in enumerate(_lines()):
        tokens = np.asarray(trained.tokenizer.encode(line + "\n"), np.int32)
        request = Request(0, tokens, values.max_new_tokens, goes_on=number > 0)
        stream = TextStream(trained.tokenizer)
        for piece in generator.run([request], sampling, stop_tokens=(trained.tokenizer.end_of_document,)):
            _show(stream.feed(piece.tokens, last=piece.finished), end=piece.finished)
        turns.append({"prompt": line, "text": stream.text})
    if values.json:
        write_json(Path(values.json), {"step": trained.step, "update": values.update, "turns": turns})
    return 0


def _lines() -> Iterator[str]:
    """Yields lines up to an empty one."""
    for line in sys.stdin:
        if not line.strip():
            return
        yield line.rstrip("\n")


def _show(text: str, *, end: bool) -> None:
    print(text, end="\n" if end else "", flush=True)
