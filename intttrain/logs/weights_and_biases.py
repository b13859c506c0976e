"""Training numbers on Weights & Biases; the ``wandb`` package is imported when a run asks for it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from intttrain.config.errors import UserError, passes, reason_of
from intttrain.logs.progress import Number

INIT_TIMEOUT_S = 30.0  # wandb asks three times for as long before it gives up
FINISH_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class WandbRun:
    """The entry of a run.

    Attributes:
      project: of Weights & Biases.
      name: of the run, for people.
      id: makes the entry: a run that is resumed or moved goes on under the same one.
      config: flat, shown and compared there.
    """

    project: str
    name: str
    id: str
    config: Mapping[str, Any]


class WandbWriter:
    """Sends records to an entry; ``wandb`` does so from a process of its own.

    Args:
      entry: as ``wandb.init`` returns it.
    """

    def __init__(self, entry: Any) -> None:
        self._entry = entry

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Sends the finite values."""
        self._entry.log({key: value for key, value in scalars.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Ends the entry; waits ``FINISH_TIMEOUT_S`` at most for what was not sent yet."""
        self._entry.finish()


def start_wandb(run: WandbRun, folder: Path, report: Callable[[str], None]) -> WandbWriter | None:
    """Opens the entry, or returns ``None`` after a warning if Weights & Biases cannot be reached.

    The key of the account comes from where ``wandb`` looks for it (``WANDB_API_KEY`` or ``wandb login``), never from a
    configuration. ``WANDB_MODE=offline`` keeps everything in the workdir.

    Args:
      run: the entry.
      folder: keeps the local files.
      report: receives the warning.

    Raises:
      UserError: the package is absent or too old, nobody is logged in, or the account may not write there.
    """
    setting = f"train.wandb_project={run.project!r}"
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"{setting} needs the package wandb; pip install wandb, or set it to None")
    wandb = importlib.import_module("wandb")
    try:
        settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S)
    except Exception as error:  # of pydantic, for a setting that an old release does not know
        raise UserError(f"{setting} needs a newer wandb ({reason_of(error)}); pip install --upgrade wandb") from None
    try:
        entry = wandb.init(
            project=run.project, name=run.name, dir=str(folder), id=run.id, resume="allow", config=dict(run.config),
            settings=settings,
        )  # fmt: skip
    except Exception as error:
        if not passes(error) or _is_refusal(error):
            raise UserError(
                f"{setting}: Weights & Biases does not start ({_first_line(error)}); log in with 'wandb login', check "
                "the project, or set WANDB_MODE=offline"
            ) from None
        report(
            f"warning: {setting}: Weights & Biases does not start ({_first_line(error)}); the run goes on and this "
            "start sends nothing there; metrics.jsonl and TensorBoard have everything, and WANDB_MODE=offline keeps "
            "it for 'wandb sync'"
        )
        return None
    return WandbWriter(entry)


def _is_refusal(error: Exception) -> bool:
    """Returns whether the service said no: wandb has one class of exceptions for this and for silence."""
    return re.search(r"\berror 4(?!08|29)\d\d\b", str(error)) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
