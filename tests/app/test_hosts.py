"""Training in two processes of which one differs, is asked to stop, or is killed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from pathlib import Path

import jax
import pytest

from intttrain.config.errors import RESTART_STATUS
from intttrain.logs.metrics import METRICS_FILE, read_metrics
from intttrain.pod.step_times import STEP_TIMES_FILE
from tests.app.small import World, steps
from tests.processes import REPO, processes

HOST = socket.gethostname()
UNSHARED = """
import sys
from intttrain.app import cli, hosts
hosts.SHARED_WAIT_S = 1.0
sys.exit(cli.run(sys.argv[1:]))
"""


def command(world: World, workdir: Path, *flags: str) -> list[str]:
    return ["-m", "intttrain", "train", world.dense_config, f"--workdir={workdir}", *flags]


def test_hosts_that_differ_are_refused_before_anything_is_compiled(world: World, tmp_path: Path) -> None:
    """One process has another configuration and another store under the same name, one another program."""
    other_code, other_store = tmp_path / "code", tmp_path / "other"
    shutil.copytree(REPO / "intttrain", other_code / "intttrain", ignore=shutil.ignore_patterns("__pycache__"))
    with (other_code / "intttrain" / "ttt" / "api.py").open("a") as file:
        file.write("# an edit on one host only\n")
    for folder, content in ((tmp_path / "here", "train"), (other_store, "heldout")):
        shutil.copytree(world.root / "data" / content, folder / "store")
    workdir = tmp_path / "run"
    same = ("--config.data.train=({'path': 'store', 'weight': 1.0},)", "--config.data.heldout=None")
    commands = [command(world, workdir, *same)] * 3
    commands[1] = [*commands[1], "--config.train.num_steps=11"]
    places = [str(tmp_path / "here"), str(other_store), str(tmp_path / "here")]
    environments: list[dict[str, str]] = [{"PWD": place, "JAX_LOG_COMPILES": "1"} for place in places]
    environments[2]["PYTHONPATH"] = str(other_code)
    with processes(tmp_path, commands, environments) as run:
        assert [run.status(index) for index in range(3)] == [2, 2, 2], [run.output(index) for index in range(3)]
        lines = {run.error_line(index) for index in range(3)}
        outputs = [run.output(index) for index in range(3)]
    (line,) = lines
    first, second, third = (rf"process {index} \(host {HOST}\)" for index in range(3))
    print_ = "[0-9a-f]{12}"
    assert line.startswith("error: the processes do not agree: ")
    assert re.search(rf"train\.num_steps is 11 in {second} but 10 in {first}", line), line
    assert re.search(rf"the token store store is ({print_}) in {second} but (?!\1){print_} in {first}", line), line
    assert re.search(rf"the code of intttrain is ({print_}) in {third} but (?!\1){print_} in {first}", line), line
    assert not any("Compiling" in output for output in outputs) and not workdir.exists()


def test_a_workdir_that_is_not_shared_is_refused(world: World, tmp_path: Path) -> None:
    """Each process has a folder of its own under the same name, as on hosts without a common disk."""
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    commands = [["-c", UNSHARED, *command(world, Path("run"))[2:]]] * 2
    with processes(tmp_path, commands, [{"PWD": str(place)} for place in places]) as run:
        assert [run.status(0), run.status(1)] == [2, 2], run.output(1)
        assert run.error_line(0) == run.error_line(1)
        line = run.error_line(0)
    assert line.startswith(f"error: --workdir=run on process 1 (host {HOST}) is not that of process 0"), line
    assert not (places[1] / "run").exists()
    assert sorted(path.name for path in (places[0] / "run").iterdir()) == ["config.json", "lease", "run_id"]


def test_a_workdir_that_cannot_be_made_ends_all_with_the_same_line(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with processes(tmp_path, [command(world, tmp_path / "file" / "run")] * 2) as run:
        assert [run.status(0), run.status(1)] == [2, 2], run.output(1)
        assert run.error_line(0) == run.error_line(1) == f"error: Not a directory: {tmp_path / 'file' / 'run'}"


@pytest.mark.slow
def test_one_process_is_slow_then_asked_to_stop_and_later_killed(world: World, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    flags = ("--config.train.num_steps=1000000", "--config.train.checkpoint.every_steps=1000000")
    commands = [command(world, workdir, *flags)] * 2
    slow = [commands[0], ["-m", "tests.app.slow_reader", "0.3", *commands[1][2:]]]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }

    def logged() -> int:
        metrics = workdir / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    with processes(tmp_path, slow, [cache] * 2) as run:
        run.wait_until(lambda: logged() > 6)
        run.all[1].send_signal(signal.SIGTERM)
        assert [run.status(0), run.status(1)] == [128 + signal.SIGTERM] * 2, run.output(1)
        (stopped,) = steps(workdir)
        assert f"stopped at step {stopped} of" in run.output(0)
        assert stopped > 6
    assert read_metrics(workdir / METRICS_FILE)[-1]["hosts/slowest"] == 1
    times = json.loads((workdir / STEP_TIMES_FILE).read_text())
    assert times["1"]["own"]["median"] > 0.25 > times["0"]["own"]["median"]

    with processes(tmp_path, commands, [cache] * 2) as run:
        run.wait_until(lambda: logged() > stopped + 3)
        assert f"resumed at step {stopped}" in run.output(0)
        run.all[1].send_signal(signal.SIGKILL)
        assert run.status(0) == RESTART_STATUS, run.output(0)
        line, output = run.error_line(0), run.output(0)
    found = re.match(rf"error: process 1 \(host {HOST}\) was lost after step (\d+); start the same command", line)
    assert found is not None and int(found[1]) >= stopped, line
    assert "Traceback" not in output
    assert steps(workdir) == [stopped]
