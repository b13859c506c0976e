"""How the processes of one run find each other, and which of them this one is. The only place that asks.

``start_distributed`` looks at the environment, the first of these that fits decides, and docs/launch.md has a command
line for most:

    told to be alone    INTTTRAIN_NUM_PROCESSES=1 without the other two
    explicit            INTTTRAIN_COORDINATOR, INTTTRAIN_NUM_PROCESSES and INTTTRAIN_PROCESS_ID, all three
    jax                 JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, all three
    torchrun            RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
    mpi                 Open MPI up to version 4; other MPI where mpi4py is installed
    slurm               a step of several tasks, started by srun
    tpu                 a TPU host, unless its environment says that it is alone
    kubernetes          an indexed Job, where the package kubernetes is installed
    refused             a launcher says that there are more processes, and nothing above finds them
    alone               everything else; nothing is started and nobody is waited for
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import threading
from collections.abc import Mapping
from typing import Any

import jax

from intttrain.config.errors import MissingProcessError, UserError

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

_OURS = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OPEN_MPI_4 = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")  # what JAX reads
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
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
class _Launcher:
    """A program that starts processes and tells each of them its number.

    Attributes:
      name: for messages.
      index: variable with the number of the process, from 0.
      count: variable with the number of all processes; ``None`` where the launcher does not say it.
      remedy: what lets the processes find each other.
    """

    name: str
    index: str
    count: str | None
    remedy: str

    def company(self, environment: Mapping[str, str]) -> str | None:
        """Returns ``VARIABLE=value`` that says that this process is not the only one, ``None`` without one."""
        index = _natural(environment, self.index)
        if self.count is None:
            return f"{self.index}={index}" if index else None
        count = _natural(environment, self.count)
        # Without a number of its own it is a shell that has the count of a job.
        return f"{self.count}={count}" if index is not None and count is not None and count > 1 else None


_MPI4PY = "install mpi4py for the MPI that starts them"
_MPI = (
    _Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", _MPI4PY),
    _Launcher("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", _MPI4PY),
    _Launcher("MPI (PMI)", "PMI_RANK", "PMI_SIZE", _MPI4PY),
)
_LAUNCHERS = (
    _Launcher("a launcher", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES", f"set all of {', '.join(_JAX)}"),
    *_MPI,
    _Launcher("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", f"let all of {', '.join(_SLURM)} reach it"),
    _Launcher("SLURM", "SLURM_PROCID", None, f"let all of {', '.join(_SLURM)} reach it"),  # 0 in a batch script
    _Launcher("torchrun", "RANK", "WORLD_SIZE", f"set all of {', '.join(_TORCHRUN)}"),
    _Launcher("PMIx", "PMIX_RANK", None, "start them with mpirun or srun"),
    _Launcher(
        "an indexed Job of Kubernetes", "JOB_COMPLETION_INDEX", None, "install kubernetes, pip install 'jax[k8s]'"
    ),
)


@dataclasses.dataclass(frozen=True)
class Start:
    """One way to start several processes.

    Attributes:
      arguments: for ``jax.distributed.initialize``.
      expected: who has to be there, for messages.
      coordinator: ``host:port`` of process 0, ``None`` where only JAX knows it.
      source: what in the environment says so, ``NAME=value``, for messages about the coordinator.
      count: the number of processes, ``None`` where only JAX knows it.
    """

    arguments: Mapping[str, Any]
    expected: str
    coordinator: str | None = None
    source: str = ""
    count: int | None = None


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
      UserError: a variable is missing or wrong, or a launcher started processes that cannot find each other.
    """
    if {name: environment[name] for name in _OURS if environment.get(name)} == {NUM_PROCESSES: "1"}:
        return None
    start = _explicit(environment) or _jax(environment) or _torchrun(environment) or _mpi(environment)
    start = start or _slurm(environment) or _tpu(environment, platforms) or _kubernetes(environment)
    if start is None:
        _refuse_company(environment)
    return start


def check_single(program: str, platforms: str | None) -> None:
    """Refuses to run ``program``, which uses one process, in several: each would do the whole and write the same files.

    Args:
      program: for the message.
      platforms: as in ``choose_start``; ``None`` for a program that needs no device.

    Raises:
      UserError: the environment says that this process is one of several.
    """
    start = choose_start(os.environ, platforms)
    if start is not None and start.count not in (None, 1):
        raise UserError(
            f"{program} runs in one process, and was started in each of {start.expected}; start it once, or set "
            f"only {NUM_PROCESSES}=1 to run every one by itself"
        )


def _explicit(environment: Mapping[str, str]) -> Start | None:
    given = {name: environment[name] for name in _OURS if environment.get(name)}
    if not given:
        return None
    absent = [name for name in _OURS if name not in given]
    if absent:
        there = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{' and '.join(absent)} missing beside {there}: processes are started with all three of "
            f"{', '.join(_OURS)}, or none; set the missing, or {NUM_PROCESSES}=1 alone to run alone"
        )
    return _named_hosts(given, *_OURS)


def _jax(environment: Mapping[str, str]) -> Start | None:
    if not all(environment.get(name) for name in _JAX) or environment[_JAX[1]] == "1":
        return None
    return _named_hosts(environment, *_JAX)


def _named_hosts(given: Mapping[str, str], coordinator: str, num_processes: str, process_id: str) -> Start:
    """Returns the start that three variables of these names describe."""
    host, colon, port = given[coordinator].rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        example = host if colon and host else given[coordinator].strip(":") or "localhost"
        raise UserError(
            f"{coordinator}={given[coordinator]} is not HOST:PORT with a port from 1 to 65535; use {example}:8476"
        )
    count = _number(given, num_processes, lowest=1)
    index = _number(given, process_id, lowest=0)
    if index >= count:
        raise UserError(
            f"{process_id}={index} is not a process of {num_processes}={count}: they are numbered from 0 to "
            f"{count - 1}; use {count - 1}, or {num_processes}={index + 1}"
        )
    source = f"{coordinator}={given[coordinator]}"
    return _at(given[coordinator], count, index, f"the {count} processes of {num_processes} at {source}", source)


def _at(coordinator: str, count: int, index: int, expected: str, source: str, **arguments: Any) -> Start:
    """Returns a start of which everything is known, so that JAX has nothing to look for."""
    arguments |= {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }
    return Start(arguments, expected, coordinator, source, count)


def _mpi(environment: Mapping[str, str]) -> Start | None:
    launcher = next((launcher for launcher in _MPI if launcher.company(environment)), None)
    if launcher is None or not (count := _natural(environment, launcher.count or "")):
        return None
    expected = f"the {count} processes of {launcher.count}={count}"
    if all(environment.get(name) for name in _OPEN_MPI_4):
        arguments: dict[str, Any] = {"cluster_detection_method": "ompi"}
        return Start(arguments, f"{expected} (the host of mpirun, which has to run number 0, coordinates)", count=count)
    if importlib.util.find_spec("mpi4py") is None:
        return None
    # Given here, since an mpi4py of another MPI would find each process alone, and start as many runs.
    arguments = {"cluster_detection_method": "mpi4py", "num_processes": count}
    arguments["process_id"] = _natural(environment, launcher.index)
    return Start(arguments, f"{expected} (the host of number 0 coordinates, as mpi4py says)", count=count)


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
    return Start({"cluster_detection_method": "slurm"}, expected, count=count)


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
    hosts = None if named == "TPU_PROCESS_ADDRESSES_PATH" else slices * len(environment[named].split(","))
    return Start({}, f"the hosts of {named}={environment[named]} in {slices} slice(s)", count=hosts)


def _torchrun(environment: Mapping[str, str]) -> Start | None:
    """Reads what torchrun says. Its own server has MASTER_PORT, so the next port is taken."""
    if not all(environment.get(name) for name in _TORCHRUN) or environment["WORLD_SIZE"] == "1":
        return None
    count, index = _number(environment, "WORLD_SIZE", lowest=1), _number(environment, "RANK", lowest=0)
    port = environment.get("JAX_COORDINATOR_PORT") or str(_number(environment, "MASTER_PORT", lowest=1) + 1)
    given = {_JAX[0]: f"{environment['MASTER_ADDR']}:{port}", _JAX[1]: str(count), _JAX[2]: str(index)}
    start = _named_hosts(given, *_JAX)
    arguments = dict(start.arguments)
    # Several processes on a host share its GPUs as JAX does it under SLURM and Open MPI: one for each.
    local = _natural(environment, "LOCAL_RANK")
    if local is not None and environment.get("LOCAL_WORLD_SIZE", "1") != "1":
        chosen = environment.get("JAX_LOCAL_DEVICE_IDS")
        arguments |= {} if chosen else {"local_device_ids": [local]}
    source = f"MASTER_ADDR={environment['MASTER_ADDR']} with JAX_COORDINATOR_PORT={port}"
    expected = f"the {count} processes of WORLD_SIZE={count} at {source}"
    return dataclasses.replace(start, arguments=arguments, expected=expected, source=source)


def _kubernetes(environment: Mapping[str, str]) -> Start | None:
    if not all(environment.get(name) for name in _KUBERNETES) or importlib.util.find_spec("kubernetes") is None:
        return None
    return Start({}, f"the pods of the Job in which JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']}")


def _refuse_company(environment: Mapping[str, str]) -> None:
    """Refuses to run alone what a launcher started as one of several."""
    alone = f"or {NUM_PROCESSES}=1 to let each run by itself, with a --workdir of its own"
    for launcher in _LAUNCHERS:
        if company := launcher.company(environment):
            raise UserError(
                f"{company}: {launcher.name} started this process as one of several, and they cannot find each other; "
                f"{launcher.remedy}, or set {', '.join(_OURS)} in each, {alone}"
            )
    address, *others = _JAX
    absent = [name for name in others if not environment.get(name)]
    if environment.get(address) and absent and environment.get("JAX_NUM_PROCESSES") != "1":
        raise UserError(
            f"{address}={environment[address]} names another process, but {' and '.join(absent)} missing; set all of "
            f"{', '.join(_JAX)} in each, {alone}"
        )


def initialization_timeout_seconds() -> int:
    """Returns how long processes wait for each other before the first step. Raises ``UserError`` for no number."""
    return _number({TIMEOUT_SECONDS: str(DEFAULT_TIMEOUT_SECONDS), **os.environ}, TIMEOUT_SECONDS, lowest=1)


def heartbeat_timeout_seconds() -> int:
    """Returns after how long a silence JAX ends the run; compiling is no silence, heartbeats have a thread of C++.

    Raises:
      UserError: the environment holds no number.
    """
    return _number({HEARTBEAT_SECONDS: str(DEFAULT_HEARTBEAT_SECONDS), **os.environ}, HEARTBEAT_SECONDS, lowest=10)


def _natural(environment: Mapping[str, str], name: str) -> int | None:
    """Returns the value of a launcher's variable, ``None`` if it is absent or something else than a number."""
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else None


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
            f"could not start {start.expected}: {reason}; for hosts that JAX does not recognise set {COORDINATOR}, "
            f"{NUM_PROCESSES} and {PROCESS_ID}, for one that is alone {NUM_PROCESSES}=1"
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
            f"{start.source}: process 0 cannot listen on port {port} of this host "
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
