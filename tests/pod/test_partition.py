"""Two hosts of which one loses its network: network namespaces with a cable between them, where one may make them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from intttrain.config.errors import RESTART_STATUS
from tests.processes import DEADLINE_S, REPO

WATCHED = str(Path(__file__).parent / "watched.py")
HOSTS = "127.0.0.1 localhost\n10.77.0.1 first\n10.77.0.2 second\n"
NAMES = ("first", "second")
HEARTBEAT_S = 20
OWN = ("unshare", "--net", "--mount", "--uts")


def may_unshare() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None or shutil.which("nsenter") is None:
        return False
    probe = "ip link add a-probe type veth peer name b-probe && mount --bind /etc/hosts /etc/hosts && hostname probe"
    return subprocess.run([*OWN, "sh", "-c", probe], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not may_unshare(), reason="network namespaces cannot be made here")


class Hosts:
    """Two processes, each on a host of its own as far as it can tell."""

    def __init__(self, folder: Path) -> None:
        self.logs = [folder / name for name in NAMES]
        (folder / "hosts").write_text(HOSTS)
        self._connected = folder / "connected"
        self.all = [self._start(folder, index) for index in range(2)]

    def _start(self, folder: Path, index: int) -> subprocess.Popen[bytes]:
        script = (
            'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && ip link set lo up && '
            'while [ ! -e "$2/connected" ]; do sleep 0.1; done; shift 2; exec "$@"'
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("INTTTRAIN_")} | {
            "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", "INTTTRAIN_COORDINATOR": "10.77.0.1:8476",
            "INTTTRAIN_NUM_PROCESSES": "2", "INTTTRAIN_PROCESS_ID": str(index),
            "INTTTRAIN_HEARTBEAT_TIMEOUT_SECONDS": str(HEARTBEAT_S),
        }  # fmt: skip
        command = [*OWN, "sh", "-c", script, "sh", NAMES[index], str(folder), sys.executable, WATCHED, "600", "0"]
        with self.logs[index].open("w") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def connect(self) -> None:
        """Puts the ends of a new cable into the hosts."""
        cable = [f"it{os.getpid()}-{index}" for index in range(2)]
        here = os.readlink("/proc/self/ns/net")
        while any(os.readlink(f"/proc/{process.pid}/ns/net") == here for process in self.all):
            time.sleep(0.05)
        subprocess.run(["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]], check=True)
        for index, process in enumerate(self.all):
            subprocess.run(["ip", "link", "set", cable[index], "netns", str(process.pid)], check=True)
            self.inside(index, "link", "set", cable[index], "name", "cable")
            self.inside(index, "addr", "add", f"10.77.0.{index + 1}/24", "dev", "cable")
            self.inside(index, "link", "set", "cable", "up")
        self._connected.touch()

    def inside(self, index: int, *arguments: str) -> None:
        """Runs ``ip`` on a host."""
        subprocess.run(["nsenter", "--net", f"--target={self.all[index].pid}", "ip", *arguments], check=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    try:
        hosts.connect()
        yield hosts
    finally:
        for process in hosts.all:
            process.kill()
            process.wait()


def test_both_sides_of_a_network_that_is_gone_end_and_name_each_other(hosts: Hosts) -> None:
    """No connection is closed, so nothing fails: what is left is that nobody hears from the other."""
    end = time.monotonic() + DEADLINE_S
    while "finished 5\n" not in hosts.logs[0].read_text():
        assert time.monotonic() < end, [log.read_text() for log in hosts.logs]
        time.sleep(0.1)
    hosts.inside(1, "link", "set", "cable", "down")
    statuses = [process.wait(DEADLINE_S) for process in hosts.all]
    outputs = [log.read_text() for log in hosts.logs]
    assert statuses == [RESTART_STATUS] * 2, outputs
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, outputs
    assert lines[0].startswith("error: process 1 (host second) was lost after step ")
    assert lines[1].startswith("error: process 0 (host first) has not answered for ")
    assert "stack trace" not in "".join(outputs), "nobody is aborted by JAX"
