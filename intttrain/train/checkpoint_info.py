"""What a checkpoint says about itself beside its arrays: a JSON document with its own digest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from intttrain.config.errors import UserError

FORMAT = 2  # raised when an older program could misread what this one writes

_VERSIONED_PACKAGES = ("intttrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that shape a run."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself beside its arrays; everything is JSON.

    Attributes:
      step: completed optimizer steps.
      data_cursor: the next row of the data stream, in rows of the shortest stage.
      config: the flat configuration (``config.dotted.flatten``) of the run.
      fingerprint: of the prepared token store.
      tokenizer: enough to tell, and to open again, the tokenizer of that store.
      skipped: (step, data cursor) of every batch that was not learned from: it came after so many steps.
      versions: of the packages that wrote the checkpoint.
      heldout_loss: of these parameters, if it was measured and is finite.
    """

    step: int
    data_cursor: int
    config: Mapping[str, Any]
    fingerprint: str
    tokenizer: Mapping[str, Any]
    skipped: Sequence[Sequence[int]] = dataclasses.field(default_factory=list)
    versions: Mapping[str, str] = dataclasses.field(default_factory=package_versions)
    heldout_loss: float | None = None


def to_document(info: CheckpointInfo, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the JSON document of a checkpoint; ``table`` has shape, dtype and checksum of every array."""
    document = {"format": FORMAT, "info": dataclasses.asdict(info), "arrays": table}
    plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return plain | {"digest": _digest(plain)}


def from_document(document: Any) -> tuple[CheckpointInfo, dict[str, dict[str, Any]]]:
    """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for a damaged document, ``UserError`` for a newer one."""
    content = {key: value for key, value in document.items() if key != "digest"}
    if document["digest"] != _digest(content):
        raise ValueError("its contents do not match its digest")
    if document["format"] > FORMAT:
        raise UserError(
            f"the checkpoint has format {document['format']}, this version of intttrain reads up to {FORMAT}; "
            f"use intttrain {content['info']['versions'].get('intttrain', 'of the run that wrote it')}"
        )
    return CheckpointInfo(**document["info"]), document["arrays"]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
