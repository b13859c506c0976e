"""The training loop: reads as a table of contents; the work is in the functions it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import types
from collections.abc import Callable, Iterator
from typing import cast

from intttrain.app.live import LiveEvaluation
from intttrain.app.observe import StepProfile, peak_memory_gib, utilisation
from intttrain.app.runs import Identity, claim_workdir, make_identity, parameter_counts
from intttrain.app.skips import BadStep, Skips, find_bad_step
from intttrain.core.agreement import largest, on_first_process
from intttrain.core.config import Config
from intttrain.core.distributed import process_count, process_index
from intttrain.core.errors import UserError
from intttrain.core.goodput import GOODPUT_FILE, Stopwatch, summarise_goodput
from intttrain.core.metrics import MetricWriters, make_metric_writers
from intttrain.core.progress import StepTimer, human_count
from intttrain.core.sharding import check_evaluation
from intttrain.core.stages import Stage, make_stages, stage_after
from intttrain.core.workdir import Workdir
from intttrain.data import Batch, make_batches, make_row_dataset
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


def train(config: Config, workdir: Workdir, *, stop_at_step: int | None, report: Callable[[str], None]) -> TrainResult:
    """Trains up to ``train.num_steps``, from the newest checkpoint of ``workdir`` if there is one.

    Args:
      config: the run. Repeating the same call continues it, bit for bit as if it had not stopped.
      workdir: receives checkpoints and metrics.
      stop_at_step: saves and stops there, as an interruption would; ``None`` goes to the end.
      report: receives lines for people.

    Raises:
      UserError: input that does not fit together, an occupied workdir, a checkpoint that cannot be written.
      UnhealthyStepsError: too many steps were not applied (``train.skip``); the state before them is saved.
    """
    stopwatch = Stopwatch()
    stages = make_stages(config)
    programs = [_make_program(stage) for stage in stages]  # compiles nothing: what does not fit is refused here
    identity = make_identity(config)
    evaluation = LiveEvaluation(config, report)
    on_first_process(lambda: claim_workdir(workdir.place, identity))
    with (
        _Interrupts(config) as interrupts,
        Checkpoints(str(workdir.place / "checkpoints"), config.train.checkpoint) as checkpoints,
        StepProfile(config.train.profile_steps, workdir.folder, report) as profile,
    ):
        stage = stage_after(stages, checkpoints.latest_step() or 0)
        program = programs[stage.number - 1]
        state, cursor, skips = _start(config, stage, program, checkpoints, identity, report)
        batches = _open_batches(stage, program, cursor)
        start = step = int(state["step"])
        last = config.train.num_steps if stop_at_step is None else min(stop_at_step, config.train.num_steps)
        with make_metric_writers(
            workdir.folder, num_steps=config.train.num_steps, start_step=start, process_index=process_index(),
            stopwatch=stopwatch, wandb_project=config.train.wandb_project, name=config.name, place=workdir.place,
        ) as writers:  # fmt: skip
            log = _Log(stage, writers, report)
            stopwatch.switch("compile")
            while step < last and not interrupts.stop(step - start):
                if step == stage.until_step:
                    stage, program = stages[stage.number], programs[stage.number]  # numbers begin at 1
                    state, batches = program.take(state), _open_batches(stage, program, cursor)
                    log.begin(stage)
                    stopwatch.switch("compile")
                with stopwatch.spent_on("data"):
                    batch = program.place(next(batches))
                profile.before(step + 1)
                state, metrics = program.step(state, batch)
                profile.after(step + 1, metrics.loss)
                stopwatch.switch("step")
                bad = log.read_one_late(step + 1, cursor, metrics)
                step, cursor = step + 1, stage.cursor_after(cursor)
                ends, evaluates = step in (stage.until_step, last), evaluation.is_due(step)
                if not bad and (ends or evaluates or checkpoints.should_save(step)):
                    bad = log.read_rest()
                if bad:
                    state, step, cursor = skips.pass_over(bad, state, checkpoints, identity)
                    batches = _open_batches(stage, program, cursor)
                    continue
                with log.timer.excluded(), stopwatch.spent_on("checkpoint"):
                    if checkpoints.save(step, dict(state), identity.info(step, cursor, skips.batches), force=ends):
                        workdir.push_soon()  # a run that is killed then has all metrics before its newest checkpoint
                if evaluates:
                    with log.timer.excluded(), stopwatch.spent_on("evaluation"):
                        writers.write(step, evaluation.evaluate(step, stage.config, state["params"], program.mesh))
            if bad := log.read_rest():  # of an interrupted run
                state, step, cursor = skips.pass_over(bad, state, checkpoints, identity)
            with stopwatch.spent_on("checkpoint"):
                checkpoints.save(step, dict(state), identity.info(step, cursor, skips.batches), force=True)
                checkpoints.wait()
    if goodput := summarise_goodput(workdir.folder / GOODPUT_FILE):
        report(goodput.line())
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
) -> tuple[TrainState, int, Skips]:  # fmt: skip
    """Returns state, data cursor and skips to go on from: those of the newest checkpoint, else a fresh model's."""
    counts = parameter_counts(config)
    size = f"{human_count(counts['parameters'])} parameters ({human_count(counts['ttt_parameters'])} for TTT)"
    where = f"{stage}; " if stage.count > 1 else ""
    if checkpoints.latest_step() is None:
        report(f"{config.name}: new run, {size}, {config.train.num_steps} steps; {where}compiling")
        return program.init(), 0, Skips(config.train.skip, (), report)
    state, info = checkpoints.restore_latest(program.state)
    check_compatible(info, identity.flat_config, identity.fingerprint)  # config.json may be another run's by now
    todo = "nothing is left to do" if info.step >= config.train.num_steps else f"{size}; {where}compiling"
    report(f"{config.name}: resumed at step {info.step} of {config.train.num_steps}, {todo}")
    return cast(TrainState, state), info.data_cursor, Skips(config.train.skip, info.skipped, report)


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

    def read_one_late(self, step: int, cursor: int, metrics: StepMetrics) -> BadStep | None:
        """Takes the metrics of ``step``, which began at ``cursor``, and reads those before.

        Returns a step that was not applied if it met one; the step after it was not either.
        """
        bad = self.read_rest()
        self._pending = None if bad else (step, cursor, metrics)
        return bad

    def read_rest(self) -> BadStep | None:
        """Waits for the step that is still pending and reads it."""
        if self._pending is None:
            return None
        (step, cursor, metrics), self._pending = self._pending, None
        numbers = scalars(self._stage.config, metrics)
        if bad := find_bad_step(self._stage, step, cursor, metrics):
            return bad
        self.timer.tick(step)
        self.last = numbers
        self._warn(step, numbers)
        train = self._stage.config.train
        if step % train.log_every_steps == 0 or step == train.num_steps or step == 1:
            self._writers.write(step, numbers | self._rates())
        return None

    def _rates(self) -> dict[str, float]:
        train, tokens = self._stage.config.train, self._stage.tokens_per_step
        rate, left = self.timer.rate(tokens), self.timer.eta_seconds(train.num_steps)
        mfu, memory = utilisation(self._stage.config, rate), peak_memory_gib()
        known = {"tokens_per_second": rate, "mfu": mfu, "eta_seconds": left, "peak_memory_gib": memory}
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
