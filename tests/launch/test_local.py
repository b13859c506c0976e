"""launch/local.sh: several real processes on this machine."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = str(REPO / "launch" / "local.sh")
USAGE = "usage: launch/local.sh [--dry_run] PROCESSES DEVICES_PER_PROCESS COMMAND..."

SUM_PROGRAM = """
import numpy as np
from intttrain.pod.distributed import describe_start, process_index, start_distributed
start_distributed()
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
print(describe_start())
mesh = Mesh(jax.devices(), ("data",))
rows_BD = np.arange(6, dtype=np.float32).reshape(2, 3) + 100 * process_index()  # a row for each local device
x_BD = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), rows_BD)
add = jax.shard_map(lambda x_bD: jax.lax.psum(x_bD, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
print("sum", x_BD.shape, jax.jit(add)(x_BD).tolist())
"""


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "INTTTRAIN_"))}
    return kept | {"PYTHONPATH": str(REPO), "XLA_FLAGS": "", **variables}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments], env=environment(**variables), text=True, capture_output=True, timeout=90
    )


def lines_of(output: str, process: int) -> list[str]:
    mark = f"[{process}] "
    return [line.removeprefix(mark) for line in output.splitlines() if line.startswith(mark)]


def test_four_processes_with_two_devices_agree_on_a_sum():
    done = run("4", "2", sys.executable, "-c", SUM_PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr
    # Column d: (d + d + 3) of each process, and 100 * (0 + 1 + 2 + 3) for each of its two rows.
    wanted = [[4.0 * (2 * d + 3) + 2 * 600 for d in range(3)]]
    for process in range(4):
        lines = lines_of(done.stdout, process)  # beside what Gloo says
        assert f"process {process} of 4 (counted from 0), 2 local devices, 8 in all" in lines
        assert f"sum (8, 3) {wanted}" in lines


def test_every_line_is_marked_and_existing_flags_are_kept():
    show = 'echo "$XLA_FLAGS" >&2; echo "$INTTTRAIN_PROCESS_ID/$INTTTRAIN_NUM_PROCESSES $1"; printf end'
    done = run("2", "3", "bash", "-c", show, "_", "a  'b' $c", XLA_FLAGS="--xla_first=1")
    assert done.returncode == 0 and done.stderr == ""
    flags = "--xla_first=1 --xla_force_host_platform_device_count=3"
    for process in range(2):
        assert lines_of(done.stdout, process) == [flags, f"{process}/2 a  'b' $c", "end"]
    assert len(done.stdout.splitlines()) == 6


def test_a_failure_ends_the_others_and_is_the_exit_status():
    program = """
case $INTTTRAIN_PROCESS_ID in
0) trap 'echo asked; exit 9' TERM ;;
1) sleep 0.5; exit 7 ;;
2) trap '' TERM ;;
esac
while :; do sleep 0.1; done
"""
    done = run("3", "1", "bash", "-c", program, GRACE_SECONDS="1")
    assert done.returncode == 7
    assert "asked" in lines_of(done.stdout, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_process_once(number):
    # Process 1 takes a second to end after process 0 has ended; it must not be asked again in that time.
    program = """
trap 'echo got; left=${INTTTRAIN_PROCESS_ID}2' INT TERM
echo ready
left=600
while [ $left -gt 0 ]; do sleep 0.1; left=$((left - 1)); done
exit 5
"""
    # A test runner in the background may ignore Ctrl-C, and a shell cannot undo that.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    running = subprocess.Popen(
        [sys.executable, "-c", heard, SCRIPT, "2", "1", "bash", "-c", program],
        env=environment(), text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    ready = [running.stdout.readline() for _ in range(2)]
    assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
    running.send_signal(number)
    out, _ = running.communicate(timeout=30)
    assert running.returncode == 5
    for process in range(2):
        assert lines_of(out, process).count("got") == 1


@pytest.mark.parametrize("group", [False, True], ids=["the script", "its group"])
def test_processes_end_with_a_script_that_is_killed(group):
    program = """
case $INTTTRAIN_PROCESS_ID in
0) trap 'echo asked; exit 143' TERM ;;
1) trap '' TERM ;;
esac
echo $$
while :; do sleep 0.1; done
"""
    running = subprocess.Popen(
        [SCRIPT, "2", "1", "bash", "-c", program], env=environment(GRACE_SECONDS="1"), text=True,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert running.stdout is not None
    numbers = [int(running.stdout.readline().split()[1]) for _ in range(2)]
    if group:
        os.killpg(running.pid, signal.SIGKILL)
    else:
        running.kill()
    said, _ = running.communicate(timeout=30)  # until the last of them has closed it
    assert running.returncode == -signal.SIGKILL and "asked" in lines_of(said, 0)
    deadline = time.monotonic() + 20
    while any(map(lives, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, numbers))


def lives(number: int) -> bool:
    """Whether a process runs; one that has ended may wait for somebody to ask for its status."""
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_dry_run_prints_commands_that_a_shell_can_run():
    done = run("--dry_run", "2", "4", "printf", "%s|", "it's", "$x y")
    assert done.returncode == 0
    for process, line in enumerate(done.stdout.splitlines()):
        words = shlex.split(line)
        assert f"INTTTRAIN_PROCESS_ID={process}" in words and "INTTTRAIN_NUM_PROCESSES=2" in words
        assert re.search(r"INTTTRAIN_COORDINATOR=127\.0\.0\.1:\d+ ", line)
        shown = subprocess.run(["bash", "-c", line], env=environment(), text=True, capture_output=True, check=True)
        assert shown.stdout == "it's|$x y|"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "0 of at least 3 arguments given"),
        (("2", "2"), "2 of at least 3 arguments given"),
        (("0", "2", "true"), "PROCESSES=0 is not a whole number from 1 to 9999"),
        (("2", "two", "true"), "DEVICES_PER_PROCESS=two is not a whole number from 1 to 9999"),
        (("2", "1", "no_such_command"), "there is no command no_such_command"),
    ],
)
def test_bad_arguments(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr == f"error: {message}; {USAGE}\n"
