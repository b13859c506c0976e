"""Start-up of several processes: which way is chosen, and what a person reads when it fails.

JAX connects once in a process, so everything that connects runs in processes of its own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from intttrain.config.errors import RESTART_STATUS, UserError
from intttrain.pod import distributed
from intttrain.pod.distributed import choose_start, start_distributed

REPO = Path(__file__).resolve().parents[2]
EXPLICIT = {"INTTTRAIN_COORDINATOR": "h0:8476", "INTTTRAIN_NUM_PROCESSES": "4", "INTTTRAIN_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
JAX = {"JAX_COORDINATOR_ADDRESS": "h0:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
TORCHRUN = {
    "MASTER_ADDR": "h0", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}  # fmt: skip
ALONE = {"INTTTRAIN_NUM_PROCESSES": "1"}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


# What tells a process that it is one of several, by the variable that the refusal names.
COMPANY = {
    "OMPI_COMM_WORLD_SIZE": without(OPEN_MPI_4, "OMPI_MCA_orte_hnp_uri"),  # Open MPI 5
    "MV2_COMM_WORLD_SIZE": {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"},
    "PMI_SIZE": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "PMIX_RANK": {"PMIX_RANK": "1"},
    "WORLD_SIZE": without(TORCHRUN, "MASTER_ADDR"),
    "JOB_COMPLETION_INDEX": {"JOB_COMPLETION_INDEX": "1", "JOBSET_NAME": "run"},
    "JAX_COORDINATOR_ADDRESS": without(JAX, "JAX_PROCESS_ID"),
    "JAX_NUM_PROCESSES": without(JAX, "JAX_COORDINATOR_ADDRESS"),
    "SLURM_PROCID": without(SLURM, "SLURM_STEP_NODELIST"),
    "SLURM_STEP_NUM_TASKS": without(SLURM, "SLURM_STEP_NODELIST") | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
}
PROGRAM = """
import sys
from intttrain.pod.distributed import describe_start, start_distributed
from intttrain.config.errors import UserError
try:
    start_distributed()
    start_distributed()
except UserError as error:
    print("error:", error, file=sys.stderr, flush=True)
    sys.exit(error.status)
print(describe_start())
"""


# --- the decision --------------------------------------------------------------------------------------------------


def kind(environment: dict[str, str], platforms: str | None = None) -> str:
    start = choose_start(environment, platforms)
    if start is None:
        return "alone"
    method = start.arguments.get("cluster_detection_method")
    return {"deactivate": "explicit", None: "tpu"}.get(method, method)


@pytest.mark.parametrize(
    ("environment", "platforms", "wanted"),
    [
        ({}, None, "alone"),
        ({}, "cpu", "alone"),
        ({}, "cuda", "alone"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, None, "alone"),  # a laptop with libtpu
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", "alone"),  # the same, or a TPU host that is alone
        ({}, "tpu,cpu", "tpu"),  # a TPU VM: the metadata server knows
        ({"TPU_VISIBLE_CHIPS": "0"}, "tpu,cpu", "alone"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", "alone"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "tpu,cpu", "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "cpu", "alone"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, "tpu", "tpu"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "tpu,cpu", "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", "tpu"),
        (SLURM, None, "slurm"),
        (SLURM, "tpu,cpu", "slurm"),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None, "alone"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None, "alone"),  # a shell inside the allocation
        (without(SLURM, "SLURM_STEP_NODELIST") | {"SLURM_PROCID": "0"}, None, "alone"),  # the batch script itself
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"}, None, "alone"),  # salloc
        (EXPLICIT, None, "explicit"),
        (EXPLICIT | SLURM | {"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", "explicit"),
        (dict.fromkeys(EXPLICIT, ""), None, "alone"),
        (JAX, None, "explicit"),
        (JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None, "alone"),
        ({"JAX_COORDINATOR_ADDRESS": "h0:8476"} | SLURM, None, "slurm"),  # JAX takes the rest from SLURM
        ({"JAX_COORDINATOR_ADDRESS": "h0:8476", "TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", "tpu"),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None, "alone"),
        (OPEN_MPI_4, None, "ompi"),
        (OPEN_MPI_4 | SLURM | {"SLURM_NTASKS": "1"}, None, "ompi"),  # mpirun starts its daemons as tasks
        (TORCHRUN, None, "explicit"),
        (TORCHRUN | SLURM, None, "explicit"),  # a torchrun in each task
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None, "alone"),
        (without(TORCHRUN, "RANK"), None, "alone"),  # a shell that exports what a job will need
        ({"RANK": "3"}, None, "alone"),
        ({"JOB_COMPLETION_INDEX": "1", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "tpu,cpu", "tpu"),
        ({"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None, "alone"),  # one pod
        ({"PMIX_RANK": "0"}, None, "alone"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None, "alone"),
        (without(OPEN_MPI_4, "OMPI_MCA_orte_hnp_uri") | {"OMPI_COMM_WORLD_SIZE": "1"}, None, "alone"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, "alone"),
        *((started | ALONE, None, "alone") for started in COMPANY.values()),
        (TORCHRUN | ALONE, "tpu,cpu", "alone"),
    ],
)
def test_the_environment_decides(environment, platforms, wanted):
    assert kind(environment, platforms) == wanted


@pytest.mark.parametrize(("variable", "environment"), COMPANY.items())
def test_one_of_several_that_cannot_find_each_other_is_refused(variable, environment):
    with pytest.raises(UserError) as caught:
        choose_start(environment, "cpu")
    message = str(caught.value)
    assert message.startswith(f"{variable}={environment[variable]}") and "\n" not in message
    assert " in each, or INTTTRAIN_NUM_PROCESSES=1 to let each run by itself" in message


def test_packages_that_find_the_others_are_used(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name in ("mpi4py", "kubernetes"))
    start = choose_start(COMPANY["PMI_SIZE"], None)
    assert start is not None
    # Not left to mpi4py: one that belongs to another MPI says that every process is alone.
    wanted = {"cluster_detection_method": "mpi4py", "num_processes": 2, "process_id": 1}
    assert start.arguments == wanted
    pod = COMPANY["JOB_COMPLETION_INDEX"] | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    start = choose_start(pod, None)
    assert start is not None and start.arguments == {} and "JOB_COMPLETION_INDEX=1" in start.expected


def test_torchrun_leaves_its_port_and_the_gpus_of_others_alone():
    start = choose_start(TORCHRUN, None)
    assert start is not None
    assert start.arguments == {
        "coordinator_address": "h0:29501", "num_processes": 4, "process_id": 3, "local_device_ids": [1],
        "cluster_detection_method": "deactivate",
    }  # fmt: skip
    start = choose_start(TORCHRUN | {"JAX_LOCAL_DEVICE_IDS": "0,1", "JAX_COORDINATOR_PORT": "77"}, None)
    assert start is not None and "local_device_ids" not in start.arguments and start.coordinator == "h0:77"


@pytest.mark.parametrize("environment", [EXPLICIT, TORCHRUN, OPEN_MPI_4, SLURM, JAX], ids=lambda found: min(found))
def test_programs_of_one_process_refuse_company(environment, monkeypatch):
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(
        UserError, match=r"intttrain prepare runs in one process, .* only INTTTRAIN_NUM_PROCESSES=1 to run"
    ):
        distributed.check_single("intttrain prepare", None)
    monkeypatch.setattr(os, "environ", ALONE | without(environment, *EXPLICIT))
    distributed.check_single("intttrain prepare", None)


def test_a_program_without_devices_runs_on_a_host_of_a_slice(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "a,b"})
    distributed.check_single("intttrain prepare", None)
    with pytest.raises(UserError, match="TPU_WORKER_HOSTNAMES=a,b"):
        distributed.check_single("intttrain export", "tpu,cpu")


def test_explicit_hosts_are_passed_on():
    start = choose_start(EXPLICIT, "cpu")
    assert start is not None
    assert start.arguments == {
        "coordinator_address": "h0:8476", "num_processes": 4, "process_id": 3, "cluster_detection_method": "deactivate"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"INTTTRAIN_PROCESS_ID": ""}, "INTTTRAIN_PROCESS_ID missing beside INTTTRAIN_COORDINATOR=h0:8476 and"),
        (
            {"INTTTRAIN_PROCESS_ID": "4"},
            "INTTTRAIN_PROCESS_ID=4 is not a process of .*=4: .* use 3",
        ),
        ({"INTTTRAIN_PROCESS_ID": "-1"}, "INTTTRAIN_PROCESS_ID=-1 is not a whole number from 0 up; use"),
        ({"INTTTRAIN_PROCESS_ID": "one"}, "INTTTRAIN_PROCESS_ID=one is not a whole number"),
        ({"INTTTRAIN_NUM_PROCESSES": "0"}, "INTTTRAIN_NUM_PROCESSES=0 is not a whole number from 1 up"),
        ({"INTTTRAIN_NUM_PROCESSES": "4.0"}, "INTTTRAIN_NUM_PROCESSES=4.0 is not a whole number"),
        ({"INTTTRAIN_COORDINATOR": "h0"}, "INTTTRAIN_COORDINATOR=h0 is not HOST:PORT .* use h0:8476"),
        ({"INTTTRAIN_COORDINATOR": "h0:99999"}, "INTTTRAIN_COORDINATOR=h0:99999 is not HOST:PORT .* use h0:8476"),
        ({"INTTTRAIN_COORDINATOR": ":8476"}, "INTTTRAIN_COORDINATOR=:8476 is not HOST:PORT"),
    ],
)
def test_wrong_variables_are_explained_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        choose_start(EXPLICIT | change, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["0", "soon", "-3"])
def test_the_timeout_is_checked_before_anything_starts(value, monkeypatch):
    for name, text in EXPLICIT.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("INTTTRAIN_INITIALIZATION_TIMEOUT_SECONDS", value)
    monkeypatch.setattr(distributed, "_connect", lambda *_: pytest.fail("connected"))
    with pytest.raises(UserError, match=f"INTTTRAIN_INITIALIZATION_TIMEOUT_SECONDS={value} is not a whole number"):
        start_distributed()


# --- processes -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launch(program: str = PROGRAM, **variables: str) -> subprocess.Popen[str]:
    foreign = ("SLURM_", "INTTTRAIN_", "TPU_", "MEGASCALE_", "OMPI_", "PMI", "JAX_", "RANK", "WORLD_SIZE", "MASTER_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment = clean | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", program], env={k: v for k, v in environment.items() if v}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def explicit(index: int, count: int, port: int, timeout: int = 60) -> dict[str, str]:
    return {
        "INTTTRAIN_COORDINATOR": f"127.0.0.1:{port}",
        "INTTTRAIN_NUM_PROCESSES": str(count),
        "INTTTRAIN_PROCESS_ID": str(index),
        "INTTTRAIN_INITIALIZATION_TIMEOUT_SECONDS": str(timeout),
    }


def refused(process: subprocess.Popen[str], status: int = 2) -> str:
    """The error line of a process that must end with ``status`` and without a stack trace."""
    _, text = process.communicate(timeout=60)
    assert process.returncode == status, text
    assert "Traceback" not in text and "stack trace" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    return line


def test_a_coordinator_that_is_not_there():
    port = free_port()
    line = refused(launch(**explicit(1, 2, port, timeout=2)), RESTART_STATUS)
    assert f"INTTTRAIN_COORDINATOR=127.0.0.1:{port}, where nobody answers" in line
    assert "INITIALIZATION_TIMEOUT_SECONDS=2" in line and "2 processes" in line


def test_a_peer_that_never_comes():
    port = free_port()
    line = refused(launch(**explicit(0, 2, port, timeout=2)), RESTART_STATUS)
    assert f"INTTTRAIN_COORDINATOR=127.0.0.1:{port}, which answers, so another process is missing" in line
    assert "2 processes" in line


def test_a_taken_port():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        line = refused(launch(**explicit(0, 2, port)))
    assert f"INTTTRAIN_COORDINATOR=127.0.0.1:{port}: process 0 cannot listen on port {port}" in line


def test_sigterm_still_ends_a_connected_process():
    program = PROGRAM + "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)\nprint('alive')"
    process = launch(program, **explicit(0, 1, free_port()))
    out, text = process.communicate(timeout=60)
    assert process.returncode == -15 and "alive" not in out, text


STARTED = {  # what a launcher tells two processes on this host; PORT is free
    "slurm": {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "NUMBER",
        "SLURM_LOCALID": "NUMBER", "JAX_COORDINATOR_PORT": "PORT",
    },
    "ompi": {
        "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "NUMBER", "OMPI_COMM_WORLD_LOCAL_RANK": "NUMBER", "JAX_COORDINATOR_PORT": "PORT",
    },
    "torchrun": {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "BEFORE", "WORLD_SIZE": "2", "RANK": "NUMBER",
        "LOCAL_RANK": "NUMBER", "LOCAL_WORLD_SIZE": "2",
    },
    "jax": {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:PORT", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "NUMBER",
        "JAX_LOCAL_DEVICE_IDS": "NUMBER",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", STARTED)
def test_two_processes_of_a_launcher_find_each_other(launcher):
    port = free_port()
    told = {name: value.replace("PORT", str(port)) for name, value in STARTED[launcher].items()}
    told = {name: value.replace("BEFORE", str(port - 1)) for name, value in told.items()}
    processes = [launch(**{k: v.replace("NUMBER", str(i)) for k, v in told.items()}) for i in range(2)]
    for index, process in enumerate(processes):
        out, text = process.communicate(timeout=60)
        assert process.returncode == 0, text
        assert out == f"process {index} of 2 (counted from 0), 1 local devices, 2 in all\n"


def test_alone_touches_neither_the_network_nor_a_device():
    """With the platform left open and libtpu perhaps installed: what a laptop has."""
    program = """
import socket
def refuse(*_, **__):
    raise AssertionError("used the network")
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
import jax
jax.distributed.initialize = refuse
from jax._src import xla_bridge
from intttrain.pod.distributed import start_distributed
start_distributed()
assert not xla_bridge.backends_are_initialized() and not jax.distributed.is_initialized()
"""
    process = launch(program, JAX_PLATFORMS="")
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0, text
