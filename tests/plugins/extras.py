"""What a user might add, in a module of their own: nothing of the package is changed for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from intttrain.config.errors import UserError
from intttrain.config.families import Family
from intttrain.config.literals import (
    Fraction,
    MomentDecay,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Switch,
    section,
)
from intttrain.config.registry import (
    EVAL_TASKS,
    FAMILIES,
    GATE_RULES,
    GATE_SIGNALS,
    OPTIMIZERS,
    SCHEDULES,
    SOURCES,
    TARGETS,
    UPDATE_RULES,
)
from intttrain.config.training import ScheduleConfig
from intttrain.config.ttt import TTTConfig
from intttrain.evals.run import EvalRun
from intttrain.model import Sampling
from intttrain.ttt.gating import BlindRule, SignalRule
from intttrain.ttt.signals import LayerSignal
from intttrain.ttt.targets import Target
from tests.ttt.other_rules import Forgets

# --- gates ---------------------------------------------------------------------------------------------------------


class FirstChunks(BlindRule):
    """Only the first chunks of a document."""

    def gate_B(self, gate: Any, settings: Any, chunk: Any) -> jax.Array:
        return (chunk.chunk_B < 2).astype(jnp.float32)


class AboveMean(SignalRule):
    """Where the signal is above its plain mean so far."""

    def margin_B(self, gate: Any, settings: Any, state: Any, chunk: Any) -> jax.Array:
        return chunk.signed_B - state.mean

    def follow(self, settings: Any, state: Any, signed_B: jax.Array, gate_B: jax.Array) -> Any:
        return state._replace(mean=state.mean + (signed_B - state.mean) / (state.decided + 1))


GATE_RULES.add("first_chunks", FirstChunks("generate", "evaluate", "study"))
GATE_RULES.add("above_mean", AboveMean("generate", "evaluate", "study"))
GATE_SIGNALS.add(
    "target_size", LayerSignal(lambda chunk: jnp.mean(jnp.square(chunk.v_BCD.astype(jnp.float32)), (1, 2)))
)


# --- update rule and target ----------------------------------------------------------------------------------------


@section
class ForgetsConfig:
    """A share of the state is left after every chunk."""

    kind: Literal["forgets"] = "forgets"
    retained: Fraction = 0.8
    bounded: bool = True  # false: made without the bounds of the configuration, a mistake


@UPDATE_RULES.register("forgets", ForgetsConfig)
def forgets(config: ForgetsConfig, ttt: TTTConfig) -> Forgets:
    return Forgets(**(ttt.bounds if config.bounded else {}), retained=config.retained)


TARGETS.add("next_embed", Target("embeddings", convolution=False))


# --- optimizer and schedule ----------------------------------------------------------------------------------------


@section
class MuonConfig:
    """Muon on matrices inside of layers, AdamW on the rest."""

    kind: Literal["muon"] = "muon"
    beta: MomentDecay = 0.95
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat = 1.0


@OPTIMIZERS.register("muon", MuonConfig)
def muon(config: MuonConfig, schedule: optax.Schedule, abstract_params: Any) -> optax.GradientTransformation:
    def matrix(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        stacked = name.startswith("layers.mlp.")
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if stacked else None

    numbers = jax.tree_util.tree_map_with_path(matrix, abstract_params)
    return optax.contrib.muon(
        schedule, beta=config.beta, weight_decay=config.weight_decay, muon_weight_dimension_numbers=numbers, ns_steps=2
    )


@section
class HoldConfig(ScheduleConfig):
    """The peak for some steps, then a constant fraction of it."""

    hold_steps: PositiveInt = 3


@SCHEDULES.register("hold", HoldConfig)
def hold(config: HoldConfig, s: jax.Array, num_steps: int) -> jax.Array:
    return jnp.where(s < config.hold_steps, 1.0, config.final_fraction)


# --- data source ---------------------------------------------------------------------------------------------------


@section
class JsonlSource:
    """Files with a JSON object a line."""

    kind: Literal["jsonl"]
    paths: tuple[str, ...]
    text_key: str = "text"

    def describe(self) -> str:
        return f"jsonl {', '.join(self.paths)}"


@SOURCES.register("jsonl", JsonlSource)
def read_jsonl(source: JsonlSource, counts: Any, report: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    for path in map(Path, source.paths):
        for number, line in enumerate(path.read_text().splitlines()):
            if source.text_key not in (record := json.loads(line)):
                raise UserError(f"prepare.source.text_key={source.text_key!r} is not in line {number + 1} of {path}")
            yield f"{path.name}/{number}", record[source.text_key]


# --- evaluation task -----------------------------------------------------------------------------------------------


@section
class VowelsConfig:
    """Which letters are counted, in held-out documents or in what the model writes."""

    kind: Literal["vowels"] = "vowels"
    letters: str = "aeiou"
    written: Switch = False


@dataclasses.dataclass(frozen=True)
class VowelsReport:
    """How many of some letters there are among all."""

    letters: str
    found: int
    among: int

    def table(self) -> str:
        return f"{self.found} of {self.among} are in {self.letters}\n"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@EVAL_TASKS.register("vowels", VowelsConfig)
def vowels(run: EvalRun) -> None:
    own = run.config.eval.own
    if own.written:
        answers = run.completers()["on"](["def ", "return"], max_new_tokens=4, sampling=Sampling(temperature=0.0))
        texts = [text for _, text in answers]
    else:
        texts = [run.tokenizer.decode(row.tokens_BT.tolist()) for row in run.heldout(64, 64)]
    run.report(f"counting {own.letters} in {len(texts)} texts")
    run.finish(
        VowelsReport(own.letters, sum(text.count(one) for text in texts for one in own.letters), sum(map(len, texts)))
    )


@section
class CountedConfig:
    """What is counted, which has no default."""

    of: str
    kind: Literal["counted"] = "counted"


EVAL_TASKS.add("counted", vowels, CountedConfig)


# --- Hugging Face family -------------------------------------------------------------------------------------------

FAMILIES.add("mistral", Family("Mistral", window="number"))
