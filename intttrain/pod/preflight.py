"""What all processes have to have in common, compared before anything is compiled and before any collective.

Each process brings facts as text by name, and compares them with those of process 0, which collects the differences
and answers all: they go on together or stop together, with one line that names processes and hosts.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from intttrain.config.errors import MissingProcessError, UserError
from intttrain.pod.coordination import KeyValueStore, open_key_value_store
from intttrain.pod.distributed import initialization_timeout_seconds

Facts = Mapping[str, str]

_SHOWN = 4  # differences, and processes of each
_POLL_SECONDS = 0.1
_MARGIN_SECONDS = 30  # for the answer of process 0, after those it waits for had their time


def check_agreement(facts: Callable[[], Facts]) -> dict[int, str]:
    """Compares the facts of all processes and returns their hosts; a process that is alone has nothing to compare.

    Raises:
      UserError: the same on every process: the facts differ.
      MissingProcessError: a process did not report in ``INTTTRAIN_INITIALIZATION_TIMEOUT_SECONDS``.
    """
    store, host = open_key_value_store(), socket.gethostname()
    if store is None:
        return {0: host}
    timeout_s = initialization_timeout_seconds()
    store.put("host", {"name": host})
    mine = dict(facts())
    if store.index == 0:
        store.put("reference", mine)
    store.put("differences", _differences(mine, _answer(store, "reference", timeout_s)))
    if store.index == 0:
        found = _wait_for_all(store, timeout_s)
        hosts = {index: document["name"] for index, document in store.all("host").items()}
        missing = _missing(store.count, found, hosts, timeout_s)
        store.put("answer", {"missing": missing, "refusal": _refusal(found, hosts), "hosts": hosts})
    answer = _answer(store, "answer", timeout_s + _MARGIN_SECONDS)
    if answer["missing"]:
        raise MissingProcessError(answer["missing"])
    if answer["refusal"]:
        raise UserError(answer["refusal"])
    return {int(index): name for index, name in answer["hosts"].items()}


def check_devices(hosts: Mapping[int, str]) -> None:
    """Checks that every process brings as many devices as process 0, of the same kind.

    Args:
      hosts: of all processes, for the message.

    Raises:
      UserError: on every process; names the one that differs.
    """
    kinds: dict[int, list[str]] = {}
    for device in jax.devices():
        kinds.setdefault(device.process_index, []).append(device.device_kind)
    first = kinds.get(0, [])
    for index, found in sorted(kinds.items()):
        if sorted(found) != sorted(first):
            raise UserError(
                f"{describe_processes([index], hosts)} has {_devices(found)} but {describe_processes([0], hosts)} has "
                f"{_devices(first)}; every process needs the same: look for a device that is broken or taken"
            )


def code_fingerprint() -> str:
    """Returns a hash of the source files of this package, 64 hexadecimal digits."""
    package = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(package).as_posix()} {content}\n".encode())
    return total.hexdigest()


def _devices(kinds: list[str]) -> str:
    return " and ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))) or "no device"


def _answer(store: KeyValueStore, folder: str, timeout_s: float) -> dict[str, Any]:
    try:
        return store.get(folder, 0, timeout_s)
    except TimeoutError:
        host = store.all("host").get(0, {"name": "unknown"})["name"]
        raise MissingProcessError(
            f"process 0 (host {host}) did not report in {timeout_s} s; look at its output for what keeps it"
        ) from None


def _differences(mine: Facts, reference: Facts) -> dict[str, list[str]]:
    """Returns ``name: [value here, value of process 0]`` of the facts that differ."""
    both = {name: [mine.get(name, "absent"), reference.get(name, "absent")] for name in {**reference, **mine}}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _wait_for_all(store: KeyValueStore, timeout_s: float) -> dict[int, dict[str, Any]]:
    end = time.monotonic() + timeout_s
    while len(found := store.all("differences")) < store.count and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return found


def _missing(count: int, found: Iterable[int], hosts: Mapping[int, str], timeout_s: float) -> str:
    """Returns who did not report, in one line, or nothing."""
    silent = set(range(count)).difference(found)
    who = describe_processes(silent, hosts)
    return f"{who} did not report in {timeout_s} s; look at the output there for what keeps it" if silent else ""


def _refusal(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> str:
    """Returns what differs, in one line, or nothing."""
    differing: dict[tuple[str, str, str], list[int]] = {}
    for index, differences in sorted(found.items()):
        for name, (here, there) in differences.items():
            differing.setdefault((name, here, there), []).append(index)
    lines = [
        f"{name} is {here} in {describe_processes(indices, hosts)} but {there} in {describe_processes([0], hosts)}"
        for (name, here, there), indices in differing.items()
    ]
    more = f" (and {len(lines) - _SHOWN} more)" if len(lines) > _SHOWN else ""
    advice = "start all of them with the same command, code, packages and data"
    return f"the processes do not agree: {'; '.join(lines[:_SHOWN])}{more}; {advice}" if lines else ""


def describe_processes(indices: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Returns ``process 1 (host a)`` or ``processes 1 (host a), 2 (host b)``."""
    names = [f"{index} (host {hosts.get(index, 'unknown')})" for index in sorted(indices)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{'process' if len(names) == 1 else 'processes'} {', '.join(names[:_SHOWN])}{more}"
