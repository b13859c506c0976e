"""Kills a run at seeded moments, again and again, and compares what comes out with a run that was left alone.

    python -m tests.app.kill_study --moments=20 --processes=1
    python -m tests.app.kill_study --moments=20 --processes=2

Every moment is the kill (signal 9) of one or of all processes, some time after one of them said that it takes a batch,
saves or restores (``tests/app/marked.py``); those that live on have to end by themselves and name it, and the next
start goes on. After each, the newest complete checkpoint has to hold what the undisturbed run had at that step, and the
next start has to take that one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from intttrain.config.errors import RESTART_STATUS
from tests.app.small import BATCH_ROWS, REPO, World, checksums, make_world, metrics, steps

PHASES = ("save", "step", "restore", "save")  # of four moments in a row; there is nothing to restore at first
SLOW_S = {"save": 0.4, "step": 0.0, "restore": 0.2}
STEPS_A_MOMENT = 3  # at most
DEADLINE_S = 300.0  # for a machine that is busy with other things
HEARTBEAT_S = 30  # after 0.8 of it a process that is gone is missed at the latest
SURVIVAL_S = HEARTBEAT_S + 15.0  # of the others; they tell each other, and write their last words


@dataclasses.dataclass(frozen=True)
class Moment:
    """The kill of ``victims``, ``delay_s`` after the first of them has entered ``phase`` for the ``count``-th time."""

    phase: str
    count: int
    delay_s: float
    victims: tuple[int, ...]


def make_moments(number: int, processes: int, seed: int) -> list[Moment]:
    choose = random.Random(seed)
    moments = []
    for index in range(number):
        phase = PHASES[index % len(PHASES)]
        # The second save begins when the first is complete: there is something to restore afterwards.
        count = {"save": choose.randint(2, STEPS_A_MOMENT), "step": choose.randint(1, STEPS_A_MOMENT), "restore": 1}[
            phase
        ]
        delay_s = choose.uniform(0, SLOW_S[phase] or 0.02)
        victims = tuple(range(processes)) if choose.random() < 0.5 else (choose.randrange(processes),)
        moments.append(Moment(phase, count, delay_s, victims))
    return moments


class Run:
    """Processes that train together, each with a log; a context manager that leaves none behind."""

    def __init__(self, world: World, workdir: Path, cache: Path, processes: int, slow_s: float, flags: Sequence[str]):
        self.logs = [workdir.with_name(f"{workdir.name}-{process}.log") for process in range(processes)]
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("INTTTRAIN_", "XLA_FLAGS"))}
        keep |= {
            "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }  # fmt: skip
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            keep |= {
                "INTTTRAIN_COORDINATOR": f"127.0.0.1:{port}", "INTTTRAIN_NUM_PROCESSES": str(processes),
                "INTTTRAIN_HEARTBEAT_TIMEOUT_SECONDS": str(HEARTBEAT_S),
            }  # fmt: skip
        command = [sys.executable, "-m", "tests.app.marked", str(slow_s), "train", world.config, f"--workdir={workdir}"]
        self.processes = []
        for process, log in enumerate(self.logs):
            environment = keep | ({"INTTTRAIN_PROCESS_ID": str(process)} if processes > 1 else {})
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen([*command, *flags], stdout=output, stderr=output, env=environment, cwd=REPO)
                )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def finish(self) -> None:
        for process in self.processes:
            status = process.wait(DEADLINE_S)
            assert status == 0, f"status {status}: {self.output()[-3000:]}"

    def kill_at(self, moment: Moment) -> float:
        """Kills, and returns how many seconds the last of the others lived on."""
        first, deadline = moment.victims[0], time.monotonic() + DEADLINE_S
        while self.logs[first].read_text().count(f"MARK {moment.phase}\n") < moment.count:
            assert self.processes[first].poll() is None, f"ended before {moment}: {self.output()[-3000:]}"
            assert time.monotonic() < deadline, f"never came to {moment}"
            time.sleep(0.002)
        time.sleep(moment.delay_s)
        for victim in moment.victims:
            self.processes[victim].kill()
        began = time.monotonic()
        others = [index for index in range(len(self.processes)) if index not in moment.victims]
        for index in others:
            status = self.processes[index].wait(max(0.0, SURVIVAL_S - (time.monotonic() - began)))
            text = self.logs[index].read_text()
            assert status == RESTART_STATUS, f"process {index} ended with {status} after {moment}: {text[-3000:]}"
            (line,) = (line for line in text.splitlines() if line.startswith("error: "))
            assert re.match(rf"error: process {first} \(host .*lost", line), f"after {moment}: {line}"
        return time.monotonic() - began if others else 0.0


def where_it_was(run: Run, workdir: Path, moment: Moment) -> str:
    """Returns what the kill interrupted."""
    if any("tmp" in path.name for path in (workdir / "checkpoints").iterdir()):
        return "save"
    log = run.logs[moment.victims[0]].read_text()
    return "restore" if log.count("MARK restore\n") > log.count("MARK restored\n") else "step"


def flags_for(num_steps: int, phase: str, processes: int) -> list[str]:
    every, rows = 2 if phase == "step" else 1, max(BATCH_ROWS, processes)
    return [
        f"--config.train.num_steps={num_steps}", f"--config.train.checkpoint.every_steps={every}",
        f"--config.train.batch_rows={rows}",
    ]  # fmt: skip


def study(
    world: World, straight: Path, workdir: Path, cache: Path, moments: Sequence[Moment]
) -> Iterator[tuple[str, float]]:
    """Trains ``workdir`` through all the moments; yields what each interrupted, and how long others lived on.

    Raises:
      AssertionError: something differs from ``straight``, a run with a checkpoint of every step.
    """
    num_steps, processes = steps(straight)[-1], 1 + max(max(moment.victims) for moment in moments)
    newest, follows = 0, False
    for moment in moments:
        with Run(
            world, workdir, cache, processes, SLOW_S[moment.phase], flags_for(num_steps, moment.phase, processes)
        ) as run:
            survival_s = run.kill_at(moment)
        check_start(run, newest, follows)
        follows = True
        complete = steps(workdir)
        newest = max(complete, default=0)
        for step in complete:
            assert checksums(workdir, step) == checksums(straight, step), f"step {step} after {moment}"
        yield where_it_was(run, workdir, moment), survival_s
    with Run(world, workdir, cache, processes, 0.0, flags_for(num_steps, "save", processes)) as run:
        run.finish()
    check_start(run, newest, follows)
    assert steps(workdir)[-1] == num_steps
    assert checksums(workdir, num_steps) == checksums(straight, num_steps)
    assert metrics(workdir) == metrics(straight)


def check_start(run: Run, newest: int, follows: bool) -> None:
    """Checks that a run took the workdir and the newest checkpoint, unless it was killed before it could say so."""
    output = run.output()
    assert output.count("is gone without an end; going on in its place") == int(follows), output
    assert "warning" not in output, output
    if found := re.search(r"resumed at step (\d+)", output):
        assert int(found[1]) == newest, output
    assert not (newest and "new run" in output), output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = make_moments(arguments.moments, arguments.processes, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        world = make_world(root)
        flags = [
            *flags_for(STEPS_A_MOMENT * len(moments) + 2, "save", arguments.processes),
            "--config.train.checkpoint.keep_last=1000",
        ]
        with Run(world, root / "straight", root / "jax", arguments.processes, 0.0, flags) as run:
            run.finish()
        hit = []
        results = study(world, root / "straight", root / "killed", root / "jax", moments)
        for moment, (where, survival_s) in zip(moments, results, strict=True):
            hit.append(where)
            others = f"; the others named it and ended after {survival_s:.1f} s" if survival_s else ""
            print(f"{len(hit):3}: {moment}: interrupted a {where}{others}", flush=True)
    counts = ", ".join(f"{number} in a {where}" for where, number in collections.Counter(hit).items())
    print(f"{len(hit)} kills ({counts}): every checkpoint, the end and the metrics are those of the undisturbed run")


if __name__ == "__main__":
    main()
