"""The ``eval`` section of the configuration: one section per evaluation, beside what all of them use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from intttrain.config.literals import (
    STRICT,
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    Switch,
)
from intttrain.config.registry import EVAL_TASKS, GATE_RULES, GATE_SIGNALS, Named, NoSection, SectionOf

GateSignal = Annotated[str, Named(GATE_SIGNALS)]
EvaluatedRule = Annotated[str, Named(GATE_RULES, lambda rule: "evaluate" in rule.offered)]
StudiedRule = Annotated[str, Named(GATE_RULES, lambda rule: "study" in rule.offered)]
Oracle = Literal["tree", "rollout_always", "rollout_never", "first_order"]

RulerTask = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
]  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class RulerConfig:
    """RULER (arXiv 2404.06654), with the authors' generator."""

    tasks: tuple[RulerTask, ...] = RulerTask.__args__  # type: ignore[attr-defined]
    lengths: tuple[PositiveInt, ...] = (4096,)  # tokens of prompt and answer together
    samples: PositiveInt = 20  # of each task and length
    seed: Seed = 42


@dataclass(frozen=True, config=STRICT)
class CodeConfig:
    """HumanEval (arXiv 2107.03374)."""

    samples: PositiveInt = 1  # completions of each problem
    pass_at: tuple[PositiveInt, ...] = (1,)  # k of pass@k, none larger than samples
    problems: PositiveInt | None = None  # only the first so many
    max_new_tokens: PositiveInt = 512
    temperature: NonNegativeFloat = 0.0
    top_p: Fraction = 1.0
    seed: Seed = 0
    seconds: PositiveFloat = 3.0  # for one completion's tests
    memory_mib: PositiveInt = 1024


@dataclass(frozen=True, config=STRICT)
class GateConfig:
    """A gate to evaluate beside the update on and off (``docs/gating.md``)."""

    rule: EvaluatedRule
    signal: GateSignal = "reconstruction"
    update_on: Literal["high", "low"] = "high"
    rate: Fraction = 0.5
    thresholds: tuple[FiniteFloat, ...] = ()  # of a rule that has some, one for each TTT layer (``--task=calibrate``)
    shared: Switch = False  # one decision for all TTT layers


@dataclass(frozen=True, config=STRICT)
class ContextConfig:
    """Loss of a fixed last block of every document as more and more text stands before it."""

    lengths: tuple[PositiveInt, ...] = (256, 512, 1024)  # tokens read, the block included
    block_tokens: PositiveInt = 128


@dataclass(frozen=True, config=STRICT)
class GatingConfig:
    """Gate rules beside blind decisions and oracles (``docs/gating.md``): all combinations of these."""

    rules: tuple[StudiedRule, ...] = ("online", "percentile", "ponder_ema")
    signals: tuple[GateSignal, ...] = ("reconstruction", "nll")
    update_on: tuple[Literal["high", "low"], ...] = ("high", "low")
    rates: tuple[Fraction, ...] = (0.25, 0.5, 0.75)
    lengths: tuple[PositiveInt, ...] = (1, 2, 4, 8)  # rows, in multiples of data.seq_len
    oracles: tuple[Oracle, ...] = ("rollout_always", "rollout_never")
    random_seeds: Annotated[int, Field(ge=10, strict=True)] = 10  # of the blind decisions that a rule is compared with
    calibration_documents: PositiveInt = 32  # training documents that thresholds are taken from
    shared: Switch = False  # one decision for all TTT layers


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    """Held-out loss by position in the document."""

    seq_len: PositiveInt  # tokens read of each document
    documents: PositiveInt  # at most this many held-out documents
    min_document_tokens: PositiveInt  # shorter ones are left out
    position_edges: tuple[PositiveInt, ...]  # right edges of the position buckets, increasing
    reading: Literal["rows", "chunks"] = "rows"  # whole rows at once, or chunk by chunk, as generation reads
    batch_rows: PositiveInt = 8
    bootstrap_samples: PositiveInt = 1000
    seed: Seed = 0
    every_steps: PositiveInt | None = None  # of training, which then evaluates the live parameters; None = never
    gates: tuple[GateConfig, ...] = ()  # more conditions of context, ruler and code
    context: ContextConfig = ContextConfig()
    gating: GatingConfig = GatingConfig()
    ruler: RulerConfig = RulerConfig()
    code: CodeConfig = CodeConfig()
    own: Annotated[Any, SectionOf(EVAL_TASKS)] = NoSection()  # of a task that a plugin defines (``docs/plugins.md``)
