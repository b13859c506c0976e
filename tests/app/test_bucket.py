"""Runs in a bucket: `--workdir=gs://...`, with the real client libraries and a server in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from intttrain.core import workdir as workdirs
from intttrain.core.metrics import read_metrics
from intttrain.core.workdir import make_place
from tests.app.fake_gcs import FakeGcs, served
from tests.app.small import BATCH_ROWS, NUM_STEPS, World, assert_same_state, cli, done, error_line, metrics

pytest.importorskip("gcsfs")
RUN = "gs://bucket/runs/small"
FLAG = f"--workdir={RUN}"


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


def download(gcs: FakeGcs, folder: Path, prefix: str = "runs/small/") -> Path:
    """Returns ``folder`` with what is in the bucket."""
    for name in gcs.names(prefix):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gcs.objects[prefix + name])
    return folder


def test_stopped_resumed_evaluated_generated_exported(
    gcs: FakeGcs, world: World, straight: Path, dense: Path, tmp_path: Path
) -> None:
    line = done("train", world.config, FLAG, "--stop_at_step=5").out.splitlines()[-1]
    assert line.startswith("stopped at step 5")
    assert gcs.steps("runs/small/") == [4, 5]
    # A process of its own, which knows only what is in the bucket.
    again = subprocess.run(
        [sys.executable, "-m", "intttrain", "train", world.config, FLAG],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"TMPDIR": str(tmp_path / "local"), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "resumed at step 5" in again.stderr and again.stdout.endswith(f"checkpoint in {RUN}/checkpoints\n"), again
    assert "goodput" in again.stderr and "in 2 starts" in again.stderr

    for step in (1, 2):  # results have places of their own
        out = done("eval", world.config, FLAG).out
        name = f"eval/{NUM_STEPS}" + ("" if step == 1 else "-2")
        assert f"json {RUN}/{name}/positions.json" in out
        assert {f"{name}/positions.json", f"{name}/positions.png"} <= set(gcs.names("runs/small/"))
    assert done("generate", FLAG, "--prompt=def", "--max_new_tokens=4").out.startswith("def")
    done("export", FLAG, f"--output={tmp_path / 'export'}")
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
    for step in ("", f"{NUM_STEPS}/", f"{NUM_STEPS}/params/", f"{NUM_STEPS}/info/", f"{NUM_STEPS}/training/"):
        gcs.put(f"dense/checkpoints/{step}commit_success.txt", b"")
    content = tmp_path / "twin.json"
    done("eval", world.config, f"--workdir={run}", "--dense_workdir=gs://bucket/dense", f"--json={content}")
    assert "dense" in json.dumps(json.loads(content.read_text()))
