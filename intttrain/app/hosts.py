"""What is compared between the hosts of a run before it begins: packages, code, command, stores, devices."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intttrain.app.runs import CONFIG_FILE, has_run
from intttrain.config import Config, as_dict
from intttrain.config.dotted import flatten
from intttrain.config.errors import UserError
from intttrain.data import TokenStore, make_tokenizer
from intttrain.pod.agreement import first_message, largest
from intttrain.pod.devices import open_devices
from intttrain.pod.distributed import process_index
from intttrain.pod.preflight import check_agreement, check_devices, code_fingerprint, describe_processes
from intttrain.storage.files import Place
from intttrain.train import package_versions

SHARED_WAIT_S = 60.0  # network file systems remember for a while that a file was not there


def check_hosts(config: Config, workdir: Place) -> None:
    """Checks that all processes can do the same, and opens the devices; each calls it before it asks for one.

    What is wrong everywhere is left to the command, which says it better.

    Raises:
      UserError: the same on every process; names the process and host that differs or misses something.
      PassingError: the devices are in use.
    """
    hosts = check_agreement(lambda: _facts(config, workdir))
    open_devices()
    if len(hosts) > 1:
        check_devices(hosts)


def check_shared(workdir: Place) -> None:
    """Checks that every process sees the run that process 0 has just claimed; all of them call it together.

    Raises:
      UserError: the same on every process; one of them looks at another folder of that name.
    """
    end = time.monotonic() + SHARED_WAIT_S
    while not has_run(workdir) and time.monotonic() < end:
        time.sleep(1)
    message = ""
    if not has_run(workdir):
        message = (
            f"--workdir={workdir} on {_here()} is not that of process 0, whose {CONFIG_FILE} is not there; name a "
            "folder that all hosts share, or one in a bucket"
        )
    _refuse_together(message)


def check_same_newest(step: int | None, folder: Place) -> None:
    """Checks that all processes, which call it together, would go on from the same checkpoint.

    Args:
      step: the newest that this process sees in ``folder``.

    Raises:
      UserError: the same on every process.
    """
    newest = largest(-1 if step is None else step)
    message = ""
    if newest >= 0 and newest != step:
        sees = "no checkpoint" if step is None else f"step {step} as the newest"
        message = (
            f"{_here()} sees {sees} in {folder}, another one sees step {newest}; use storage that all hosts share, "
            "wait until it shows the same to all of them, and start again"
        )
    _refuse_together(message)


def _refuse_together(message: str) -> None:
    """Raises on all processes what the first one says that has something to say."""
    if message := first_message(message):
        raise UserError(message)


def _here() -> str:
    return describe_processes([process_index()], {process_index(): socket.gethostname()})


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
