"""What an evaluation task gets, and how it leaves its result: the arguments of ``intttrain eval --task``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from intttrain.config import Config, ModelConfig
from intttrain.config.errors import UserError
from intttrain.data import Batch, Tokenizer, TokenStore, document_rows
from intttrain.evals.completion import Complete, Completer
from intttrain.evals.conditions import Condition, make_conditions
from intttrain.logs.workdir import Workdir
from intttrain.model import Generator, Params
from intttrain.pod.distributed import process_index
from intttrain.storage.files import create_json, write_json


@runtime_checkable
class Result(Protocol):
    """What a task found."""

    def table(self) -> str:
        """Returns the result as text for a terminal, ending in a newline."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain containers."""


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """One checkpoint to evaluate. All processes of a pod hold it, and call the task together.

    Attributes:
      task: the name of the task.
      config: of the command, with the model of the run; ``eval.own`` is the section that the task was registered with.
      params, step, tokenizer: of the checkpoint; parameters are cut over the devices.
      mesh: over all devices.
      dense: model and parameters of ``--dense_workdir``.
      workdir: of the run.
      json: another file for the result (``--json``).
      ruler_data: folder of RULER's samples (``--ruler_data``).
      execute_model_code: whether programs that the model wrote may be run (``--execute_model_code``).
      report: receives lines of progress, which are printed once for all processes.
    """

    task: str
    config: Config
    params: Params
    step: int
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    dense: tuple[ModelConfig, Params] | None
    workdir: Workdir
    json: Path | None
    ruler_data: Path | None
    execute_model_code: bool
    report: Callable[[str], None]

    @property
    def folder(self) -> Path:
        """Of results of this checkpoint, WORKDIR/eval/STEP."""
        return self.workdir.folder / "eval" / str(self.step)

    @property
    def settings(self) -> dict[str, str | int | float | bool | None]:
        """What answers of the model depend on."""
        return {"run": self.config.name, "checkpoint": self.step, "tokenizer": self.tokenizer.fingerprint}

    def store(self, path: str) -> TokenStore:
        """Opens a store. Raises ``UserError`` if another tokenizer made it."""
        store = TokenStore.open(path)
        store.check_tokenizer(self.tokenizer.fingerprint)
        return store

    def heldout(self, tokens: int, min_tokens: int) -> list[Batch]:
        """Returns held-out documents of at least ``min_tokens``, cut after ``tokens``."""
        if self.config.data.heldout is None:
            raise UserError("data.heldout is not set; name the held-out token store to evaluate on")
        return self._documents(self.config.data.heldout, tokens, min_tokens, self.config.eval.documents)

    def calibration(self) -> list[Batch]:
        """Returns training documents, for thresholds."""
        if not self.config.data.train:
            raise UserError("data.train is not set; name the training store to take thresholds from")
        tokens = self.config.data.seq_len
        return self._documents(
            self.config.data.train[0].path, tokens, tokens, self.config.eval.gating.calibration_documents
        )

    def _documents(self, path: str, tokens: int, min_tokens: int, documents: int) -> list[Batch]:
        return document_rows(
            self.store(path),
            seq_len=tokens,
            min_document_tokens=min_tokens,
            max_documents=documents,
            seed=self.config.eval.seed,
        ).rows

    def conditions(self) -> dict[str, Condition]:
        """Returns the ways to read: update on and off, the gates of the configuration, the dense twin."""
        return make_conditions(self.config.model, self.params, self.config.eval, self.dense)

    def completers(self) -> dict[str, Complete]:
        """Returns the same conditions as ways to continue a prompt."""

        def completer(condition: Condition) -> Complete:
            def make(max_tokens: int) -> Generator:
                return condition.make_generator(rows=self.config.eval.batch_rows, max_tokens=max_tokens, mesh=self.mesh)

            return Completer(make, self.tokenizer)

        return {name: completer(condition) for name, condition in self.conditions().items()}

    def finish(self, result: Result | None, *, plot: Callable[[Path], list[str]] | None = None) -> None:
        """Prints a result and writes WORKDIR/eval/STEP/TASK.json; other processes than the first do nothing.

        Args:
          result: of the whole pod; the first process has to have it.
          plot: writes pictures into a folder and returns their names.
        """
        if process_index() != 0:
            return
        assert result is not None, "the first process has the result"
        print(result.table())
        content = {"step": self.step, **result.to_json()}
        file = f"{self.task}.json"
        folder = write_into_free_folder(self.workdir, self.folder, file, content)
        for picture in plot(folder) if plot is not None else []:
            print(f"plot {self.workdir.name(folder / picture)}")
        print(f"json {self.workdir.name(folder / file)}")
        self.workdir.push_soon()
        if self.json is not None:
            write_json(self.json, content)


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
