"""``python -m intttrain.app.harness``: the command line of lm-evaluation-harness with ``--model intttrain``."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import jax

from intttrain.app.runs import load_trained
from intttrain.config import MeshConfig
from intttrain.config.errors import UserError, did_you_mean
from intttrain.evals.conditions import Condition
from intttrain.evals.harness import Respondent, register_model
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import pieces_of
from intttrain.logs.workdir import make_place
from intttrain.pod.devices import open_single

ARGUMENTS = ("workdir", "step", "update", "batch_size")


def load_respondent(
    workdir: str | None = None, step: int | None = None, update: str = "on", batch_size: int | str = 1, **others: Any
) -> Respondent:
    """Returns the model that the arguments of the harness name.

    Args:
      workdir, step: which checkpoint (default: the newest).
      update: ``on`` or ``off``: whether the model learns while it reads.
      batch_size: rows; rounded up to what the devices can share.
      others: whatever else was given.

    Raises:
      UserError: an argument is unknown, missing or out of range, or there is no such checkpoint.
    """
    for name in others:
        raise UserError(f"--model_args: {name} is unknown{did_you_mean(name, ARGUMENTS)}")
    if workdir is None:
        raise UserError("--model_args: workdir is missing; add workdir=FOLDER, the folder of the run")
    if update not in ("on", "off"):
        raise UserError(f"--model_args: update={update} is neither on nor off")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UserError(f"--batch_size={batch_size} is not a number of rows; use for example --batch_size=8")
    open_single("the harness")
    mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
    trained = load_trained(make_place(str(workdir), "workdir"), step, flag="workdir", mesh=mesh)
    model = trained.config.model
    eta = model.ttt.eta if model.ttt is not None and update == "on" else 0.0
    pieces = 1 if mesh is None else pieces_of(mesh, "batch")
    rows = -(-int(batch_size) // pieces) * pieces
    return Respondent(
        Condition(model, trained.params, eta), trained.tokenizer, rows=rows, mesh=mesh,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip


def main() -> int:
    """Runs ``lm_eval`` and returns the exit status."""
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm_eval is not installed; run pip install 'intttrain[harness]'", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    register_model(load_respondent)
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
