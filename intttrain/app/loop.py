"""The training loop: reads as a table of contents; the work is in the functions it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import jax.numpy as jnp

from intttrain.app.hosts import check_same_newest, check_shared
from intttrain.app.interrupts import Interrupts
from intttrain.app.live import LiveEvaluation
from intttrain.app.observe import StepProfile
from intttrain.app.runs import Identity, claim_workdir, make_identity, parameter_counts, read_run_id
from intttrain.app.skips import BadStep, Skips
from intttrain.app.step_log import StepLog
from intttrain.config import Config
from intttrain.config.errors import PassingError, UserError, passes
from intttrain.config.run_stages import Stage, make_stages, stage_after
from intttrain.data import Batch, make_batches, make_row_dataset
from intttrain.layout.compiler import keep_programs
from intttrain.layout.sharding import check_evaluation
from intttrain.logs.goodput import GOODPUT_FILE, Stopwatch, summarise_goodput
from intttrain.logs.lease import Lease
from intttrain.logs.metrics import METRICS_FILE, MetricWriters, make_metric_writers
from intttrain.logs.progress import human_count
from intttrain.logs.side_channels import ending_nothing
from intttrain.logs.weights_and_biases import WandbRun
from intttrain.logs.workdir import Workdir
from intttrain.pod.agreement import wait_for_first_process
from intttrain.pod.coordination import open_key_value_store
from intttrain.pod.distributed import process_count, process_index
from intttrain.pod.step_times import STEP_TIMES_FILE, StepTimes
from intttrain.pod.watchdog import Watchdog
from intttrain.storage.files import Place, write_json
from intttrain.storage.retries import retried
from intttrain.train import Checkpoints, Program, TrainState, check_compatible, make_program


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
    config: Config, place: Place, *, stop_at_step: int | None, watchdog: Watchdog, report: Callable[[str], None],
    report_own: Callable[[str], None],
) -> TrainResult:  # fmt: skip
    """Trains up to ``train.num_steps``, from the newest checkpoint of ``place`` if there is one.

    Args:
      config: the run. Repeating the same call continues it, bit for bit as if it had not stopped.
      place: the workdir; receives checkpoints and metrics.
      stop_at_step: saves and stops there, as an interruption would; ``None`` goes to the end.
      watchdog: ends the process if another one is lost or nothing finishes.
      report: receives lines for people.
      report_own: receives lines about this process.

    Raises:
      UserError: input that does not fit together, an occupied workdir, another start in it, a checkpoint that cannot be
        written.
      PassingError: storage or a network did not come back in time; saved, if that was possible.
      UnhealthyStepsError: too many steps were not applied (``train.skip``); the state before them is saved.
    """
    stopwatch = Stopwatch()
    stages = make_stages(config)
    programs = [_make_program(stage) for stage in stages]  # compiles nothing: what does not fit is refused here
    identity = retried(lambda: make_identity(config), "the stores cannot be read", report)
    evaluation = LiveEvaluation(config, report)
    with (
        Lease(place, report, watchdog.end) as lease,
        _opened(place, identity, lease, report_own) as workdir,
        Interrupts(lease.say_ending) as interrupts,
        Checkpoints(str(place / "checkpoints"), config.train.checkpoint) as checkpoints,
        StepProfile(config.train.profile_steps, workdir.folder, report) as profile,
        watchdog.guard(),
    ):
        newest = checkpoints.latest_step()
        check_same_newest(newest, place / "checkpoints")
        progress = _start(config, stages, programs, checkpoints, newest, identity, report)
        with make_metric_writers(
            workdir.folder, num_steps=config.train.num_steps, start_step=progress.step, process_index=process_index(),
            stopwatch=stopwatch, wandb_run=_wandb_run(config, workdir, identity), report=report,
        ) as writers:  # fmt: skip
            log = StepLog(progress.stage, writers, StepTimes(open_key_value_store()), report)
            loop = _Loop(
                stages, programs, progress, identity, workdir, lease, checkpoints, evaluation, writers, log, profile,
                stopwatch, watchdog, report,
            )  # fmt: skip
            loop.run(config.train.num_steps if stop_at_step is None else stop_at_step, interrupts)
        if goodput := summarise_goodput(workdir.folder / GOODPUT_FILE):
            report(goodput.line())
    return TrainResult(progress.step, progress.step >= config.train.num_steps, interrupts.received, log.last)


@dataclasses.dataclass
class _Progress:
    """Where a run is.

    Attributes:
      stage: that makes the next step.
      state: after ``step`` steps.
      cursor: of the next row.
      skips: batches before it that were not learned from.
    """

    stage: Stage
    state: TrainState
    step: int
    cursor: int
    skips: Skips


@dataclasses.dataclass
class _Loop:
    """What the steps of a run need; ``progress`` changes with each of them."""

    stages: Sequence[Stage]
    programs: Sequence[Program]
    progress: _Progress
    identity: Identity
    workdir: Workdir
    lease: Lease
    checkpoints: Checkpoints
    evaluation: LiveEvaluation
    writers: MetricWriters
    log: StepLog
    profile: StepProfile
    stopwatch: Stopwatch
    watchdog: Watchdog
    report: Callable[[str], None]

    def run(self, until_step: int, interrupts: Interrupts) -> None:
        """Makes steps until ``until_step``, the end of the run or an interruption, and saves.

        What fails for a reason that passes is tried again. If that takes too long the run saves what it has and ends;
        several processes cannot save then, because the others do not know of it.
        """
        try:
            self._make_steps(until_step, interrupts)
        except Exception as error:
            if passes(error) and process_count() == 1:
                with ending_nothing(f"step {self.progress.step} could not be saved", self.report):
                    self._settle()
                    self._save_once()
            raise
        self.lease.say_ending()
        self._save_now()

    def _make_steps(self, until_step: int, interrupts: Interrupts) -> None:
        progress = self.progress
        last = min(until_step, self.stages[-1].until_step)
        self._enter_stage(progress.stage)
        while progress.step < last and not self._is_interrupted(interrupts):
            if progress.step == progress.stage.until_step:
                self._enter_stage(self.stages[progress.stage.number])  # numbers begin at 1
            self._look_at_save()
            bad = self._make_step()
            step, saves = progress.step, progress.step in (progress.stage.until_step, last)
            if not bad and (saves or self.evaluation.is_due(step) or self.checkpoints.should_save(step)):
                bad = self.log.read_rest()
            if bad:
                self._pass_over(bad)
            else:
                self._evaluate_and_save(force=saves)

    def _save_now(self) -> None:
        self._settle()
        with self._during("saving"):
            self._save_and_wait()

    def _settle(self) -> None:
        if bad := self.log.read_rest():  # of a run that did not come to its end
            self._pass_over(bad)

    def _is_interrupted(self, interrupts: Interrupts) -> bool:
        with self.log.times.waiting():  # for the answers of the other processes
            return interrupts.stop()

    def _enter_stage(self, stage: Stage) -> None:
        self.program = self.programs[stage.number - 1]
        if stage is not self.progress.stage:
            self.progress.stage, self.progress.state = stage, self.program.take(self.progress.state)
            self.log.begin(stage)
        self.batches = _open_batches(stage, self.program, self.progress.cursor)
        self.watchdog.enter("compiling")
        self.stopwatch.switch("compiling")

    def _make_step(self) -> BadStep | None:
        """Starts a step and reads the one before; returns one that was not applied."""
        progress = self.progress
        number, cursor = progress.step + 1, progress.cursor
        with self.stopwatch.spent_on("reading"):
            batch = self.program.place(retried(self._next_batch, "rows cannot be read", self.report))
        self.profile.before(number)
        with self.log.times.waiting():  # where dispatch is not asynchronous, this is the step itself
            progress.state, metrics = self.program.step(progress.state, batch)
        # Together with the state: whatever fails from here on, they may be saved.
        progress.step, progress.cursor = number, progress.stage.cursor_after(cursor)
        self.profile.after(number, metrics.loss)
        self.stopwatch.switch("training")
        bad = self.log.read_one_late(number, cursor, metrics)
        self.watchdog.beat(number - 1)
        return bad

    def _next_batch(self) -> Batch:
        try:
            return next(self.batches)
        except Exception:
            # What failed once may not go on, and the file that it reads may have gone stale.
            self.batches = _open_batches(self.progress.stage, self.program, self.progress.cursor)
            raise

    def _pass_over(self, bad: BadStep) -> None:
        self.watchdog.enter("saving")  # if it is one too many
        at = self.progress
        at.state = {**at.state, "healthy": jnp.logical_or(at.state["healthy"], True)}
        at.step, at.cursor = bad.step - 1, bad.cursor
        at.cursor = at.skips.pass_over(bad, self._save_and_wait)
        self.batches = _open_batches(at.stage, self.program, at.cursor)

    def _evaluate_and_save(self, *, force: bool) -> None:
        """Does what is due after a step; evaluates first, because the checkpoint holds the result."""
        progress, config = self.progress, self.progress.stage.config
        if self.evaluation.is_due(progress.step):
            with self._during("evaluating"):
                found = self.evaluation.evaluate(progress.step, config, progress.state["params"], self.program.mesh)
                self.writers.write(progress.step, found)
        if force or self.checkpoints.should_save(progress.step):
            with self._during("saving"):
                self._save_again_if(lambda: self._save(force=force))

    def _look_at_save(self) -> None:
        """Saves the present state if a save in the background failed for a reason that passes."""
        try:
            self.checkpoints.raise_failed_save(self.progress.step)
        except PassingError as error:
            self.report(f"warning: {error}; saving step {self.progress.step} now")
            self._save_now()

    def _save_and_wait(self) -> None:
        self._save_again_if(self._save_once)

    def _save_once(self) -> None:
        self._save(force=True)
        self.checkpoints.wait()

    def _save_again_if(self, save: Callable[[], None]) -> None:
        """Saves, again after a failure that passes; several processes would have to agree on that, and end."""
        if process_count() > 1:
            save()
        else:
            retried(save, f"step {self.progress.step} cannot be saved", self.report)

    def _save(self, *, force: bool) -> None:
        progress = self.progress
        loss = self.evaluation.loss_after(progress.step)
        info = self.identity.info(progress.step, progress.cursor, skipped=progress.skips.batches, heldout_loss=loss)
        self.lease.check()
        if self.checkpoints.save(progress.step, dict(progress.state), info, force=force):
            if process_index() == 0:
                with ending_nothing(f"{STEP_TIMES_FILE} cannot be written", self.report):
                    write_json(self.workdir.folder / STEP_TIMES_FILE, self.log.times.summary())
            self.workdir.push_soon()  # a run that is killed then has all metrics before its newest checkpoint

    @contextlib.contextmanager
    def _during(self, phase: str) -> Iterator[None]:
        """Counts the time of something that is no step, and may take longer than one."""
        self.watchdog.enter(phase)
        with self.stopwatch.spent_on(phase), self.log.excluded():
            yield


def _wandb_run(config: Config, workdir: Workdir, identity: Identity) -> WandbRun | None:
    if config.train.wandb_project is None or process_index() != 0:
        return None
    return WandbRun(config.train.wandb_project, config.name, read_run_id(workdir.place), identity.flat_config)


@contextlib.contextmanager
def _opened(place: Place, identity: Identity, lease: Lease, report: Callable[[str], None]) -> Iterator[Workdir]:
    """Claims a workdir for this run and this start, and yields it; all processes do so together."""
    claim = functools.partial(claim_workdir, place, identity, lease)
    wait_for_first_process(lambda: retried(claim, f"{place} cannot be claimed", report))
    check_shared(place)
    keep_programs(str(place))
    with Workdir(place, (METRICS_FILE, GOODPUT_FILE), report) as workdir:
        yield workdir


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
    config: Config, stages: tuple[Stage, ...], programs: Sequence[Program], checkpoints: Checkpoints,
    newest: int | None, identity: Identity, report: Callable[[str], None],
) -> _Progress:  # fmt: skip
    """Returns where to go on from: the newest intact checkpoint, else a fresh model."""
    counts = parameter_counts(config)
    size = f"{human_count(counts['parameters'])} parameters ({human_count(counts['ttt_parameters'])} for TTT)"
    if newest is None:
        report(f"{config.name}: new run, {size}, {config.train.num_steps} steps; {_where(stages[0])}compiling")
        return _Progress(stages[0], programs[0].init(), 0, 0, Skips(config.train.skip, (), report))
    abstract_state = lambda step: programs[stage_after(stages, step).number - 1].state  # noqa: E731
    # All processes learn of a failure of one, so all of them try again.
    state, info = retried(
        lambda: checkpoints.restore_latest(abstract_state, report), "no checkpoint can be read", report
    )  # fmt: skip
    stage = stage_after(stages, info.step)
    check_compatible(info, identity.flat_config, identity.fingerprint)  # config.json may be another run's by now
    todo = "nothing is left to do" if info.step >= config.train.num_steps else f"{size}; {_where(stage)}compiling"
    report(f"{config.name}: resumed at step {info.step} of {config.train.num_steps}, {todo}")
    skips = Skips(config.train.skip, info.skipped, report)
    return _Progress(stage, cast(TrainState, state), info.step, info.data_cursor, skips)


def _where(stage: Stage) -> str:
    return f"{stage}; " if stage.count > 1 else ""
