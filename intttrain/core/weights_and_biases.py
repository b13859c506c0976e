"""Training numbers on Weights & Biases; the ``wandb`` package is imported when a run asks for it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

from intttrain.core.errors import UserError
from intttrain.core.progress import Number
from intttrain.core.workdir import Place


class WandbWriter:
    """Sends records to a project; a resumed run goes on under the same entry.

    The key of the account comes from where ``wandb`` looks for it (``WANDB_API_KEY`` or ``wandb login``), never from a
    configuration. ``WANDB_MODE=offline`` keeps everything in the workdir.

    Args:
      project: of Weights & Biases.
      name: of the run.
      folder: keeps the local files.
      place: of the run; makes the identity of the entry.

    Raises:
      UserError: the package is not installed or refuses to start.
    """

    def __init__(self, project: str, name: str, folder: Path, place: Place) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                f"train.wandb_project={project!r} needs the package wandb; pip install wandb, or set it to None"
            )
        wandb = importlib.import_module("wandb")
        identity = hashlib.sha256(str(place.absolute() if isinstance(place, Path) else place).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(project=project, name=name, dir=str(folder), id=identity, resume="allow")
        except Exception as error:  # no account, no network, no such project
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"train.wandb_project={project!r}: Weights & Biases does not start ({reason}); log in with "
                "'wandb login', or set WANDB_MODE=offline"
            ) from None

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Sends the finite values."""
        self._run.log({key: value for key, value in scalars.items() if math.isfinite(value)}, step=step)

    def flush(self) -> None:
        """Nothing is held back here: ``wandb`` sends from a process of its own."""

    def close(self) -> None:
        """Ends the entry."""
        self._run.finish()
