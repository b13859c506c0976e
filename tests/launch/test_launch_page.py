"""Every command line of docs/launch.md runs, with stand-ins for intttrain, srun and gcloud."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from intttrain.core.distributed import choose_start

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "launch.md").read_text()
LINES = re.findall(r"^ {4}(\S.*)$", PAGE, flags=re.MULTILINE)

INTTTRAIN = """#!PYTHON
import json, os, sys
names = ("INTTTRAIN_", "SLURM_", "MEGASCALE_", "TPU_")
record = {"words": sys.argv[1:], "environment": {k: v for k, v in os.environ.items() if k.startswith(names)}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(record) + "\\n")
"""
SRUN = """#!/bin/sh
[ "$1" = --ntasks=2 ] || exit 1
shift
export SLURM_JOB_ID=1 SLURM_STEP_NODELIST=node[1-2] SLURM_NTASKS=2 SLURM_LOCALID=0
SLURM_PROCID=0 "$@" && SLURM_PROCID=1 "$@"
"""


def run(line: str, folder: Path) -> tuple[str, list[dict]]:
    """Returns what a line printed, and the calls of intttrain it led to."""
    for name, text in (("intttrain", INTTTRAIN.replace("PYTHON", sys.executable)), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    record = folder / "record.jsonl"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("INTTTRAIN_", "SLURM_", "MEGASCALE_", "TPU_"))}
    environment = kept | {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(record)}
    done = subprocess.run(["bash", "-c", line], env=environment, cwd=REPO, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(text) for text in record.read_text().splitlines()] if record.exists() else []
    return done.stdout, calls


@pytest.mark.parametrize("line", LINES)
def test_command_lines_of_the_page(line, tmp_path):
    if "tpu_vm.sh" in line:
        printed, calls = run(line.replace("tpu_vm.sh", "tpu_vm.sh --dry_run"), tmp_path)
        assert "gcloud compute tpus tpu-vm ssh" in printed and not calls
        assert ("MEGASCALE_SLICE_ID=1" in printed) == ("slice-1" in line and "intttrain train" in line)
    elif "--dry_run" in line:
        printed, calls = run(line, tmp_path)
        assert printed.count("intttrain train") == 4 and not calls
    else:
        _, calls = run(line, tmp_path)
        wanted = 4 if "local.sh" in line else 2 if "srun" in line else 1
        assert [call["words"][0] for call in calls] == ["train"] * wanted
        several = line.startswith(("launch/", "srun", "INTTTRAIN_"))
        assert all((choose_start(call["environment"], "cpu") is not None) == several for call in calls)


def test_the_page_has_a_line_for_every_way():
    for part in ("launch/local.sh", "launch/tpu_vm.sh", "slice-0,slice-1", "srun", "INTTTRAIN_PROCESS_ID=1"):
        assert any(part in line for line in LINES), part
