"""Runs in a bucket: `--workdir=gs://...`, with the real client libraries and a server in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from intttrain.config.errors import PassingError
from intttrain.evals.run import write_into_free_folder
from intttrain.logs import workdir as workdir_module
from intttrain.logs.workdir import Workdir, make_place
from intttrain.train import Checkpoints
from tests.app.fake_gcs import FakeGcs, served
from tests.app.small import NUM_STEPS, World, assert_same_state, cli, config_of, done, error_line, metrics

pytest.importorskip("gcsfs")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeGcs]:
    with served() as gcs:
        yield gcs


@pytest.fixture
def gcs(server: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    """An empty bucket; `tmp_path / "local"` receives temporary folders, and has to be empty at the end."""
    server.clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    return server


def download(gcs: FakeGcs, folder: Path) -> Path:
    """Returns ``folder`` with what is in the bucket."""
    for name in gcs.names(gcs.prefix):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gcs.objects[gcs.prefix + name])
    return folder


@pytest.mark.slow
def test_stopped_resumed_evaluated_generated_exported(
    gcs: FakeGcs, world: World, straight: Path, dense: Path, tmp_path: Path
) -> None:
    line = done("train", world.config, f"--workdir={gcs.run}", "--stop_at_step=5").out.splitlines()[-1]
    assert line.startswith("stopped at step 5")
    assert gcs.steps() == [4, 5]
    cache = jax.config.jax_compilation_cache_dir
    # A process of its own, which knows only what is in the bucket.
    again = subprocess.run(
        [sys.executable, "-m", "intttrain", "train", world.config, f"--workdir={gcs.run}"],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"TMPDIR": str(tmp_path / "local"), "JAX_COMPILATION_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "resumed at step 5" in again.stderr and again.stdout.endswith(f"checkpoint in {gcs.run}/checkpoints\n"), (
        again
    )
    assert "goodput" in again.stderr and "in 2 starts" in again.stderr

    for step in (1, 2):  # results have places of their own
        out = done("eval", world.config, f"--workdir={gcs.run}").out
        name = f"eval/{NUM_STEPS}" + ("" if step == 1 else "-2")
        assert f"json {gcs.run}/{name}/positions.json" in out
        assert {f"{name}/positions.json", f"{name}/positions.png"} <= set(gcs.names(gcs.prefix))
    assert done("generate", f"--workdir={gcs.run}", "--prompt=def", "--max_new_tokens=4").out.startswith("def")
    done("export", f"--workdir={gcs.run}", f"--output={tmp_path / 'export'}")
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert not list((tmp_path / "local").iterdir()), "temporary folders were left"

    run = download(gcs, tmp_path / "run")
    assert_same_state(run, straight, NUM_STEPS)
    assert metrics(run) == metrics(straight)
    assert len(list((run / "tensorboard").iterdir())) == 2
    # The dense twin from a bucket, the run from a folder.
    for path in dense.rglob("*"):
        if path.is_file():
            gcs.put(f"dense/{path.relative_to(dense)}", path.read_bytes())
    content = tmp_path / "twin.json"
    done("eval", world.config, f"--workdir={run}", "--dense_workdir=gs://bucket/dense", f"--json={content}")
    assert "dense" in json.dumps(json.loads(content.read_text()))


def test_other_peoples_folders_are_refused(gcs: FakeGcs, world: World, straight: Path, tmp_path: Path) -> None:
    gcs.put(f"{gcs.prefix}notes/today.txt", b"not a run")
    line = error_line(cli("train", world.config, f"--workdir={gcs.run}"))
    assert f"--workdir={gcs.run} is not empty and holds no config.json" in line
    assert gcs.names() == [f"{gcs.prefix}notes/today.txt"]
    assert f"--workdir={gcs.run} holds no run" in error_line(cli("generate", f"--workdir={gcs.run}", "--prompt=a"))

    gcs.clear()
    gcs.put(f"{gcs.prefix}config.json", (straight / "config.json").read_bytes())
    line = error_line(cli("train", world.config, f"--workdir={gcs.run}", "--config.model.ttt.eta=0.2"))
    assert "model.ttt.eta" in line and "0.3" in line and "0.2" in line
    assert gcs.names() == [f"{gcs.prefix}config.json"]

    gcs.clear()
    line = error_line(cli("train", world.config, "--workdir=gs://elsewhere/run"))
    assert "--workdir=gs://elsewhere/run cannot be read" in line and "credentials" in line
    assert not list((tmp_path / "local").iterdir())


@pytest.mark.parametrize("failure", ["503", "no such name"])
def test_a_bucket_that_does_not_answer_is_for_launchers_to_try_again(
    failure: str, gcs: FakeGcs, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)

    gcsfs = importlib.import_module("gcsfs")
    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=sleep))
    if failure == "503":
        gcs.down = True
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.invalid")
        gcsfs.GCSFileSystem.clear_instance_cache()
    try:
        line = error_line(cli("train", world.config, f"--workdir={gcs.run}"), 4)
    finally:
        gcsfs.GCSFileSystem.clear_instance_cache()
    assert f"--workdir={gcs.run} cannot be read" in line and "credentials" not in line
    assert len(asked) >= 5 and not list((tmp_path / "local").iterdir())


def test_an_outage_of_copying_is_told_once_and_ends_with_its_status(
    gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    put, failures = workdir_module._file_system, [TimeoutError("no answer")] * 2

    def failing() -> Any:
        if failures:
            raise failures.pop()
        return put()

    monkeypatch.setattr(workdir_module, "_file_system", failing)
    with Workdir(gcs_place := epath.Path(gcs.run), (), lines.append) as workdir:
        for number in range(4):
            (workdir.folder / "metrics.jsonl").write_text(str(number))
            workdir.push_soon()
            while not (lines if number < 2 else gcs.names(gcs.prefix)):
                time.sleep(0.01)
            time.sleep(0.05)
    assert lines == [
        f"warning: {gcs_place} cannot be written (no answer); trying again",
        f"{gcs_place} can be written again; all files were copied",
    ]
    with pytest.raises(PassingError, match="are kept in .*no answer"), Workdir(gcs_place, (), lines.append) as workdir:
        (workdir.folder / "metrics.jsonl").write_text("last")
        failures.append(TimeoutError("no answer"))
    assert (workdir.folder / "metrics.jsonl").read_text() == "last"


def test_a_library_that_is_missing_is_named(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = error_line(cli("generate", f"--workdir={gcs.run}", "--prompt=a"))
    assert "gcsfs" in line and "pip install 'intttrain[gcs]'" in line


def test_training_goes_on_when_files_cannot_be_copied(gcs: FakeGcs, world: World, straight: Path) -> None:
    gcs.broken = r"\.jsonl|tensorboard"
    outcome = cli("train", world.config, f"--workdir={gcs.run}")
    line = error_line(outcome, after_other_lines=True)
    assert f"files of {gcs.run} could not be copied there and are kept in " in line and "uploads are broken" in line
    assert outcome.err.count("warning: ") == 1, "once"
    assert gcs.steps()[-1] == NUM_STEPS
    kept = Path(line.split(" are kept in ")[1].split(":")[0])
    assert metrics(kept) == metrics(straight)


def test_a_failure_of_the_run_is_the_one_to_report(gcs: FakeGcs, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(ZeroDivisionError), Workdir(make_place(gcs.run), (), lines.append) as workdir:
        (workdir.folder / "metrics.jsonl").write_text("1")
        (workdir.folder / ".part").write_text("not finished")
        gcs.broken = "metrics"
        raise ZeroDivisionError
    assert "uploads are broken" in lines[-1] and str(workdir.folder) in lines[-1]
    gcs.broken = None
    with pytest.raises(ZeroDivisionError), Workdir(make_place(gcs.run), (), lines.append) as workdir:
        (workdir.folder / "metrics.jsonl").write_text("2")
        (workdir.folder / ".part").write_text("not finished")
        raise ZeroDivisionError
    assert gcs.objects == {f"{gcs.prefix}metrics.jsonl": b"2"} and len(lines) <= 2
    assert not workdir.folder.exists()


def test_only_what_changed_is_copied_and_what_was_pulled_counts(gcs: FakeGcs) -> None:
    for name in ("metrics.jsonl", "eval/8/positions.json", "checkpoints/8/params/d/0"):
        gcs.put(f"{gcs.prefix}{name}", b"x" * 10)
    before = dict(gcs.generations)
    with Workdir(make_place(gcs.run), ("metrics.jsonl", "goodput.jsonl", "eval"), print) as workdir:
        found = sorted(str(path.relative_to(workdir.folder)) for path in workdir.folder.rglob("*") if path.is_file())
        assert found == ["eval/8/positions.json", "metrics.jsonl"]
        with (workdir.folder / "metrics.jsonl").open("a") as file:
            file.write("y")
    changed = [name for name, generation in gcs.generations.items() if before[name] != generation]
    assert changed == [f"{gcs.prefix}metrics.jsonl"] and gcs.objects[changed[0]] == b"x" * 10 + b"y"


def test_two_evaluations_at_the_same_moment_have_places_of_their_own(gcs: FakeGcs, tmp_path: Path) -> None:
    for place in (make_place(gcs.run), tmp_path / "run"):
        with Workdir(place, ("eval",), print) as one, Workdir(place, ("eval",), print) as other:
            found = [
                write_into_free_folder(workdir, workdir.folder / "eval" / "8", "positions.json", {"number": number})
                for number, workdir in enumerate((one, other))
            ]
            assert [folder.name for folder in found] == ["8", "8-2"]
            assert all((folder / "positions.json").exists() for folder in found)
        for number, folder in enumerate(found):
            assert json.loads((place / "eval" / folder.name / "positions.json").read_text()) == {"number": number}


def test_an_unfinished_checkpoint_does_not_count(gcs: FakeGcs, world: World, straight: Path) -> None:
    for path in straight.rglob("*"):
        if path.is_file() and path.relative_to(straight).parts[:2] in {("checkpoints", "4"), ("config.json",)}:
            gcs.put(f"{gcs.prefix}{path.relative_to(straight)}", path.read_bytes())
    del gcs.objects[f"{gcs.prefix}checkpoints/4/commit_success.txt"]  # what Orbax writes last
    folder, config = f"{gcs.run}/checkpoints", config_of(straight).train.checkpoint
    make_place(gcs.run)
    with Checkpoints(folder, config, read_only=True) as checkpoints:
        assert checkpoints.steps() == []  # everything is there, but not the mark
        gcs.put(f"{gcs.prefix}checkpoints/4/commit_success.txt", b"")
        for name in gcs.names(f"{gcs.prefix}checkpoints/4/"):
            gcs.put(f"{gcs.prefix}checkpoints/8/{name}", b"")
        assert checkpoints.steps() == [4, 8]  # seen by a program that looked before
    for step in (4, 8):
        del gcs.objects[f"{gcs.prefix}checkpoints/{step}/commit_success.txt"]
    assert "holds no checkpoint yet" in error_line(cli("generate", f"--workdir={gcs.run}", "--prompt=a"))
    assert "new run" in done("train", world.config, f"--workdir={gcs.run}", "--stop_at_step=1").err
    assert gcs.steps() == [1]
    assert {name.split("/")[0] for name in gcs.names(f"{gcs.prefix}checkpoints/")} == {"1"}, "a training run removes it"
