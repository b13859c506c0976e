"""Several processes of one run on this machine, started without a launcher that would end the others when one ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DEADLINE_S = 300  # for a machine that is busy with other things; reached only by a process that hangs
_FOREIGN = ("INTTTRAIN_", "JAX_", "MEGASCALE_", "SLURM_", "TPU_", "XLA_FLAGS")


class Processes:
    """Processes with one CPU device each; number 0 coordinates."""

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]):
        self._outputs = [folder / f"output-{index}" for index in range(len(commands))]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        self.all = []
        for index, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            own = {
                "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", "INTTTRAIN_COORDINATOR": f"127.0.0.1:{port}",
                "INTTTRAIN_NUM_PROCESSES": str(len(commands)), "INTTTRAIN_PROCESS_ID": str(index),
            }  # fmt: skip
            with self._outputs[index].open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, *command], env=kept | own | dict(environment), cwd=environment.get("PWD"),
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
            self.all.append(process)

    def output(self, index: int) -> str:
        """What the process printed so far."""
        return self._outputs[index].read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that the processes do while all of them run."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            for index, process in enumerate(self.all):
                assert process.poll() is None, f"process {index}: {self.output(index)[-3000:]}"
            assert time.monotonic() < end, [self.output(index)[-1000:] for index in range(len(self.all))]
            time.sleep(0.05)

    def status(self, index: int) -> int:
        """Waits for the end of one process and returns its exit status."""
        try:
            return self.all[index].wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {index} goes on: {self.output(index)[-3000:]}") from None

    def error_line(self, index: int) -> str:
        """Returns the one line after ``error:``."""
        (line,) = (line for line in self.output(index).splitlines() if line.startswith("error: "))
        return line


@contextlib.contextmanager
def processes(
    folder: Path, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]] | None = None
) -> Iterator[Processes]:
    """Starts a Python process for each command, and ends those that still run after the block."""
    running = Processes(folder, commands, environments or [{}] * len(commands))
    try:
        yield running
    finally:
        for process in running.all:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
