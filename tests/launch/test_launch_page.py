"""Every command line of docs/launch.md and docs/operations.md runs, with stand-ins for intttrain and for clusters."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from intttrain.pod.distributed import choose_start

REPO = Path(__file__).resolve().parents[2]
PAGES = {name: (REPO / "docs" / name).read_text() for name in ("launch.md", "operations.md")}
LINES = list(dict.fromkeys(re.findall(r"^ {4}(\S.*)$", "\n".join(PAGES.values()), flags=re.MULTILINE)))

INTTTRAIN = """#!PYTHON
import json, os, sys
names = ("INTTTRAIN_", "SLURM_", "MEGASCALE_", "TPU_", "OMPI_", "RANK", "WORLD_SIZE", "MASTER_")
record = {"words": sys.argv[1:], "environment": {k: v for k, v in os.environ.items() if k.startswith(names)}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(record) + "\\n")
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_JOB_ID=1 SLURM_STEP_NODELIST=node[1-2] SLURM_NTASKS=2 SLURM_LOCALID=0
SLURM_PROCID=0 "$@" && SLURM_PROCID=1 "$@"
"""
MPIRUN = """#!/bin/sh
shift 2
export "OMPI_MCA_orte_hnp_uri=1.0;tcp://10.0.0.1:1" OMPI_COMM_WORLD_SIZE=2
for rank in 0 1; do OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank "$@" || exit; done
"""
TORCHRUN = """#!/bin/sh
[ "$1 $2" = "--no-python --nproc-per-node=2" ] && shift 2 || exit 1
export MASTER_ADDR=localhost MASTER_PORT=29500 WORLD_SIZE=2
RANK=0 "$@" && RANK=1 "$@"
"""
# sbatch runs the script at once; other programs are only there.
SBATCH = """#!/bin/sh
[ "$1 $2" = "--nodes=2 --ntasks-per-node=1" ] || exit 1
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_JOB_ID=1 exec bash "$@"
"""
CLUSTER = """#!/bin/sh
echo "$(basename "$0") $*"
"""
STARTERS = {"srun": SRUN, "sbatch": SBATCH, "mpirun": MPIRUN, "torchrun": TORCHRUN}
PROGRAMS = STARTERS | dict.fromkeys(("gcloud", "kubectl", "xpk", "squeue", "scancel"), CLUSTER)


def run(line: str, folder: Path) -> tuple[str, list[dict]]:
    """Returns what a line printed, and the calls of intttrain it led to."""
    for name, text in {"intttrain": INTTTRAIN.replace("PYTHON", sys.executable), **PROGRAMS}.items():
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
def test_command_lines_of_the_pages(line, tmp_path):
    program = line.split()[0]
    if program in ("launch/tpu_vm.sh", "launch/queued.sh"):
        printed, calls = run(line.replace(".sh", ".sh --dry_run", 1), tmp_path)
        assert "gcloud compute tpus tpu-vm ssh" in printed and not calls
        assert ("MEGASCALE_SLICE_ID=1" in printed) == ("slice-1" in line and "intttrain train" in line)
        assert ("queued-resources create my-slice" in printed) == (program == "launch/queued.sh")
        assert ("$(gcloud secrets" in line) == (r"\$\(gcloud\ secrets" in printed), "the hosts have to fetch secrets"
    elif program == "launch/gke.py":
        printed, calls = run(line.replace(program, f"{sys.executable} {program} --dry_run", 1), tmp_path)
        assert not calls and ("kind: JobSet" in printed) == ("--xpk" not in line)
        assert printed.startswith("xpk workload create" if "--xpk" in line else "# kubectl apply")
    elif "--dry_run" in line:
        printed, calls = run(line, tmp_path)
        assert printed.count("intttrain train") == 4 and not calls
    elif "intttrain train" in line:
        _, calls = run(line, tmp_path)
        wanted = 4 if "local.sh" in line else 2 if program in STARTERS else 1
        assert [call["words"][0] for call in calls] == ["train"] * wanted
        several = line.startswith(("launch/", "INTTTRAIN_", *STARTERS))
        assert all((choose_start(call["environment"], "cpu") is not None) == several for call in calls)
    else:  # a line to look at or to end what another line started
        assert program in PROGRAMS and re.search(r"\b(my-slice|tiny|1234)\b", line)


def test_the_pages_have_a_line_for_every_way():
    parts = (
        "launch/local.sh", "launch/tpu_vm.sh", "slice-0,slice-1", "launch/queued.sh", "launch/gke.py", "--xpk=",
        "sbatch", "srun", "INTTTRAIN_PROCESS_ID=1",
    )  # fmt: skip
    for part in parts:
        assert any(part in line for line in LINES), part


def test_the_runbook_deletes_what_the_babysitter_says():
    words = "launch/queued.sh --dry_run --name=my-slice --zone=us-east5-a --project=my-project --accelerator_type=a"
    line = f"{words} --runtime_version=v -- intttrain train --workdir=gs://b/w"
    printed = subprocess.run(["bash", "-c", line], cwd=REPO, text=True, capture_output=True, timeout=60).stdout
    (deletes,) = (line for line in LINES if "queued-resources delete" in line)
    assert deletes in [text.strip() for text in printed.splitlines()]


def test_the_runbook_quotes_what_the_scripts_say():
    """Messages in the first column: their words stand in a script of launch/."""
    scripts = "\n".join(path.read_text() for path in (REPO / "launch").iterdir() if path.is_file())
    scripts = re.sub(r"^ *#.*$", "", scripts, flags=re.MULTILINE)
    found = 0
    for section in re.split(r"^## ", PAGES["operations.md"], flags=re.MULTILINE):
        if section.split("\n")[0] not in ("TPU VM", "Queued resources", "SLURM"):
            continue
        for cell in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE):
            for message in re.findall(r"`([^`]+)`", cell):
                for part in re.split(r"HOST|SLICE|[.]{3}|\bN\b|\d+|SUSPENDED|FAILED|WAITING_FOR_RESOURCES", message):
                    assert part.strip(" ():,;") in scripts, f"no script says {part!r} of {message!r}"
                    found += bool(part.strip(" ():,;"))
    assert found > 15


def test_compiler_flags_have_one_place():
    for script in (REPO / "launch").iterdir():
        if script.is_file():
            text = script.read_text().replace("--xla_force_host_platform_device_count", "")
            assert "LIBTPU_INIT_ARGS" not in text and "--xla_" not in text, f"{script.name}: see layout/compiler.py"
