"""The training loop: reads as a table of contents; the work is in the functions it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import jax.numpy as jnp
import numpy as np

from intttrain.app.live import LiveEvaluation
from intttrain.app.runs import Identity, claim_workdir, make_identity, parameter_counts
from intttrain.core.agreement import largest, on_first_process
from intttrain.core.config import Config
from intttrain.core.distributed import process_count, process_index
from intttrain.core.errors import UserError
from intttrain.core.metrics import MetricWriters, make_metric_writers
from intttrain.core.progress import StepTimer, human_count
from intttrain.core.sharding import check_evaluation
from intttrain.core.stages import Stage, make_stages, stage_after
from intttrain.core.watchdog import Watchdog
from intttrain.data import Batch, describe_rows, make_batches, make_row_dataset
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


def train(
    config: Config, workdir: Path, *, stop_at_step: int | None, watchdog: Watchdog, report: Callable[[str], None]
) -> TrainResult:  # fmt: skip
    """Trains up to ``train.num_steps``, from the newest checkpoint of ``workdir`` if there is one.

    Args:
      config: the run. Repeating the same call continues it, bit for bit as if it had not stopped.
      workdir: receives checkpoints and metrics.
      stop_at_step: saves and stops there, as an interruption would; ``None`` goes to the end.
      watchdog: ends the process if another one is lost or nothing finishes.
      report: receives lines for people.

    Raises:
      UserError: input that does not fit together, an occupied workdir, a checkpoint that cannot be written.
      NonFiniteError: names the step and its rows; the state before it is saved.
    """
    stages = make_stages(config)
    programs = [_make_program(stage) for stage in stages]  # compiles nothing: what does not fit is refused here
    identity = make_identity(config)
    evaluation = LiveEvaluation(config, report)
    on_first_process(lambda: claim_workdir(workdir, identity))
    with (
        _Interrupts(config) as interrupts,
        Checkpoints(workdir / "checkpoints", config.train.checkpoint) as checkpoints,
        watchdog.guard(),
    ):
        stage = stage_after(stages, checkpoints.latest_step() or 0)
        program = programs[stage.number - 1]
        state, cursor = _start(config, stage, program, checkpoints, identity, report)
        batches = _open_batches(stage, program, cursor)
        start = step = int(state["step"])
        last = config.train.num_steps if stop_at_step is None else min(stop_at_step, config.train.num_steps)
        with make_metric_writers(
            workdir, num_steps=config.train.num_steps, start_step=start, process_index=process_index()
        ) as writers:
            log = _Log(stage, writers, report)
            while step < last and not interrupts.stop(step - start):
                if step == stage.until_step:
                    stage, program = stages[stage.number], programs[stage.number]  # numbers begin at 1
                    state, batches = program.take(state), _open_batches(stage, program, cursor)
                    log.begin(stage)
                    watchdog.enter("compiling")
                state, metrics = program.step(state, program.place(next(batches)))
                bad = log.read_one_late(step + 1, cursor, metrics)
                watchdog.beat(step)
                step, cursor = step + 1, stage.cursor_after(cursor)
                ends, evaluates = step == stage.until_step, evaluation.is_due(step)
                if bad or ((ends or evaluates or checkpoints.should_save(step)) and (bad := log.read_rest())):
                    _save_and_refuse(stage, checkpoints, state, identity, bad)
                with log.timer.excluded():
                    if ends or checkpoints.should_save(step):
                        watchdog.enter("saving")
                    checkpoints.save(step, dict(state), identity.info(step, cursor), force=ends)
                    if evaluates:
                        watchdog.enter("evaluating")
                        writers.write(step, evaluation.evaluate(step, stage.config, state["params"], program.mesh))
            watchdog.enter("saving")
            if bad := log.read_rest():
                _save_and_refuse(stage, checkpoints, state, identity, bad)
            checkpoints.save(step, dict(state), identity.info(step, cursor), force=True)
            checkpoints.wait()
    return TrainResult(step, step >= config.train.num_steps, interrupts.received, log.last)


def _make_program(stage: Stage) -> Program:
    """Returns the programs of a stage; a refusal names it."""
    try:
        program = make_program(stage.config)
        if stage.config.eval.every_steps is not None:
            check_evaluation(stage.config, program.mesh)
        return program
    except UserError as error:
        where = f"train.stages[{stage.number - 1}]: " if stage.count > 1 else ""
        raise UserError(f"{where}{error}") from None


def _open_batches(stage: Stage, program: Program, cursor: int) -> Iterator[Batch]:
    """Returns this process's part of the batches of a stage from ``cursor`` on."""
    data = stage.config.data
    dataset = make_row_dataset(data, stage.config.model.vocab_size, program.local_ranges, stage.block_tokens)
    return make_batches(
        dataset, batch_rows=stage.config.train.batch_rows, cursor=stage.first_row(cursor),
        local_rows=program.local_rows, prefetch_rows=data.prefetch_rows,
    )  # fmt: skip


def _start(
    config: Config, stage: Stage, program: Program, checkpoints: Checkpoints, identity: Identity,
    report: Callable[[str], None],
) -> tuple[TrainState, int]:  # fmt: skip
    """Returns the state and the data cursor to go on from: the newest checkpoint, else a fresh model."""
    counts = parameter_counts(config)
    size = f"{human_count(counts['parameters'])} parameters ({human_count(counts['ttt_parameters'])} for TTT)"
    where = f"{stage}; " if stage.count > 1 else ""
    if checkpoints.latest_step() is None:
        report(f"{config.name}: new run, {size}, {config.train.num_steps} steps; {where}compiling")
        return program.init(), 0
    state, info = checkpoints.restore_latest(program.state)
    check_compatible(info, identity.flat_config, identity.fingerprint)  # config.json may be another run's by now
    todo = "nothing is left to do" if info.step >= config.train.num_steps else f"{size}; {where}compiling"
    report(f"{config.name}: resumed at step {info.step} of {config.train.num_steps}, {todo}")
    return cast(TrainState, state), info.data_cursor


def _save_and_refuse(
    stage: Stage, checkpoints: Checkpoints, state: TrainState, identity: Identity, bad: _BadStep
) -> None:
    """Saves the state before the bad step, in which it is unchanged, and raises."""
    good = bad.step - 1
    healthy = {**state, "healthy": jnp.logical_or(state["healthy"], True)}
    checkpoints.save(good, healthy, identity.info(good, bad.cursor), force=True)
    checkpoints.wait()
    places = "; ".join(describe_rows(stage.config.data, bad.rows[:3], stage.block_tokens))
    raise NonFiniteError(
        f"step {bad.step}: loss={bad.loss} grad_norm={bad.grad_norm} is not finite; the update was not applied and "
        f"step {good} is saved. Rows {bad.rows[0]} to {bad.rows[-1]} ({places}); look at them, "
        "or start another --workdir with a lower train.schedule.peak_learning_rate or model.ttt.eta"
    )


@dataclasses.dataclass(frozen=True)
class _BadStep:
    """A step whose update was refused, the data cursor before it, and the global rows to look at."""

    step: int
    cursor: int
    rows: list[int]
    loss: float
    grad_norm: float


class _Log:
    """Reads metrics one step late, so that the device never waits for the host, and writes them."""

    def __init__(self, stage: Stage, writers: MetricWriters, report: Callable[[str], None]):
        self._stage, self._writers, self._report = stage, writers, report
        self.timer = StepTimer()
        self._pending: tuple[int, int, StepMetrics] | None = None
        self._warned = False
        self.last: dict[str, float] = {}

    def begin(self, stage: Stage) -> None:
        """Goes on with another stage, whose steps take another time."""
        self._stage, self.timer = stage, StepTimer()
        self._report(f"{stage}; compiling")

    def read_one_late(self, step: int, cursor: int, metrics: StepMetrics) -> _BadStep | None:
        """Takes the metrics of ``step``, which began at ``cursor``, and reads those before.

        Returns a non-finite step if it met one.
        """
        bad = self.read_rest()
        self._pending = (step, cursor, metrics)
        return bad

    def read_rest(self) -> _BadStep | None:
        """Waits for the step that is still pending and reads it."""
        if self._pending is None:
            return None
        (step, cursor, metrics), self._pending = self._pending, None
        numbers = scalars(self._stage.config, metrics)
        self.timer.tick(step)
        if not bool(metrics.healthy):
            return _bad_step(self._stage, step, cursor, metrics)
        self.last = numbers
        self._warn(step, numbers)
        train = self._stage.config.train
        if step % train.log_every_steps == 0 or step == train.num_steps or step == 1:
            self._writers.write(step, numbers | self._rates())
        return None

    def _rates(self) -> dict[str, float]:
        train, tokens = self._stage.config.train, self._stage.tokens_per_step
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


def _bad_step(stage: Stage, step: int, cursor: int, metrics: StepMetrics) -> _BadStep:
    first = stage.first_row(cursor)
    row_loss_B = np.asarray(metrics.row_loss_B)
    suspects = np.flatnonzero(~np.isfinite(row_loss_B))
    rows = [first + int(row) for row in (suspects if len(suspects) else range(len(row_loss_B)))]
    return _BadStep(step, cursor, rows, float(metrics.loss), float(metrics.grad_norm))


class _Interrupts(contextlib.AbstractContextManager["_Interrupts"]):
    """Notes SIGTERM and Ctrl-C instead of dying, so that the loop can save first; a second Ctrl-C kills."""

    def __init__(self, config: Config) -> None:
        self.received: int | None = None  # by any process
        self._noted: int | None = None  # by this one; may come while the others are being asked
        self._ask_every = config.train.log_every_steps if process_count() > 1 else 1

    def stop(self, step: int) -> bool:
        """Returns whether a process was interrupted; all get the same answer, at multiples of ``log_every_steps``."""
        if step % self._ask_every == 0:
            self.received = largest(self._noted or 0) or None
            return self.received is not None
        return False

    def __enter__(self) -> _Interrupts:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if self._noted is not None:
            raise KeyboardInterrupt
        self._noted = number
