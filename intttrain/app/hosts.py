"""What is compared between the hosts of a run before it begins: packages, code, command, stores, devices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intttrain.core.config import Config, as_dict
from intttrain.core.dotted import flatten
from intttrain.core.errors import UserError
from intttrain.core.preflight import check_agreement, check_devices, code_fingerprint
from intttrain.core.workdir import Place
from intttrain.data import TokenStore, make_tokenizer
from intttrain.train import package_versions


def check_hosts(config: Config, workdir: Place) -> None:
    """Checks that all processes can do the same; each calls it before it asks for a device.

    What is wrong everywhere is left to the command, which says it better.

    Raises:
      UserError: the same on every process; names the process and host that differs or misses something.
    """
    hosts = check_agreement(lambda: _facts(config, workdir))
    if len(hosts) > 1:
        check_devices(hosts)


def _facts(config: Config, workdir: Place) -> dict[str, str]:
    """Returns what has to be the same everywhere, as text by name."""
    facts = {f"the version of {name}": version for name, version in package_versions().items()}
    facts["the code of intttrain"] = _short(code_fingerprint())
    facts |= {"--workdir": str(workdir), f"the folder of --workdir={workdir}": _writable(workdir)}
    facts |= {name: json.dumps(value) for name, value in flatten(as_dict(config)).items()}
    facts["the tokenizer"] = _fingerprint(make_tokenizer, config.prepare.tokenizer)
    for path in (*(item.path for item in config.data.train), *filter(None, [config.data.heldout])):
        facts[f"the token store {path}"] = _fingerprint(TokenStore.open, path)
    return facts


def _short(fingerprint: str) -> str:
    return fingerprint[:12]


def _fingerprint(open_it: Callable[[Any], Any], argument: object) -> str:
    try:
        return _short(open_it(argument).fingerprint)
    except (UserError, OSError) as error:
        return f"unusable ({error})"


def _writable(workdir: Place) -> str:
    if not isinstance(workdir, Path):
        return "in a bucket"
    nearest = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    return "writable" if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) else f"not writable at {nearest}"
