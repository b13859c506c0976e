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

from intttrain.core import distributed
from intttrain.core.distributed import choose_start, start_distributed
from intttrain.core.errors import RESTART_STATUS, UserError

REPO = Path(__file__).resolve().parents[2]
EXPLICIT = {"INTTTRAIN_COORDINATOR": "h0:8476", "INTTTRAIN_NUM_PROCESSES": "4", "INTTTRAIN_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
PROGRAM = """
import sys
from intttrain.core.distributed import describe_start, start_distributed
from intttrain.core.errors import UserError
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
    return {"deactivate": "explicit", "slurm": "slurm", None: "tpu"}[method]


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
        (SLURM | {"SLURM_NTASKS": "1"}, None, "alone"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None, "alone"),  # a shell inside the allocation
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None, "alone"),  # the batch script itself
        (EXPLICIT, None, "explicit"),
        (EXPLICIT | SLURM | {"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", "explicit"),
        (dict.fromkeys(EXPLICIT, ""), None, "alone"),
    ],
)
def test_the_environment_decides(environment, platforms, wanted):
    assert kind(environment, platforms) == wanted


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
    foreign = ("SLURM_", "INTTTRAIN_", "TPU_", "MEGASCALE_")
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


def test_slurm_step_of_two_tasks():
    step = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }  # fmt: skip
    processes = [launch(**step, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
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
from intttrain.core.distributed import start_distributed
start_distributed()
assert not xla_bridge.backends_are_initialized() and not jax.distributed.is_initialized()
"""
    process = launch(program, JAX_PLATFORMS="")
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0, text
