"""launch/queued.sh against a cloud in a folder: slices are pre-empted, requests refused, commands end as told."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.cloud import PLACE, REPO, Cloud

SCRIPT = str(REPO / "launch" / "queued.sh")
SLICE = ("--name=a", *PLACE, "--accelerator_type=v5p-16", "--runtime_version=v2", "--python=host_python")
REQUEST = ["create", "a", *PLACE, "--accelerator-type=v5p-16", "--runtime-version=v2", "--node-id=a"]
WORKDIR = "--workdir=gs://bucket/run"
# Counts its starts on this host, and does the line of its script that has the number of the start, or the last one.
PROGRAM = """
host=$(basename "$HOME")
echo start >>"$ROOT/starts-$host"
n=$(wc -l <"$ROOT/starts-$host")
last=$(wc -l <"$ROOT/script")
eval "$(sed -n "$((n < last ? n : last))p" "$ROOT/script")"
"""


class Queue(Cloud):
    def words(self, *script: str, flags: tuple[str, ...] = ()) -> list[str]:
        (self.root / "script").write_text("".join(line + "\n" for line in script))
        return [SCRIPT, *SLICE, *flags, "--", "bash", "-c", PROGRAM, "_", WORKDIR]

    def __call__(
        self, *script: str, states: list[list[str]], flags: tuple[str, ...] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        (self.root / "states.json").write_text(json.dumps(states))
        return self.run(*self.words(*script, flags=flags), **variables)

    def calls_of(self, *actions: str) -> list[list[str]]:
        return [call[3:] for call in self.calls if call[0] == "compute" and call[3] in actions]

    @property
    def actions(self) -> list[str]:
        """What was asked of the queue, without the looks."""
        return [call[0] for call in self.calls_of("create", "delete")]

    def starts(self, host: str = "a-0") -> int:
        path = self.root / f"starts-{host}"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def queue(tmp_path: Path):
    made = Queue(tmp_path)
    made.environment |= {"POLL_SECONDS": "0.02", "ROOT": str(tmp_path)}
    yield made
    made.run("gcloud", "compute", "tpus", "queued-resources", "delete", "a", *PLACE, "--force", "--quiet")


def test_waits_installs_runs_and_leaves_the_slice(queue):
    done = queue("exit 0", states=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    assert done.returncode == 0, done.stdout + done.stderr
    assert queue.actions == ["create"] and queue.starts("a-0") == queue.starts("a-1") == 1
    assert queue.calls_of("create") == [REQUEST]
    assert re.findall(r" a: ([A-Z_]+)$", done.stdout, re.MULTILINE) == [
        "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE",
    ]  # fmt: skip
    last = done.stdout.splitlines()[-2:]
    assert "the command is done" in last[0] and "queued-resources delete a --zone=z1 --project=p1 --force" in last[1]


def test_delete_removes_the_slice_when_the_command_is_done(queue):
    done = queue("exit 0", states=[["ACTIVE"]], flags=("--delete", "--spot"))
    assert done.returncode == 0 and queue.actions == ["create", "delete"] and "cost" not in done.stdout
    assert queue.calls_of("create") == [[*REQUEST, "--spot"]]


def test_a_pre_empted_slice_is_requested_again_and_the_command_started_again(queue):
    states = [["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], ["PROVISIONING", "ACTIVE"]]
    done = queue("sleep 60", "exit 0", states=states)
    assert done.returncode == 0, done.stdout + done.stderr
    assert queue.actions == ["create", "delete", "create"] and queue.starts("a-0") == queue.starts("a-1") == 2
    assert done.stdout.count("restart 1 of 5 since step 0") == 1
    # The new hosts are empty: installed twice, started with the same words twice.
    runs = [call[-1] for call in queue.calls_of("ssh") if "set -- bash" in call[-1]]
    assert len(queue.calls_of("scp")) == 2 and len(runs) == 2 and len(set(runs)) == 1


def test_a_refused_request(queue):
    done = queue("exit 0", states=[["ACTIVE"]], REFUSED="0")
    assert done.returncode == 1 and "quota" in done.stderr and "the request was refused" in done.stdout
    assert queue.actions == ["create"]


def test_without_access_nothing_is_requested(queue):
    done = queue("exit 0", states=[["ACTIVE"]], NO_ACCESS="1")
    assert done.returncode == 1 and not queue.actions and "nothing was requested" in done.stdout
    assert "UNKNOWN, gcloud says: ERROR: PERMISSION_DENIED on project p1" in done.stdout and "cost" not in done.stdout


def test_a_refused_request_after_a_pre_emption_is_made_again(queue):
    done = queue("exit 0", states=[["SUSPENDED"], [], ["FAILED"], ["ACTIVE"]], REFUSED="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert queue.actions == ["create", "delete", "create", "create", "delete", "create"]
    assert "restart 3 of 5 since step 0" in done.stdout


@pytest.mark.parametrize("status", [2, 3])
def test_statuses_that_starting_again_cannot_help(queue, status):
    script = f'[ "$host" = a-0 ] && exit {status}; sleep 0.1; exit 143'
    done = queue(script, states=[["ACTIVE"]])
    assert done.returncode == status and queue.starts() == 1 and queue.actions == ["create"]
    assert f"ended with {status}, starting again cannot help: " in done.stdout and "tpu_vm.sh" in done.stdout


def test_other_statuses_start_the_command_again_on_the_same_slice(queue):
    done = queue("exit 143", "exit 4", "kill -KILL $$", "exit 0", states=[["ACTIVE"]])
    assert done.returncode == 0, done.stdout + done.stderr
    assert queue.actions == ["create"] and queue.starts("a-0") == queue.starts("a-1") == 4
    assert len(queue.calls_of("scp")) == 1
    assert re.findall(r"ended with status (\d+)", done.stdout) == ["143", "4", "137"]


def test_gives_up_after_restarts_without_a_newer_checkpoint(queue):
    # Starts 1 to 3 save steps 100 to 300, beside an unfinished 900; nothing is saved afterwards.
    folder = '"$ROOT"/bucket/run/checkpoints'
    saves = f"step=$((100 * (n > 3 ? 3 : n))); mkdir -p {folder}/$step/params {folder}/900/params; "
    saves += f"touch {folder}/$step/commit_success.txt {folder}/900/params/commit_success.txt; exit 1"
    done = queue(saves, states=[["ACTIVE"]], MAX_RESTARTS="2")
    assert done.returncode == 1 and queue.starts() == 5
    assert "giving up after 2 restarts without a checkpoint newer than step 300" in done.stdout
    assert done.stdout.count("restart 1 of 2 since step") == 3


def test_a_workdir_that_stands_in_a_word_of_its_own_is_found(queue):
    printed = queue.run(*queue.words("", flags=("--dry_run",))[:-1], "-workdir", "gs://b/my run").stdout
    assert ("storage", "ls", "gs://b/my run/checkpoints/*/commit_success.txt") in commands(printed)


def test_hosts_that_do_not_answer_are_replaced(queue):
    done = queue("exit 0", states=[["ACTIVE"], ["ACTIVE"]], FAIL_ON="a", MAX_RESTARTS="1")
    assert done.returncode == 1 and queue.actions == ["create", "delete", "create"]
    assert "hosts have not answered 10 times; giving up" in done.stdout


def test_hosts_that_do_not_end_with_the_others_are_killed(queue):
    done = queue('[ "$host" = a-0 ] && exit 1; sleep 60', "exit 0", states=[["ACTIVE"]])
    assert done.returncode == 0, done.stdout + done.stderr
    assert queue.starts("a-0") == queue.starts("a-1") == 2
    assert sum("kill -KILL" in call[-1] for call in queue.calls_of("ssh")) == 1


def test_an_interruption_leaves_the_run_and_the_same_call_goes_on(queue):
    (queue.root / "states.json").write_text('[["ACTIVE"]]')
    words = queue.words('while [ ! -e "$ROOT/enough" ]; do sleep 0.05; done')
    watching = subprocess.Popen(words, env=queue.environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while queue.starts("a-1") == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    watching.send_signal(signal.SIGTERM)
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == 143
    assert "no longer watched" in said and "queued-resources delete a" in said.splitlines()[-1]
    assert queue.actions == ["create"]
    (queue.root / "enough").touch()
    done = queue.run(*words)
    assert done.returncode == 0 and queue.actions == ["create"] and queue.starts() == 1


def commands(text: str) -> set[tuple[str, ...]]:
    """The commands of gcloud that a shell would read in a text."""
    words = shlex.split(text, comments=True)
    begins = [i for i, word in enumerate(words) if word in ("gcloud", "tar")] + [len(words)]
    pairs = itertools.pairwise(begins)
    return {without_folder(words[a + 1 : b]) for a, b in pairs if words[a] == "gcloud"}


def without_folder(words: list[str]) -> tuple[str, ...]:
    return tuple(re.sub(r"^/.*/(?=intttrain\.tar\.gz)", "", word) for word in words)


def test_dry_run_prints_exactly_what_is_called(queue):
    flags = ("--delete", "--reserved")
    dry = queue.run(*queue.words("exit 4", "exit 0", flags=(*flags, "--dry_run")))
    assert dry.returncode == 0 and dry.stderr == "" and not queue.calls
    done = queue("exit 4", "exit 0", states=[["ACTIVE"]], flags=flags)
    assert done.returncode == 0, done.stdout + done.stderr
    called = {without_folder(call) for call in queue.calls}
    assert called <= commands(dry.stdout)
    (other,) = commands(dry.stdout) - called
    assert "kill -KILL" in other[-1]


def test_several_slices(queue):
    printed = queue.run(*queue.words("", flags=("--slices=3", "--dry_run"))).stdout
    (create,) = (command for command in commands(printed) if "create" in command)
    assert create[-2:] == ("--node-count=3", "--node-prefix=a")
    reached = {command[4] for command in commands(printed) if "ssh" in command}
    assert reached == {"a-0", "a-1", "a-2"} and "MEGASCALE_SLICE_ID=2" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SLICE[1:], "--name is missing"),
        (SLICE[:1] + SLICE[2:], "--zone is missing"),
        (SLICE[:3] + SLICE[4:], "--accelerator_type is missing"),
        (SLICE[:4] + SLICE[5:], "--runtime_version is missing"),
        (SLICE, "there is no command after --"),
        ((*SLICE, "--"), "there is no command after --"),
        ((*SLICE, "--spot", "--reserved", "--", "x", WORKDIR), "--spot and --reserved exclude each other"),
        ((*SLICE, "--slices=0", "--", "x", WORKDIR), "--slices=0 is not a whole number from 1 to 999"),
        ((*SLICE, "--zoom=z"), "unknown argument --zoom=z"),
        ((*SLICE, "--", "intttrain", "train", "--workdir=runs/a"), "the command has no --workdir=gs://..."),
        ((*SLICE, "--", "intttrain", "train", "--workdir", "runs/a"), "the command has no --workdir=gs://..."),
        ((*SLICE, "--", "sh", "-c", "x --workdir gs://b/$N"), "--workdir=gs://b/$N is not written out"),
    ],
)
def test_bad_arguments(queue, arguments, message):
    done = queue.run(SCRIPT, *arguments)
    assert done.returncode == 2 and not queue.calls
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert "; launch/queued.sh --name=NAME" in done.stderr
