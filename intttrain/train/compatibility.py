"""When a configuration continues a run: which keys may have changed since its checkpoint, and what to say of others."""

from __future__ import annotations

import fnmatch
import json
import types
from collections.abc import Mapping
from typing import Any

from intttrain.config.completion import complete, unknown_keys
from intttrain.config.errors import UserError
from intttrain.train.checkpoint import CheckpointInfo

# Configuration keys that a resumed run may change, with the reason. Every other key is part of the run's identity, and
# a value of a key that is added to the schema binds until somebody lists the key here. train.batch_rows is not listed
# although the data cursor counts rows: nothing would be lost or repeated, but the run would no longer be the one its
# schedule describes.
FREE_TO_CHANGE: Mapping[str, str] = types.MappingProxyType(
    {
        "name": "a label",
        "plugins": "where code is found; what it does is chosen by other keys",
        "prepare.*": "used before training",
        "eval.*": "used beside training",
        "train.checkpoint.*": "when to save, not what",
        "train.log_every_steps": "what is shown",
        "train.profile_steps": "what is looked at",
        "train.wandb_project": "where numbers go",
        "train.skip.max_*": "when to give up",
        "train.watchdog_seconds": "when to give up",
        "train.microbatches": "same gradient, other rounding",
        "data.heldout": "not trained on",
        "data.prefetch_rows": "speed",
        "mesh.*": "where, not what",
        "model.attention": "same function, other rounding",
        "model.context_attention": "same function, other rounding",
        "model.weight_gradient_dtype": "same function, other rounding",
        "model.remat": "speed and memory",
        "model.loss_chunk_tokens": "memory",
        "model.ttt.implementation": "same function, other rounding",
    }
)


def check_compatible(info: CheckpointInfo, flat_config: Mapping[str, Any], fingerprint: str) -> None:
    """Checks that a run with this configuration and data continues the one that saved ``info``.

    Keys that match ``FREE_TO_CHANGE`` may differ, and so may the paths of the token stores as long as their
    fingerprint is the same. A key that one side does not have, because the schema gained it since, has its default
    there.

    Raises:
      UserError: lists every difference with both values.
    """
    old, new = _identity(info.config), _identity(flat_config)
    unknown = [key for key in unknown_keys(info.config) if _binding({key: None})]
    differences = [
        f"{key} is a key of the run (intttrain {info.versions.get('intttrain', 'of another version')}) that this "
        "version does not know"
        for key in unknown
    ] + [
        f"{key}={_shown(old, key)} in the run but {_shown(new, key)} now"
        for key in sorted((old.keys() | new.keys()) - set(unknown))
        if key not in old or key not in new or old[key] != new[key]
    ]
    if info.fingerprint != fingerprint:
        differences.append(f"the token store has fingerprint {info.fingerprint} in the run but {fingerprint} now")
    if differences:
        raise UserError(
            f"this configuration does not continue the run in --workdir: {'; '.join(differences)}. "
            "Restore these values or use another --workdir"
        )


def _identity(flat_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that make a run what it is, as JSON would give them back."""
    plain: dict[str, Any] = json.loads(json.dumps(complete(flat_config)))
    if isinstance(mixture := plain.get("data.train"), list):
        plain["data.train"] = [{k: v for k, v in item.items() if k != "path"} for item in mixture]
    stages = plain.pop("train.stages", [])
    if any(_binding(stage["overrides"]) for stage in stages):
        plain["train.stages"] = [stage | {"overrides": _binding(stage["overrides"])} for stage in stages]
    return _binding(plain)


def _binding(flat_config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flat_config.items() if not any(fnmatch.fnmatchcase(k, free) for free in FREE_TO_CHANGE)}


def _shown(flat_config: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat_config[key]) if key in flat_config else "not set"
