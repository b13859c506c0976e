"""Rows of 131,072 tokens through the whole trainer, cut over eight devices: as on one, stopped and gone on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.app.small import BATCH_ROWS, CONFIG_TEXT, NUM_STEPS, checksums
from tests.app.test_processes import REPO, losses

SEQ_LEN = 131072
CONFIG_NAME = "long.py"
FLAGS = (
    "--config.prepare.heldout_fraction=0.5", f"--config.data.seq_len={SEQ_LEN}", "--config.model.sliding_window=64",
    "--config.model.ttt.chunk_tokens=1024", "--config.model.ttt.eta=0.01", "--config.model.remat=full",
    "--config.train.batch_rows=1", "--config.train.num_steps=4", "--config.train.schedule.warmup_steps=0",
    "--config.train.checkpoint.every_steps=2", "--config.train.log_every_steps=1", "--config.mesh.fsdp=1",
    f"--config.eval.seq_len={SEQ_LEN}", f"--config.eval.min_document_tokens={SEQ_LEN}", "--config.eval.batch_rows=1",
    f"--config.eval.position_edges=(1024,8192,{SEQ_LEN})", "--config.eval.documents=1",
)  # fmt: skip


def intttrain(root: Path, command: str, *flags: str, devices: int = 8) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INTTTRAIN_")}
    environment |= {
        "PYTHONPATH": str(REPO),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(root / "jax"),
    }
    arguments = [sys.executable, "-m", "intttrain", command, f"--config={root / CONFIG_NAME}", *FLAGS, *flags]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_row_of_128k_tokens_over_eight_devices_trains_stops_and_goes_on(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for document in range(4):  # each longer than a row, so that rows are of one document
        words = np.random.default_rng(document).choice(["one ", "two ", "three ", "seven\n"], 40_000)
        (corpus / f"{document}.txt").write_text("".join(words))
    text = CONFIG_TEXT.format(root=str(tmp_path), num_steps=NUM_STEPS, batch_rows=BATCH_ROWS)
    (tmp_path / CONFIG_NAME).write_text(text)
    intttrain(tmp_path, "prepare", f"--output={tmp_path / 'data'}")

    straight, stopped, whole = (tmp_path / name for name in ("straight", "stopped", "whole"))
    intttrain(tmp_path, "train", f"--workdir={straight}", "--config.mesh.context=8")
    intttrain(tmp_path, "train", f"--workdir={stopped}", "--config.mesh.context=8", "--stop_at_step=2")
    assert "resumed at step 2" in intttrain(tmp_path, "train", f"--workdir={stopped}", "--config.mesh.context=8")
    assert checksums(straight, 4) == checksums(stopped, 4), "to the bit"

    intttrain(tmp_path, "train", f"--workdir={whole}", "--stop_at_step=2", devices=1)
    # A CPU adds the 131,072 losses of a row one after the other, in fp32. Where losses take few values its rounding is
    # always to the same side: 1.2e-4 of a sum of four values, by float64, and less in the shorter pieces of a shard.
    for step in (1, 2):
        (loss, norm), (wanted_loss, wanted_norm) = losses(straight)[step], losses(whole)[step]
        np.testing.assert_allclose(loss, wanted_loss, rtol=2e-4)
        np.testing.assert_allclose(norm, wanted_norm, rtol=2e-6)  # no such sum

    files = {devices: tmp_path / f"{devices}.json" for devices in (1, 8)}
    for devices, file in files.items():
        mesh = f"--config.mesh.context={devices}"
        intttrain(tmp_path, "eval", f"--workdir={straight}", f"--json={file}", mesh, devices=devices)
    one, eight = (json.loads(file.read_text()) for file in files.values())
    assert [bucket["end"] for bucket in one["buckets"]] == [1024, 8192, SEQ_LEN]
    for alone, cut in zip(one["buckets"], eight["buckets"], strict=True):
        assert alone["tokens"] == cut["tokens"] == alone["end"] - alone["begin"]
        for condition in ("on", "off"):
            wanted = alone["levels"][condition]["value"]
            np.testing.assert_allclose(cut["levels"][condition]["value"], wanted, rtol=1e-5)
