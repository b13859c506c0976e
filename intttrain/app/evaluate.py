"""``intttrain eval``: reads checkpoints and hands them to the task that ``--task`` names."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from intttrain.app.follow import follow_run
from intttrain.app.hosts import check_hosts
from intttrain.app.runs import Trained, has_run, load_trained, read_config
from intttrain.config import Config, check_consistent, resolve
from intttrain.config.errors import UserError
from intttrain.config.registry import EVAL_TASKS, NoSection
from intttrain.config.run_stages import make_stages, stage_before
from intttrain.config.schema import override
from intttrain.evals.run import EvalRun
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import check_evaluation
from intttrain.logs.workdir import Workdir, make_place
from intttrain.pod.coordination import open_key_value_store
from intttrain.pod.distributed import process_index, start_distributed
from intttrain.pod.watchdog import Watchdog
from intttrain.storage.files import Place


def report(line: str) -> None:
    """Prints progress to standard error, once for all processes."""
    if process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def evaluate_model(values: flags.FlagValues) -> int:
    """Evaluates a checkpoint, or with ``--follow`` each as it appears, and writes into WORKDIR/eval/STEP."""
    config, place = resolve(values.config), make_place(values.workdir)
    if has_run(place):
        read_config(place)  # imports the plugins of the run, which may define the task
    if problem := EVAL_TASKS.problem(values.task):
        raise UserError(f"--task={values.task}: {problem}")
    config = with_settings(config, values.task)
    _check_follow(values)
    start_distributed()
    with Watchdog(None, open_key_value_store()):  # tasks take as long as they take
        check_hosts(config, place)
        _evaluate_run(config, place, values)
    return 0


def with_settings(config: Config, task: str) -> Config:
    """Returns the configuration with the default settings of a task that has its own in ``eval.own``, unless given.

    Raises:
      UserError: settings of another task are given, or one has no default.
    """
    own = config.eval.own
    if EVAL_TASKS.entries()[task].section is NoSection or EVAL_TASKS.kind_of(own) == task:
        return config
    if not isinstance(own, NoSection):
        raise UserError(
            f"--task={task}: eval.own has the settings of {EVAL_TASKS.kind_of(own)!r}; leave them out, or give "
            f"those of this task, --config.eval.own=\"{{'kind': {task!r}}}\""
        )
    return override(config, {"eval.own.kind": task})


def _evaluate_run(config: Config, place: Place, values: flags.FlagValues) -> None:
    mesh = make_mesh(config.mesh)

    def load(step: int | None) -> Trained:
        return load_trained(place, step, mesh=mesh)

    with Workdir(place, ("eval",), report) as workdir:

        def evaluate(trained: Trained) -> None:
            _evaluate(config, trained, mesh, workdir, values)

        if values.follow:
            follow_run(place, values.task, load, evaluate, report)
        else:
            evaluate(load(values.step))


def _check_follow(values: flags.FlagValues) -> None:
    for flag in ("step", "json"):
        if values.follow and values[flag].value is not None:
            raise UserError(
                f"--follow evaluates every checkpoint into WORKDIR/eval/STEP, --{flag}={values[flag].value} belongs to "
                "one; leave one of both out"
            )


def _evaluate(
    config: Config, trained: Trained, mesh: jax.sharding.Mesh, workdir: Workdir, values: flags.FlagValues
) -> None:
    """Evaluates what was read with the model of the run and everything else of the command."""
    if trained.config.model != stage_before(make_stages(config), trained.step).config.model:
        report("note: the model is the one in --workdir; model.* of --config is not used")
    own = trained.config
    whole = dataclasses.replace(config.train, stages=())
    config = dataclasses.replace(config, name=own.name, model=own.model, prepare=own.prepare, train=whole)
    check_consistent(config)
    check_evaluation(config, mesh)
    dense = None
    if values.dense_workdir is not None:
        dense = _load_twin(trained, make_place(values.dense_workdir, "--dense_workdir"), mesh)
    run = EvalRun(
        task=values.task, config=config, params=trained.params, step=trained.step, tokenizer=trained.tokenizer,
        mesh=mesh, dense=dense, workdir=workdir, report=report, execute_model_code=values.execute_model_code,
        ruler_data=None if values.ruler_data is None else Path(values.ruler_data),
        json=None if values.json is None else Path(values.json),
    )  # fmt: skip
    EVAL_TASKS[values.task](run)


def _load_twin(trained: Trained, workdir: Place, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Returns model section and parameters of the dense run after checking that a comparison makes sense."""
    twin = load_trained(workdir, None, flag="--dense_workdir", mesh=mesh)
    if twin.config.model.ttt is not None:
        raise UserError(f"--dense_workdir={workdir} was trained with TTT; name a run with model.ttt=None")
    if twin.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise UserError(f"--dense_workdir={workdir} was trained with another tokenizer; losses cannot be compared")
    if twin.step != trained.step:
        report(f"warning: the dense run is at step {twin.step}, the evaluated one at {trained.step}")
    return twin.config.model, twin.params
