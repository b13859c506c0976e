"""launch/slurm.sh as a job of a SLURM that consists of stand-ins."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "launch" / "slurm.sh"

# Every program writes down how it is called. srun does the line of $FOLDER/script that has the number of the step, or
# the last one; scancel leaves a mark that such a line may wait for.
PROGRAM = """#!/usr/bin/env bash
name=$(basename "$0")
(printf '%s ' "$name"; printf '%q ' "$@"; echo) >>"$FOLDER/calls"
case $name in
    srun)
        n=$(grep -c '^srun' "$FOLDER/calls")
        last=$(wc -l <"$FOLDER/script")
        eval "$(sed -n "$((n < last ? n : last))p" "$FOLDER/script")"
        ;;
    scancel) touch "$FOLDER/cancelled" ;;
    squeue) echo "$STATE" ;;
esac
"""
STEP = "srun --kill-on-bad-exit=0 --wait=600 intttrain train "


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words = [str(SCRIPT), "intttrain", "train", f"--workdir={folder}/run"]
        self.environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "FOLDER": str(folder)}
        self.environment |= {"SLURM_JOB_ID": "7", "STATE": "RUNNING"}
        for name in ("srun", "scancel", "squeue", "scontrol"):
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)

    def start(self, *script: str, **variables: str) -> subprocess.Popen[str]:
        (self.folder / "script").write_text("".join(line + "\n" for line in script))
        environment = self.environment | variables
        return subprocess.Popen(self.words, env=environment, stdout=subprocess.PIPE, text=True)

    def __call__(self, *script: str, **variables: str) -> tuple[int, str]:
        """Returns the status and the output of the job."""
        job = self.start(*script, **variables)
        said, _ = job.communicate(timeout=60)
        return job.returncode, said

    @property
    def calls(self) -> list[str]:
        """Programs, in order."""
        path = self.folder / "calls"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.mark.parametrize("status", [0, 2, 3])
def test_final_statuses_end_the_job(slurm, status):
    assert slurm(f"exit {status}")[0] == status and slurm.calls == ["srun"]
    assert (slurm.folder / "calls").read_text().startswith(STEP)


def test_failures_start_the_command_again(slurm):
    status, said = slurm("exit 4", "exit 1", "kill -KILL $$", "exit 0")
    assert status == 0 and slurm.calls == ["srun"] * 4
    assert re.findall(r"ended with status (\d+)", said) == ["4", "1", "137", "0"]


def test_gives_up_after_restarts_without_a_newer_checkpoint(slurm):
    saves = 'mkdir -p "$FOLDER"/run/checkpoints/{"$((n > 3 ? 300 : 100 * n))",900.tmp}; exit 1'
    status, said = slurm(saves, MAX_RESTARTS="2")
    assert status == 1 and slurm.calls == ["srun"] * 5
    assert "giving up after 2 restarts without a checkpoint newer than step 300" in said


@pytest.mark.parametrize("flag", [("--workdir", "FOLDER/my run"), ("-workdir=FOLDER/my run",)])
def test_checkpoints_are_found_however_the_workdir_is_written(slurm, flag):
    slurm.words[3:] = [word.replace("FOLDER", str(slurm.folder)) for word in flag]
    saves = 'mkdir -p "$FOLDER/my run"/checkpoints/$((n > 2 ? 200 : 100 * n)); exit 1'
    status, said = slurm(saves, MAX_RESTARTS="1")
    assert status == 1 and slurm.calls == ["srun"] * 3
    assert "giving up after 1 restarts without a checkpoint newer than step 200" in said


GCLOUD = """#!/usr/bin/env bash
(printf 'gcloud %s|' "$@"; echo) >>"$FOLDER/calls"
[ "$*" = "storage ls gs://bucket/my run/checkpoints/*/commit_success.txt" ] || exit 1
[ -d "$FOLDER/saved" ] || { echo "ERROR: One or more URLs matched no objects." >&2 && exit 1; }
for step in "$FOLDER"/saved/*; do echo "gs://bucket/my run/checkpoints/$(basename "$step")/commit_success.txt"; done
"""


def test_checkpoints_are_found_in_a_bucket(slurm):
    (slurm.folder / "gcloud").write_text(GCLOUD)
    (slurm.folder / "gcloud").chmod(0o755)
    slurm.words[3:] = ["--workdir", "gs://bucket/my run/"]
    saves = 'mkdir -p "$FOLDER"/saved/$((n > 2 ? 200 : 100 * n)); exit 1'
    status, said = slurm(saves, MAX_RESTARTS="1")
    assert status == 1 and slurm.calls.count("srun") == 3 and "looked for" not in said
    assert "giving up after 1 restarts without a checkpoint newer than step 200" in said
    slurm.words[1:1] = ["--dry_run"]
    _, printed = slurm("")
    assert "gcloud storage ls gs://bucket/my\\ run/checkpoints/\\*/commit_success.txt" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the command has no --workdir: 1 restarts in all"),
        (["--workdir=$RUN/a"], "--workdir=$RUN/a is not written out: 1 restarts in all"),
        (["--workdir=gs://b/w"], "no checkpoints can be looked for: ERROR: no credentials"),
    ],
)
def test_says_when_it_cannot_look_for_checkpoints(slurm, flags, message):
    slurm.words[3:] = flags
    (slurm.folder / "gcloud").write_text("#!/bin/sh\necho 'WARNING: old\nERROR: no credentials' >&2; exit 1")
    (slurm.folder / "gcloud").chmod(0o755)
    status, said = slurm("exit 4", MAX_RESTARTS="1")
    assert status == 1 and slurm.calls == ["srun"] * 2 and said.count(message) == 1


def test_a_saved_run_is_queued_again(slurm):
    status, _ = slurm("exit 143")
    assert status == 0 and slurm.calls == ["srun", "squeue", "scontrol"]
    assert (slurm.folder / "calls").read_text().splitlines()[1:] == [
        "squeue --noheader --jobs=7 --format=%T ",
        "scontrol requeue 7 ",
    ]


@pytest.mark.parametrize("state", ["COMPLETING", "PREEMPTED", ""])
def test_a_job_that_slurm_ends_is_left_to_it(slurm, state):
    assert slurm("exit 143", STATE=state)[0] == 143 and slurm.calls == ["srun", "squeue"]


def test_the_signal_before_the_time_limit_reaches_the_step_once(slurm):
    job = slurm.start('while [ ! -e "$FOLDER/cancelled" ]; do sleep 0.05; done; sleep 0.5; exit 143')
    deadline = time.monotonic() + 30
    while "srun" not in slurm.calls and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    while "scancel" not in slurm.calls and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and slurm.calls == ["srun", "scancel", "squeue", "scontrol"]
    assert "scancel --signal=TERM 7" in (slurm.folder / "calls").read_text() and "ended with status 143" in said


def test_options_of_the_job():
    options = re.findall(r"^#SBATCH (--\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=B:TERM@300"} <= set(options)
    # sbatch reads them up to the first command.
    before = SCRIPT.read_text().split("set -u")[0].splitlines()
    assert all(line.startswith("#") for line in before) and sum("#SBATCH" in line for line in before) == len(options)


def test_dry_run_prints_exactly_what_is_called(slurm):
    words = [slurm.words[0], "--dry_run", *slurm.words[1:]]
    printed = subprocess.run(words, env=slurm.environment, text=True, capture_output=True, timeout=30)
    assert printed.returncode == 0 and not slurm.calls
    job = slurm.start('while [ ! -e "$FOLDER/cancelled" ]; do sleep 0.05; done; exit 143')
    while "srun" not in slurm.calls:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    lines = [line for line in printed.stdout.splitlines() if not line.startswith("#")]
    called = (slurm.folder / "calls").read_text().splitlines()
    assert [shlex.split(line) for line in lines] == [shlex.split(line) for line in called]


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "there is no command"),
        (["--dry_run"], {}, "there is no command"),
        (["true"], {"SLURM_JOB_ID": ""}, "this is not a job of SLURM"),
        (["true"], {"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many is not a whole number from 0 to 9999"),
    ],
)
def test_bad_arguments(slurm, words, variables, message):
    environment = slurm.environment | variables
    done = subprocess.run([str(SCRIPT), *words], env=environment, text=True, capture_output=True, timeout=30)
    assert done.returncode == 2 and not slurm.calls
    assert done.stderr.startswith(f"error: {message}; sbatch [OPTION...]") and done.stderr.count("\n") == 1
