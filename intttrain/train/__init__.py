"""Training: optimizer, state and step, checkpoints. The only home of optax and orbax."""

from intttrain.train.checkpoint import Checkpoints
from intttrain.train.checkpoint_info import CheckpointInfo, package_versions
from intttrain.train.compatibility import check_compatible
from intttrain.train.optimizer import make_optimizer, make_schedule
from intttrain.train.program import Program, make_program
from intttrain.train.step import (
    StepFunction,
    StepMetrics,
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    scalars,
)

__all__ = [
    "CheckpointInfo",
    "Checkpoints",
    "Program",
    "StepFunction",
    "StepMetrics",
    "TrainState",
    "abstract_state",
    "check_compatible",
    "init_state",
    "make_optimizer",
    "make_program",
    "make_schedule",
    "make_train_step",
    "package_versions",
    "scalars",
]
