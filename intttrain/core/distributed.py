"""How the processes of one run find each other, and which of them this one is. The only place that asks.

``start_distributed`` looks at the environment and at nothing else; docs/launch.md has a command line for each case:

    explicit    INTTTRAIN_COORDINATOR, INTTTRAIN_NUM_PROCESSES and INTTTRAIN_PROCESS_ID, all three
    slurm       a step of several tasks, started by srun
    tpu         a TPU host, unless its environment says that it is alone
    alone       everything else; nothing is started and nobody is waited for
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections.abc import Mapping
from typing import Any

import jax

from intttrain.core.errors import MissingProcessError, UserError

COORDINATOR = "INTTTRAIN_COORDINATOR"
NUM_PROCESSES = "INTTTRAIN_NUM_PROCESSES"
PROCESS_ID = "INTTTRAIN_PROCESS_ID"
TIMEOUT_SECONDS = "INTTTRAIN_INITIALIZATION_TIMEOUT_SECONDS"
DEFAULT_TIMEOUT_SECONDS = 300
HEARTBEAT_SECONDS = "INTTTRAIN_HEARTBEAT_TIMEOUT_SECONDS"
DEFAULT_HEARTBEAT_SECONDS = 100

# JAX's client aborts the whole process, with a stack trace of C++, when its own time is over. Ours is over earlier.
_MARGIN_SECONDS = 60
_PROBE_SECONDS = 5

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_TPU_PART_OF_HOST = ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")


def process_index() -> int:
    """Returns the number of this process, 0 for the one that writes results."""
    return jax.process_index()


def process_count() -> int:
    """Returns the number of processes that run this program together."""
    return jax.process_count()


def describe_start() -> str:
    """Returns one line for people: ``process 3 of 4 (counted from 0), 2 local devices, 8 in all``."""
    local, total = jax.local_device_count(), jax.device_count()
    return f"process {process_index()} of {process_count()} (counted from 0), {local} local devices, {total} in all"


@dataclasses.dataclass(frozen=True)
class Start:
    """One way to start several processes.

    Attributes:
      arguments: for ``jax.distributed.initialize``.
      expected: who has to be there, for messages.
      coordinator: ``host:port`` of process 0, ``None`` where only JAX knows it.
    """

    arguments: Mapping[str, Any]
    expected: str
    coordinator: str | None = None


def start_distributed() -> None:
    """Connects this process with the other ones of the run; does nothing when it is alone or already connected.

    Has to run before anything asks JAX for a device: afterwards the devices of the others cannot be added. Waits
    until all processes are there.

    Raises:
      UserError: a variable is missing or wrong, or the port is taken.
      MissingProcessError: not everybody was there in time.
    """
    if jax.distributed.is_initialized():
        return
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # options are attributes made at run time
    start = choose_start(os.environ, platforms)
    if start is not None:
        # CPU devices run programs side by side, on a few threads. Two programs that communicate then wait for each
        # other when processes get to them in another order; one at a time they cannot. Other devices keep the order.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _connect(start, initialization_timeout_seconds(), heartbeat_timeout_seconds())


def choose_start(environment: Mapping[str, str], platforms: str | None) -> Start | None:
    """Returns how to start, ``None`` for a process that is alone.

    Args:
      environment: as in ``os.environ`` after JAX was imported.
      platforms: ``jax.config.jax_platforms``. JAX itself puts ``tpu`` there when it finds TPU chips and libtpu.

    Raises:
      UserError: a variable is missing or wrong.
    """
    return _explicit(environment) or _slurm(environment) or _tpu(environment, platforms)


def _explicit(environment: Mapping[str, str]) -> Start | None:
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    given = {name: environment[name] for name in names if environment.get(name)}
    if not given:
        return None
    absent = [name for name in names if name not in given]
    if absent:
        there = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{' and '.join(absent)} missing beside {there}: processes are started with all three of "
            f"{', '.join(names)}, or none; set the missing, or unset the others to run alone"
        )
    host, colon, port = given[COORDINATOR].rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        example = host if colon and host else given[COORDINATOR].strip(":") or "localhost"
        raise UserError(
            f"{COORDINATOR}={given[COORDINATOR]} is not HOST:PORT with a port from 1 to 65535; use {example}:8476"
        )
    count = _number(given, NUM_PROCESSES, lowest=1)
    index = _number(given, PROCESS_ID, lowest=0)
    if index >= count:
        raise UserError(
            f"{PROCESS_ID}={index} is not a process of {NUM_PROCESSES}={count}: they are numbered from 0 to "
            f"{count - 1}; use {count - 1}, or {NUM_PROCESSES}={index + 1}"
        )
    arguments = {
        "coordinator_address": given[COORDINATOR],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }
    expected = f"the {count} processes of {NUM_PROCESSES} at {COORDINATOR}={given[COORDINATOR]}"
    return Start(arguments, expected, coordinator=given[COORDINATOR])


def _slurm(environment: Mapping[str, str]) -> Start | None:
    if not all(environment.get(name) for name in _SLURM):
        return None
    count = _number(environment, "SLURM_NTASKS", lowest=1)
    # A shell inside an allocation sees the tasks of the job, but is a step of one task.
    in_step = _number({"SLURM_STEP_NUM_TASKS": str(count), **environment}, "SLURM_STEP_NUM_TASKS", lowest=1)
    if count == 1 or in_step == 1:
        return None
    nodes = environment["SLURM_STEP_NODELIST"]
    expected = f"the {count} processes of SLURM_NTASKS on SLURM_STEP_NODELIST={nodes} (the first node coordinates)"
    return Start({"cluster_detection_method": "slurm"}, expected)


def _tpu(environment: Mapping[str, str], platforms: str | None) -> Start | None:
    if "tpu" not in (platforms or "").split(",") or any(environment.get(name) for name in _TPU_PART_OF_HOST):
        return None
    named = next((name for name in _TPU_HOSTS if environment.get(name)), None)
    if named is None:
        # The metadata server knows the hosts. JAX sets this variable where it finds no chip, users where it is absent.
        if "TPU_SKIP_MDS_QUERY" in environment:
            return None
        return Start({}, "the hosts of this TPU slice, as listed by the metadata server")
    slices = _number({"MEGASCALE_NUM_SLICES": "1", **environment}, "MEGASCALE_NUM_SLICES", lowest=1)
    if slices == 1 and named != "TPU_PROCESS_ADDRESSES_PATH" and "," not in environment[named]:
        return None
    return Start({}, f"the hosts of {named}={environment[named]} in {slices} slice(s)")


def initialization_timeout_seconds() -> int:
    """Returns how long processes wait for each other before the first step. Raises ``UserError`` for no number."""
    return _number({TIMEOUT_SECONDS: str(DEFAULT_TIMEOUT_SECONDS), **os.environ}, TIMEOUT_SECONDS, lowest=1)


def heartbeat_timeout_seconds() -> int:
    """Returns after how long a silence JAX ends the run; compiling is no silence, heartbeats have a thread of C++.

    Raises:
      UserError: the environment holds no number.
    """
    return _number({HEARTBEAT_SECONDS: str(DEFAULT_HEARTBEAT_SECONDS), **os.environ}, HEARTBEAT_SECONDS, lowest=10)


def _number(environment: Mapping[str, str], name: str, *, lowest: int) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdecimal()) or int(text) < lowest:
        raise UserError(f"{name}={text} is not a whole number from {lowest} up; use {name}={lowest} or more")
    return int(text)


def _connect(start: Start, timeout_seconds: int, heartbeat_seconds: int) -> None:
    """Calls ``jax.distributed.initialize`` and turns whatever goes wrong into one line.

    A thread makes the call because it neither returns nor raises when somebody is missing: it would end the process.
    Waiting here also keeps Ctrl-C working.
    """
    _check_port_is_free(start)
    # JAX's preemption service takes SIGTERM away and then does not end the process; the training loop has its own way.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def call() -> None:
        try:
            jax.distributed.initialize(
                **start.arguments, initialization_timeout=timeout_seconds + _MARGIN_SECONDS,
                heartbeat_timeout_seconds=heartbeat_seconds,
            )  # fmt: skip
        except Exception as error:  # anything from a metadata server to a port that is taken
            failures.append(error)

    thread = threading.Thread(target=call, name="jax.distributed.initialize", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if thread.is_alive():
        raise MissingProcessError(
            f"not everybody was there after {TIMEOUT_SECONDS}={timeout_seconds}: waited for {start.expected}"
            f"{_reachable(start.coordinator)}; look for the process that did not start, or give them more time"
        )
    if failures:
        reason = " ".join(str(failures[0]).split()) or type(failures[0]).__name__
        raise UserError(
            f"could not start {start.expected}: {reason}; for a host that is alone on a TPU set TPU_SKIP_MDS_QUERY=1, "
            f"for hosts that JAX does not recognise set {COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID}"
        ) from failures[0]


def _check_port_is_free(start: Start) -> None:
    """Refuses a taken port on process 0, where JAX would crash.

    Raises:
      UserError: another program listens there.
    """
    if start.coordinator is None or start.arguments["process_id"] != 0:
        return
    port = int(start.coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"{COORDINATOR}={start.coordinator}: process 0 cannot listen on port {port} of this host "
            f"({error.strerror or error}); use a free port above 1023 in all processes"
        ) from None


def _reachable(coordinator: str | None) -> str:
    """Returns what a missing answer says, by one more attempt to reach the coordinator."""
    if coordinator is None:
        return ""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        why = error.strerror or error
        return f", where nobody answers ({why}): process 0 has to run on that host, and may have given up"
    return ", which answers, so another process is missing"
