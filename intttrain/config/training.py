"""The ``train`` section of the configuration: optimizer, schedule, checkpoints, bad steps, stages."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Protocol

from pydantic.dataclasses import dataclass

from intttrain.config.literals import (
    STRICT,
    Fraction,
    MomentDecay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from intttrain.config.registry import OPTIMIZERS, SCHEDULES, SectionOf


class OptimizerSection(Protocol):
    """What the section of every optimizer has, beside its own; one without ``kind`` is that of AdamW."""

    @property
    def clip_norm(self) -> float:
        """Bound on the global norm of the gradient, which is applied before the optimizer."""


@dataclass(frozen=True, config=STRICT)
class AdamWConfig:
    """AdamW with decoupled weight decay (none on norms)."""

    b1: MomentDecay = 0.9
    b2: MomentDecay = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat = 1.0  # global gradient norm


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """Linear warm-up, then cosine to ``final_fraction`` or constant with a linear decay at the end (WSD)."""

    kind: str  # under which the schedule is registered
    peak_learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt
    decay_steps: NonNegativeInt = 0  # length of the final decay; used by wsd only
    final_fraction: Fraction = 0.1


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When to save and what to keep. The last step and an interruption always save."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None  # additionally keep multiples of this forever
    keep_best: PositiveInt | None = None  # additionally keep so many with the lowest loss of eval.every_steps


@dataclass(frozen=True, config=STRICT)
class SkipConfig:
    """Steps whose update is not applied, because a number is not finite or the loss a spike; their rows are skipped."""

    max_in_a_row: PositiveInt = 3  # the run stops at this many
    max_total: PositiveInt = 20  # ... or this many in all
    spike_deviations: PositiveFloat | None = None  # a spike is so far above the running mean of the loss; None = never


# What the stages of one run may set differently, beside the sizes of all mesh axes: neither the parameters nor the
# order of the text depend on these.
STAGE_VALUES = (
    "data.seq_len", "train.batch_rows", "train.microbatches",
    "model.rope.theta", "model.rope.scaling", "model.sliding_window", "model.ttt.chunk_tokens", "model.ttt.eta",
    "model.attention", "model.remat", "model.loss_chunk_tokens", "model.ttt.implementation",
)  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class StageConfig:
    """A part of a run with values of its own, for example rows of another length."""

    until_step: PositiveInt  # the last step of the stage
    overrides: dict[str, Any] = dataclasses.field(hash=False)  # dotted key (one of schema.STAGE_KEYS) -> value


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """One training run."""

    num_steps: PositiveInt
    batch_rows: PositiveInt  # rows per step over all devices
    schedule: Annotated[ScheduleConfig, SectionOf(SCHEDULES)]
    optimizer: Annotated[OptimizerSection, SectionOf(OPTIMIZERS)]
    checkpoint: CheckpointConfig
    microbatches: PositiveInt = 1  # gradient accumulation: the batch is cut into this many pieces
    gate_rate: Fraction = 1.0  # share of chunks that fast weights learn from, drawn for every row and step; 1 = all
    log_every_steps: PositiveInt = 10
    skip: SkipConfig = SkipConfig()
    profile_steps: tuple[PositiveInt, ...] = ()  # first and last step of a profiler trace; () = none
    wandb_project: str | None = None  # of Weights & Biases, which then receives the metrics too
    watchdog_seconds: PositiveInt | None = 600  # a step that takes longer hangs; other phases get 6 times as long
    seed: Seed = 0
    stages: tuple[StageConfig, ...] = ()  # in order, the last until num_steps; () = the run is one
