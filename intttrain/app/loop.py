"""The training loop: reads as a table of contents; the work is in the functions it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import cast

import jax.numpy as jnp
import numpy as np

from intttrain.app.runs import Identity, claim_workdir, make_identity, parameter_counts
from intttrain.core.agreement import largest, on_first_process
from intttrain.core.config import Config
from intttrain.core.distributed import process_count, process_index
from intttrain.core.errors import UserError
from intttrain.core.metrics import MetricWriters, make_metric_writers
from intttrain.core.progress import StepTimer, human_count
from intttrain.data import describe_rows, make_batches, make_row_dataset
from intttrain.train import (
    Checkpoints,
    Program,
    StepMetrics,
    TrainState,
    check_compatible,
    make_program,
    scalars,
)

STATE_WARNING = 10.0  # |S| / |W0|; healthy runs stay below about 4


class NonFiniteError(UserError):
    """The loss or the gradient of a step is not finite. The update was not applied."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of ``train`` ended.

    Attributes:
      step: completed steps, all of them in the last checkpoint.
      finished: whether ``train.num_steps`` is reached.
      signal_number: what interrupted the run, or ``None``.
      metrics: the numbers of the last step (empty if no step ran).
    """

    step: int
    finished: bool
    signal_number: int | None
    metrics: dict[str, float]


def train(config: Config, workdir: Path, *, stop_at_step: int | None, report: Callable[[str], None]) -> TrainResult:
    """Trains up to ``train.num_steps``, from the newest checkpoint of ``workdir`` if there is one.

    Args:
      config: the run. Repeating the same call continues it, bit for bit as if it had not stopped.
      workdir: receives checkpoints and metrics.
      stop_at_step: saves and stops there, as an interruption would; ``None`` goes to the end.
      report: receives lines for people.

    Raises:
      UserError: input that does not fit together, an occupied workdir, a checkpoint that cannot be written.
      NonFiniteError: names the step and its rows; the state before it is saved.
    """
    program = make_program(config)
    identity = make_identity(config)
    dataset = make_row_dataset(config.data, config.model.vocab_size, program.local_ranges)
    on_first_process(lambda: claim_workdir(workdir, identity))
    with (
        _Interrupts(config) as interrupts,
        Checkpoints(workdir / "checkpoints", config.train.checkpoint) as checkpoints,
    ):
        state, cursor = _start(config, program, checkpoints, identity, report)
        start = int(state["step"])
        last = config.train.num_steps if stop_at_step is None else min(stop_at_step, config.train.num_steps)
        batches = make_batches(
            dataset, batch_rows=config.train.batch_rows, cursor=cursor, local_rows=program.local_rows,
            prefetch_rows=config.data.prefetch_rows,
        )  # fmt: skip
        with make_metric_writers(
            workdir, num_steps=config.train.num_steps, start_step=start, process_index=process_index()
        ) as writers:
            log = _Log(config, writers, report)
            step = start
            while step < last and not interrupts.stop(step - start):
                state, metrics = program.step(state, program.place(next(batches)))
                step, cursor = step + 1, cursor + config.train.batch_rows
                if (bad := log.read_one_late(step, cursor, metrics)) or (
                    checkpoints.should_save(step) and (bad := log.read_rest())
                ):
                    _save_and_refuse(config, checkpoints, state, identity, bad)
                with log.timer.excluded():
                    checkpoints.save(step, dict(state), identity.info(step, cursor))
            if bad := log.read_rest():
                _save_and_refuse(config, checkpoints, state, identity, bad)
            checkpoints.save(step, dict(state), identity.info(step, cursor), force=True)
            checkpoints.wait()
    return TrainResult(step, step >= config.train.num_steps, interrupts.received, log.last)


def _start(
    config: Config, program: Program, checkpoints: Checkpoints, identity: Identity, report: Callable[[str], None]
) -> tuple[TrainState, int]:
    """Returns the state and the data cursor to go on from: the newest checkpoint, else a fresh model."""
    counts = parameter_counts(config)
    size = f"{human_count(counts['parameters'])} parameters ({human_count(counts['ttt_parameters'])} for TTT)"
    if checkpoints.latest_step() is None:
        report(f"{config.name}: new run, {size}, {config.train.num_steps} steps; compiling")
        return program.init(), 0
    state, info = checkpoints.restore_latest(program.state)
    check_compatible(info, identity.flat_config, identity.fingerprint)  # config.json may be another run's by now
    todo = "nothing is left to do" if info.step >= config.train.num_steps else f"{size}; compiling"
    report(f"{config.name}: resumed at step {info.step} of {config.train.num_steps}, {todo}")
    return cast(TrainState, state), info.data_cursor


def _save_and_refuse(
    config: Config, checkpoints: Checkpoints, state: TrainState, identity: Identity, bad: _BadStep
) -> None:
    """Saves the state before the bad step, in which it is unchanged, and raises."""
    good, cursor = bad.step - 1, bad.cursor - config.train.batch_rows
    healthy = {**state, "healthy": jnp.logical_or(state["healthy"], True)}
    checkpoints.save(good, healthy, identity.info(good, cursor), force=True)
    checkpoints.wait()
    places = "; ".join(describe_rows(config.data, bad.rows[:3]))
    raise NonFiniteError(
        f"step {bad.step}: loss={bad.loss} grad_norm={bad.grad_norm} is not finite; the update was not applied and "
        f"step {good} is saved. Rows {bad.rows[0]} to {bad.rows[-1]} ({places}); look at them, "
        "or start another --workdir with a lower train.schedule.peak_learning_rate or model.ttt.eta"
    )


@dataclasses.dataclass(frozen=True)
class _BadStep:
    """A step whose update was refused, and the global rows to look at."""

    step: int
    cursor: int
    rows: list[int]
    loss: float
    grad_norm: float


class _Log:
    """Reads metrics one step late, so that the device never waits for the host, and writes them."""

    def __init__(self, config: Config, writers: MetricWriters, report: Callable[[str], None]):
        self._config, self._writers, self._report = config, writers, report
        self.timer = StepTimer()
        self._pending: tuple[int, int, StepMetrics] | None = None
        self._warned = False
        self.last: dict[str, float] = {}

    def read_one_late(self, step: int, cursor: int, metrics: StepMetrics) -> _BadStep | None:
        """Takes the metrics of ``step`` and reads those before; returns a non-finite step if it met one."""
        bad = self.read_rest()
        self._pending = (step, cursor, metrics)
        return bad

    def read_rest(self) -> _BadStep | None:
        """Waits for the step that is still pending and reads it."""
        if self._pending is None:
            return None
        (step, cursor, metrics), self._pending = self._pending, None
        numbers = scalars(self._config, metrics)
        self.timer.tick(step)
        if not bool(metrics.healthy):
            return _bad_step(self._config, step, cursor, metrics)
        self.last = numbers
        self._warn(step, numbers)
        every = self._config.train.log_every_steps
        if step % every == 0 or step == self._config.train.num_steps or step == 1:
            self._writers.write(step, numbers | self._rates())
        return None

    def _rates(self) -> dict[str, float]:
        train, tokens = self._config.train, self._config.train.batch_rows * self._config.data.seq_len
        rate, left = self.timer.rate(tokens), self.timer.eta_seconds(train.num_steps)
        known = {"tokens_per_second": rate, "eta_seconds": left}
        return {name: value for name, value in known.items() if value is not None}

    def _warn(self, step: int, numbers: dict[str, float]) -> None:
        """Says once that a fast weight outgrew its base: too large an eta fails silently."""
        largest = max((v for name, v in numbers.items() if name.startswith("ttt/state")), default=0.0)
        if largest > STATE_WARNING and not self._warned and math.isfinite(largest):
            self._warned = True
            self._report(
                f"warning: step {step}: the fast-weight state is {largest:.3g} times W0 (healthy: up to about 4); "
                "model.ttt.eta may be too large"
            )


def _bad_step(config: Config, step: int, cursor: int, metrics: StepMetrics) -> _BadStep:
    first = cursor - config.train.batch_rows
    row_loss_B = np.asarray(metrics.row_loss_B)
    suspects = np.flatnonzero(~np.isfinite(row_loss_B))
    rows = [first + int(row) for row in (suspects if len(suspects) else range(len(row_loss_B)))]
    return _BadStep(step, cursor, rows, float(metrics.loss), float(metrics.grad_norm))


class _Interrupts(contextlib.AbstractContextManager["_Interrupts"]):
    """Notes SIGTERM and Ctrl-C instead of dying, so that the loop can save first; a second Ctrl-C kills."""

    def __init__(self, config: Config) -> None:
        self.received: int | None = None
        self._ask_every = config.train.log_every_steps if process_count() > 1 else 1

    def stop(self, step: int) -> bool:
        """Returns whether a process was interrupted; all get the same answer, at multiples of ``log_every_steps``."""
        if step % self._ask_every == 0:
            self.received = largest(self.received or 0) or None
            return self.received is not None
        return False

    def __enter__(self) -> _Interrupts:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
