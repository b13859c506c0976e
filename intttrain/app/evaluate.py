"""``intttrain eval``: one command, a function for each ``--task``."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from intttrain import ttt
from intttrain.app.follow import follow_run
from intttrain.app.generate import gate_settings
from intttrain.app.hosts import check_hosts
from intttrain.app.runs import Trained, load_trained
from intttrain.config import Config, ModelConfig, check_consistent, resolve
from intttrain.config.errors import UserError
from intttrain.config.evaluation import GateConfig
from intttrain.config.run_stages import make_stages, stage_before
from intttrain.data import Batch, TokenStore, document_rows
from intttrain.evals import Complete, Completer, evaluate_ruler, evaluate_run, prepare_ruler, study_gates
from intttrain.evals.code import evaluate_code
from intttrain.evals.gating.study import Calibration, calibrate
from intttrain.evals.positions.context import Condition, evaluate_contexts
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import check_evaluation
from intttrain.logs.workdir import Workdir, make_place
from intttrain.model import Generator, Params
from intttrain.pod.coordination import open_key_value_store
from intttrain.pod.distributed import process_count, process_index, start_distributed
from intttrain.pod.watchdog import Watchdog
from intttrain.storage.files import Place, create_json, write_json


def report(line: str) -> None:
    """Prints progress to standard error, once for all processes."""
    if process_index() == 0:
        print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every task works on.

    Attributes:
      config: that of the command, with the model of the run.
      trained: checkpoint and tokenizer.
      mesh: over all devices.
      dense: model and parameters of ``--dense_workdir``.
      workdir: of the run.
      values: the flags.
    """

    config: Config
    trained: Trained
    mesh: jax.sharding.Mesh
    dense: tuple[ModelConfig, Params] | None
    workdir: Workdir
    values: flags.FlagValues

    @property
    def folder(self) -> Path:
        """Of results of this checkpoint, WORKDIR/eval/STEP."""
        return self.workdir.folder / "eval" / str(self.trained.step)

    @property
    def settings(self) -> dict[str, str | int | float | bool | None]:
        """What answers of the model depend on."""
        tokenizer = self.trained.tokenizer.fingerprint
        return {"run": self.config.name, "checkpoint": self.trained.step, "tokenizer": tokenizer}

    def heldout(self, tokens: int, min_tokens: int) -> list[Batch]:
        """Returns held-out documents of at least ``min_tokens``, cut after ``tokens``."""
        if self.config.data.heldout is None:
            raise UserError("data.heldout is not set; name the held-out token store to evaluate on")
        return self._documents(self.config.data.heldout, tokens, min_tokens, self.config.eval.documents)

    def _documents(self, path: str, tokens: int, min_tokens: int, documents: int) -> list[Batch]:
        store = TokenStore.open(path)
        store.check_tokenizer(self.trained.tokenizer.fingerprint)
        return document_rows(
            store, seq_len=tokens, min_document_tokens=min_tokens, max_documents=documents, seed=self.config.eval.seed
        ).rows

    def calibration(self) -> list[Batch]:
        """Returns training documents, for thresholds."""
        if not self.config.data.train:
            raise UserError("data.train is not set; name the training store to take thresholds from")
        tokens = self.config.data.seq_len
        return self._documents(
            self.config.data.train[0].path, tokens, tokens, self.config.eval.gating.calibration_documents
        )

    def finish(self, result: Any, file: str, plot: Callable[[Path], list[str]] | None = None) -> None:
        """Prints and keeps a report; other processes than the first do nothing."""
        if process_index() != 0:
            return
        print(result.table())
        content = {"step": self.trained.step, **result.to_json()}
        folder = write_into_free_folder(self.workdir, self.folder, f"{file}.json", content)
        for picture in plot(folder) if plot is not None else []:
            print(f"plot {self.workdir.name(folder / picture)}")
        print(f"json {self.workdir.name(folder / f'{file}.json')}")
        self.workdir.push_soon()
        if self.values.json:
            write_json(Path(self.values.json), content)


def evaluate_model(values: flags.FlagValues) -> int:
    """Evaluates a checkpoint, or with ``--follow`` each as it appears, and writes into WORKDIR/eval/STEP."""
    config, place = resolve(values.config), make_place(values.workdir)
    _check_follow(values)
    start_distributed()
    with Watchdog(None, open_key_value_store()):  # tasks take as long as they take
        check_hosts(config, place)
        _evaluate_run(config, place, values)
    return 0


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
    TASKS[values.task](_Run(config, trained, mesh, dense, workdir, values))


def _positions(run: _Run) -> None:
    config = run.config
    rows = run.heldout(config.eval.seq_len, config.eval.min_document_tokens)
    store = TokenStore.open(config.data.train[0].path) if config.data.train else None  # for the n-gram baselines
    if store is not None:
        store.check_tokenizer(run.trained.tokenizer.fingerprint)
    result = evaluate_run(
        config, run.trained.params, dense=run.dense, heldout_rows=rows, train_store=store, mesh=run.mesh, report=report
    )

    def plot(folder: Path) -> list[str]:
        result.plot(folder / "positions.png")
        return ["positions.png"]

    run.finish(result, "positions", plot)


def _contexts(run: _Run) -> None:
    longest = max(run.config.eval.context.lengths)
    result = evaluate_contexts(
        _conditions(run), run.heldout(longest, longest), run.config.eval, name=run.config.name,
        unit=run.config.prepare.tokenizer.loss_unit, report=report, mesh=run.mesh,
    )  # fmt: skip
    run.finish(result, "context")


def _gating(run: _Run) -> None:
    config = run.config
    rows_by_length, missing = {}, ""
    for tokens in [multiple * config.data.seq_len for multiple in config.eval.gating.lengths]:
        try:
            rows_by_length[tokens] = run.heldout(tokens, tokens)
        except UserError as error:
            missing = str(error)
            report(f"note: rows of {tokens} tokens are left out: {missing}")
    if not rows_by_length:
        raise UserError(f"eval.gating.lengths={list(config.eval.gating.lengths)} leaves nothing to read: {missing}")
    result = study_gates(
        config, run.trained.params, rows_by_length=rows_by_length,
        calibration_rows=run.calibration(), report=report, dense=run.dense, mesh=run.mesh,
    )  # fmt: skip

    def plot(folder: Path) -> list[str]:
        from intttrain.evals.gating.figure import plot_gating  # loads matplotlib

        plot_gating(result, folder)
        return sorted(path.name for path in folder.glob("gating_*.png"))

    run.finish(result, "gating", plot)


def _calibrate(run: _Run) -> None:
    rows = run.calibration()
    thresholds = calibrate(run.config, run.trained.params, rows, mesh=run.mesh)
    run.finish(Calibration(run.config.name, len(rows), thresholds), "thresholds")


def _ruler(run: _Run) -> None:
    if not isinstance(run.workdir.place, Path) and process_count() > 1 and not run.values.ruler_data:
        raise UserError(
            f"--workdir={run.workdir.place} gives every process a folder of its own, and all of {process_count()} read "
            "the samples of RULER; name a folder that all of them see with --ruler_data"
        )
    sets = prepare_ruler(
        run.config.eval.ruler, run.config.prepare.tokenizer, Path(run.values.ruler_data or run.folder / "ruler"),
        max_length=None, report=report,
    )  # fmt: skip
    result = evaluate_ruler(
        sets, _completers(run), name=run.config.name, answers=run.folder / "ruler_answers.jsonl",
        settings=run.settings, config=run.config.eval, report=report,
    )  # fmt: skip
    run.finish(result, "ruler")


def _code(run: _Run) -> None:
    result = evaluate_code(
        _completers(run), name=run.config.name, folder=run.folder / "code", settings=run.settings,
        config=run.config.eval, report=report, execute_untrusted_code=run.values.execute_model_code,
    )  # fmt: skip
    run.finish(result, "code")


TASKS: dict[str, Callable[[_Run], None]] = {
    "positions": _positions, "context": _contexts, "calibrate": _calibrate, "gating": _gating, "ruler": _ruler,
    "code": _code,
}  # fmt: skip


def _conditions(run: _Run) -> dict[str, Condition]:
    """Returns the ways to read: update on and off, the gates of the configuration, the dense twin."""
    model, params = run.config.model, run.trained.params
    if model.ttt is None:
        found = {"dense": Condition(model, params, 0.0)}
    else:
        found = {"on": Condition(model, params, model.ttt.eta), "off": Condition(model, params, 0.0)}
        for gate in run.config.eval.gates:
            rule = ttt.GateRule(gate.rule, gate.signal, gate.update_on, gate.shared)
            if problem := rule.problem():
                raise UserError(f"eval.gates: {problem}")
            settings = gate_settings(rule, gate.rate, gate.thresholds, model, where="eval.gates", flag="thresholds")
            found[_label(gate, rule)] = Condition(
                model, params, model.ttt.eta, rule, settings._replace(seed=np.asarray(run.config.eval.seed, np.uint32))
            )
    if run.dense is not None:
        found["dense"] = Condition(*run.dense, 0.0)
    return found


def _label(gate: GateConfig, rule: ttt.GateRule) -> str:
    looks = f" {gate.update_on} {gate.signal}" if rule.uses_signal else ""
    return f"{gate.rule}{looks} {gate.rate:g}"


def _completers(run: _Run) -> dict[str, Complete]:
    """Returns the same conditions as ways to continue a prompt."""

    def completer(condition: Condition) -> Complete:
        def make(max_tokens: int) -> Generator:
            return Generator(
                condition.model, condition.params, rows=run.config.eval.batch_rows, max_tokens=max_tokens,
                eta=condition.eta, gate=condition.gate, settings=condition.settings, mesh=run.mesh,
            )  # fmt: skip

        return Completer(make, run.trained.tokenizer)

    return {name: completer(condition) for name, condition in _conditions(run).items()}


def write_into_free_folder(workdir: Workdir, wanted: Path, file: str, content: Mapping[str, Any]) -> Path:
    """Writes ``content`` into ``wanted``, or ``wanted-2``, ..., and returns which one.

    An evaluation never replaces an earlier one, nor one that is made at the same time.
    """
    folder, number = wanted, 1
    while True:
        if not any(folder.glob("*.json")):
            with contextlib.suppress(FileExistsError):
                create_json(workdir.name(folder / file), content)
                break
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    if not (folder / file).exists():  # it was created in a bucket
        write_json(folder / file, content)
    return folder


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
