"""Whether a process that left its name behind still lives. Certain only for one that the same kernel counts."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@functools.cache
def boot() -> str:
    """Returns what this start of the kernel is called, which containers on it share; ``""`` where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def describe_self() -> dict[str, Any]:
    """Returns who this process is, in JSON: host, number, and what tells it from a later process of that number."""
    return {"host": socket.gethostname(), "process": os.getpid(), "kernel": _kernel(), "began": _began(os.getpid())}


def is_near(process: Mapping[str, Any]) -> bool:
    """Tells whether ``process``, as ``describe_self`` gave it, has its number from the kernel that counts here."""
    return bool(process["kernel"]) and process["kernel"] == _kernel()


def is_gone(process: Mapping[str, Any]) -> bool:
    """Tells whether ``process``, as ``describe_self`` gave it, has certainly ended."""
    if not is_near(process):
        return False
    number = process["process"]
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # there is one, of somebody else
    began = _began(number)
    return began is not None and began != process["began"]


def _kernel() -> str:
    """Returns the start of the kernel with the numbering of processes: containers have numberings of their own."""
    try:
        return f"{boot()} {os.readlink('/proc/self/ns/pid')}" if boot() else ""
    except OSError:
        return ""


def _began(number: int) -> int | None:
    """Returns when a process began, in ticks since the kernel did; -1 for one that only waits to be counted out."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])
