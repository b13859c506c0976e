"""A run on disk: what a workdir holds, who may write into it, and how its model is loaded again.

    WORKDIR/
      config.json      the flat configuration and the data fingerprint, written once before anything else
      run_id           what the run is called elsewhere, wherever its folder is
      lease/           which start trains there, or did so last
      checkpoints/     one folder per step
      metrics.jsonl    one line per logged step
      tensorboard/     the same for TensorBoard
      eval/STEP/       results of ``intttrain eval``

``config.json`` claims the folder; ``load_trained`` reads a model back from any of its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

import jax

from intttrain.config import Config, as_dict, resolve
from intttrain.config.completion import unknown_keys
from intttrain.config.dotted import flatten, unflatten
from intttrain.config.errors import UserError, user_error
from intttrain.config.registry import import_plugins
from intttrain.config.run_stages import make_stages, stage_before
from intttrain.data import Tokenizer, make_tokenizer, mixture_fingerprint, open_stores
from intttrain.layout.sharding import named_shardings, with_sharding
from intttrain.logs.lease import FOLDER as LEASE_FOLDER
from intttrain.logs.lease import Lease
from intttrain.model import Params, abstract_params, logical_axes
from intttrain.storage.files import Place, write_json, write_text
from intttrain.train import CheckpointInfo, Checkpoints, check_compatible

CONFIG_FILE = "config.json"
ID_FILE = "run_id"


@dataclasses.dataclass(frozen=True)
class Identity:
    """What makes a run this run: its flat configuration and the fingerprint of its training rows."""

    flat_config: dict[str, Any]
    fingerprint: str
    tokenizer: dict[str, Any]

    def info(
        self, step: int, data_cursor: int, *, skipped: Sequence[Sequence[int]] = (), heldout_loss: float | None = None
    ) -> CheckpointInfo:
        """Returns the description that goes into a checkpoint."""
        batches = [list(batch) for batch in skipped]
        return CheckpointInfo(
            step, data_cursor, self.flat_config, self.fingerprint, self.tokenizer, batches, heldout_loss=heldout_loss
        )


def make_identity(config: Config) -> Identity:
    """Opens the stores, checks that tokenizer, stores and model fit together, and returns the identity of the run.

    Raises:
      UserError: a store is missing or damaged, was made by another tokenizer, or has ids outside the vocabulary.
    """
    tokenizer = make_tokenizer(config.prepare.tokenizer)
    blocks = dataclasses.replace(config.data, seq_len=make_stages(config)[0].block_tokens)
    for store in open_stores(config.data, config.model.vocab_size):
        store.check_tokenizer(tokenizer.fingerprint)
    return Identity(
        flat_config=flatten(as_dict(config)),
        fingerprint=mixture_fingerprint(blocks),
        tokenizer=as_dict(config)["prepare"]["tokenizer"] | {"fingerprint": tokenizer.fingerprint},
    )


def claim_workdir(workdir: Place, identity: Identity, lease: Lease) -> None:
    """Makes ``workdir`` this run's, or checks that it already is, and takes it for this start; it has an id afterwards.

    Raises:
      UserError: it holds something else, a run with another configuration or other data, or another start trains there.
    """
    _check_is_run_or_empty(workdir, identity)  # nothing is written into a folder of somebody else
    workdir.mkdir(parents=True, exist_ok=True)
    lease.claim()
    if not _check_is_run_or_empty(workdir, identity):
        write_json(workdir / CONFIG_FILE, dataclasses.asdict(identity))
    if not (workdir / ID_FILE).exists():
        write_text(workdir / ID_FILE, secrets.token_hex(8) + "\n")
    read_run_id(workdir)


def read_run_id(workdir: Place) -> str:
    """Returns the random id that the run got when it first began, 16 hexadecimal digits. It moves with the folder.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / ID_FILE
    text = path.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{16}", text):
        raise UserError(
            f"{path} holds {text[:40]!r}, not an id of 16 hexadecimal digits; restore it, or delete it: the run gets "
            "another id, and with it another entry on Weights & Biases"
        )
    return text


def _check_is_run_or_empty(workdir: Place, identity: Identity) -> bool:
    """Returns whether ``workdir`` is this run's; otherwise it holds nothing but what a start leaves that was killed."""
    config_file = workdir / CONFIG_FILE
    if config_file.exists():
        check_compatible(_read_identity(config_file).info(0, 0), identity.flat_config, identity.fingerprint)
        return True
    if workdir.exists() and (not workdir.is_dir() or not all(map(_is_beginning, workdir.iterdir()))):
        raise UserError(
            f"--workdir={workdir} is not empty and holds no {CONFIG_FILE} of a run; "
            "existing files are never mixed with a run: choose another path"
        )
    return False


def _is_beginning(path: Place) -> bool:
    return path.name == LEASE_FOLDER or path.name.startswith(f".{CONFIG_FILE}.")


def _read_identity(path: Place) -> Identity:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Identity(document["flat_config"], document["fingerprint"], document["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise user_error(f"{path} cannot be read as the configuration of a run ({error}); restore it", error) from None


def has_run(workdir: Place) -> bool:
    """Returns whether a run has claimed ``workdir``."""
    return (workdir / CONFIG_FILE).exists()


def last_step(workdir: Place) -> int:
    """Returns the step with which the run in ``workdir`` ends. Raises ``UserError`` if its file is damaged."""
    return _run_config(workdir / CONFIG_FILE, _read_identity(workdir / CONFIG_FILE)).train.num_steps


def _run_config(path: Place, identity: Identity) -> Config:
    """Returns the configuration of a run; a key that the schema gained since has its default."""
    import_plugins(identity.flat_config.get("plugins", ()))  # which know their own keys
    if unknown := unknown_keys(identity.flat_config):
        raise UserError(
            f"{path} has {', '.join(unknown)}, which this version of intttrain does not know; use the version that "
            "made the run, which its checkpoints name"
        )
    return resolve(unflatten(identity.flat_config))


def read_config(workdir: Place, flag: str = "--workdir") -> Config:
    """Returns the configuration of the run in ``workdir``, which ``flag`` named.

    Raises:
      UserError: there is no run, its file is damaged or of another version, or a plugin cannot be imported.
    """
    return _run_config(workdir / CONFIG_FILE, _identity_of(workdir, flag))


def _identity_of(workdir: Place, flag: str) -> Identity:
    if not has_run(workdir):
        raise UserError(f"{flag}={workdir} holds no run ({CONFIG_FILE} is missing); train first or correct the path")
    return _read_identity(workdir / CONFIG_FILE)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model read back from a workdir; ``config`` is that of the stage that made ``step``."""

    config: Config
    params: Params
    step: int
    tokenizer: Tokenizer


def load_trained(
    workdir: Place, step: int | None, *, flag: str = "--workdir", mesh: jax.sharding.Mesh | None = None
) -> Trained:
    """Returns configuration, parameters and tokenizer of a run's checkpoint (default: the newest).

    Args:
      workdir, step: which checkpoint.
      flag: that named ``workdir``, for messages.
      mesh: over whose devices the parameters are cut; without one they lie on one device.

    Raises:
      UserError: no run, no such step, a damaged checkpoint, or the tokenizer file changed or went away.
    """
    identity = _identity_of(workdir, flag)
    config = _run_config(workdir / CONFIG_FILE, identity)
    with Checkpoints(str(workdir / "checkpoints"), config.train.checkpoint, read_only=True) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{workdir / 'checkpoints'} holds no checkpoint yet; train first")
        config = stage_before(make_stages(config), step).config
        params = checkpoints.restore_params(step, _placed_params(config, mesh))
    tokenizer = make_tokenizer(config.prepare.tokenizer)
    if tokenizer.fingerprint != identity.tokenizer["fingerprint"]:
        raise UserError(
            f"prepare.tokenizer.path={config.prepare.tokenizer.path} is no longer the tokenizer this run was trained "
            f"with ({tokenizer.fingerprint[:12]} instead of {identity.tokenizer['fingerprint'][:12]}); restore the file"
        )
    return Trained(config, params, step, tokenizer)


def _placed_params(config: Config, mesh: jax.sharding.Mesh | None) -> Params:
    """Returns shapes and dtypes of the parameters, with shardings where there is a mesh."""
    params = abstract_params(config.model)
    if mesh is None:
        return params
    return jax.tree.map(with_sharding, params, named_shardings(mesh, logical_axes(config.model), params))


def parameter_counts(config: Config) -> dict[str, int]:
    """Returns the number of scalars in the whole model and in what TTT adds."""
    params = abstract_params(config.model)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    return {"parameters": count(params), "ttt_parameters": count(params["ttt"]) if "ttt" in params else 0}
