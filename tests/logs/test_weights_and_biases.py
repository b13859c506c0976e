"""The real `wandb` package against a server in this process that answers, refuses, is silent, and goes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.logs.fake_wandb import FakeWandbServer, served

pytest.importorskip("wandb")

REPO = Path(__file__).resolve().parents[2]

# What a run does, with short time-outs; it waits for a line between its records.
PROGRAM = """
    import os, pathlib, signal, subprocess, sys
    from intttrain.logs import weights_and_biases
    from intttrain.config.errors import UserError
    from intttrain.logs.side_channels import SideChannel
    from intttrain.logs.weights_and_biases import WandbRun, start_wandb

    weights_and_biases.INIT_TIMEOUT_S = weights_and_biases.FINISH_TIMEOUT_S = 3.0

    def report(line):
        print("REPORT", line, flush=True)

    run = WandbRun("project", "name", "0123456789abcdef", {"model.ttt.eta": 0.3, "train.stages": []})
    try:
        entry = start_wandb(run, pathlib.Path(sys.argv[1]), report)
    except UserError as error:
        report(f"refused: {error}")
        sys.exit(2)
    if entry is not None:
        channel = SideChannel("Weights & Biases", entry, report)
        channel.write(1, {"loss": 2.0, "grad_norm": float("nan")})
        print("STARTED", flush=True)
        if sys.stdin.readline().strip() == "kill":
            children = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for child in children:  # wandb's own process
                os.kill(int(child), signal.SIGKILL)
                os.waitpid(int(child), 0)
        channel.write(2, {"loss": 1.0})
        channel.close()
    print("saved", flush=True)
"""


class Run:
    """The program above, up to its first record."""

    def __init__(self, server: FakeWandbServer, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | server.environment | {"PYTHONPATH": str(REPO)},
        )  # fmt: skip

    def wait_for_start(self) -> None:
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if line == "STARTED\n":
                return
        pytest.fail("".join(seen))

    def end(self, line: str = "") -> tuple[int, str]:
        """Lets it go on and returns its status and what it printed."""
        out, _ = self.process.communicate(f"{line}\n", timeout=120)
        return self.process.returncode, out


def test_an_entry_has_id_configuration_and_records_and_nobody_else_is_asked(tmp_path: Path) -> None:
    with served() as server:
        status, out = Run(server, tmp_path).end()
    assert status == 0 and out.endswith("saved\n") and "REPORT" not in out, out
    entry = server.entries[0]
    assert (entry["name"], entry["displayName"], entry["project"]) == ("0123456789abcdef", "name", "project")
    assert json.loads(entry["config"])["model.ttt.eta"]["value"] == 0.3
    records = [{key: value for key, value in record.items() if not key.startswith("_")} for record in server.history]
    assert records == [{"loss": 2.0}, {"loss": 1.0}] and server.foreign == []
    assert [record["_step"] for record in server.history] == [1, 2]


@pytest.mark.parametrize(("failure", "refused"), [(0, False), (401, True)])
def test_a_service_that_is_silent_or_refuses_at_the_start(failure: int, refused: bool, tmp_path: Path) -> None:
    with served() as server:
        server.failure = failure
        status, out = Run(server, tmp_path).end()
    assert "Traceback" not in out and server.foreign == [], out
    if refused:
        assert status == 2 and "REPORT refused: train.wandb_project='project': Weights & Biases does not start" in out
        assert f"error {failure}" in out and "wandb login" in out
    else:
        assert status == 0 and "saved\n" in out, out
        assert out.count("REPORT") == 1 and "does not start" in out and "WANDB_MODE=offline keeps it" in out


@pytest.mark.parametrize("who", ["server", "process"])
def test_what_goes_away_in_the_middle_ends_nothing(who: str, tmp_path: Path) -> None:
    """The server, or wandb's own process."""
    with served() as server:
        run = Run(server, tmp_path)
        run.wait_for_start()
        server.failure = 0
        status, out = run.end("kill" if who == "process" else "")
    assert status == 0 and "saved\n" in out, out
    assert "REPORT warning: Weights & Biases " in out if who == "process" else "REPORT" not in out, out
