"""launch/tpu_vm.sh against a cloud in a folder."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.launch.cloud import PLACE, REPO, Cloud

SCRIPT = str(REPO / "launch" / "tpu_vm.sh")
QUEUED = ("--accelerator_type=v5p-16", "--runtime_version=v2-alpha-tpuv5")


class Slices(Cloud):
    def __call__(self, *arguments: str, names: str = "a", **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(SCRIPT, f"--name={names}", *PLACE, *arguments, **variables)


@pytest.fixture
def cloud(tmp_path: Path) -> Slices:
    made = Slices(tmp_path)
    for name in ("a-0", "a-1", "b-0", "b-1"):
        made.host(name)
    return made


def text_once_there(path: Path, wanted: str = "") -> str:
    """The text of a file that a program in the background is about to write."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and wanted in (text := path.read_text()) and text:
            return text
        time.sleep(0.05)
    pytest.fail(f"{path} was not written")


AWKWARD = ["two words", "it's", 'say "hi"', "$HOME `date` $(date)", "a\\b", "*", "line\nbreak", "", "é;&|>x"]


def test_arguments_arrive_unchanged_on_every_host(cloud):
    program = "import json, os, sys; print(json.dumps([sys.argv[1:], os.path.basename(os.getcwd())]))"
    done = cloud("--", sys.executable, "-c", program, *AWKWARD)
    assert done.returncode == 0, done.stderr
    for host in ("a-0", "a-1"):
        assert text_once_there(cloud.host(host) / "run.status") == "0\n"
        assert json.loads((cloud.host(host) / "run.log").read_text()) == [AWKWARD, "intttrain"]
    assert len(cloud.calls) == 1
    assert "say" not in done.stdout + done.stderr, "arguments may hold secrets"


def test_start_status_stop_logs(cloud):
    assert cloud("--status").stdout.count(": not started") == 2
    program = 'trap "echo saved; exit 143" TERM; echo training; while :; do sleep 0.1; done'
    assert cloud("--", "bash", "-c", program).stdout.count(": started, number ") == 2
    for host in ("a-0", "a-1"):
        text_once_there(cloud.host(host) / "run.log", "training")
    assert cloud("--status").stdout.count(": running, number ") == 2
    again = cloud("--", "true")
    assert again.returncode == 1 and "already running" in again.stderr and "error: failed on a" in again.stderr
    assert cloud("--stop").stdout.count(": asked to stop") == 2
    for host in ("a-0", "a-1"):
        text_once_there(cloud.host(host) / "run.status")
    assert cloud("--status").stdout.count(": ended with status 143") == 2
    assert cloud("--logs").stdout.count(": saved") == 2
    assert cloud("--stop").stdout.count(": not running") == 2
    assert cloud("--", "true").returncode == 0


def test_kill_ends_what_does_not_listen(cloud):
    assert cloud("--", "bash", "-c", 'trap "" TERM; echo deaf; for i in {1..600}; do sleep 0.1; done').returncode == 0
    for host in ("a-0", "a-1"):
        text_once_there(cloud.host(host) / "run.log", "deaf")
    assert cloud("--stop").stdout.count(": asked to stop") == 2
    assert cloud("--status").stdout.count(": running, number ") == 2
    assert cloud("--kill").stdout.count(": killed") == 2
    deadline = time.monotonic() + 20
    while (said := cloud("--status").stdout).count(": ended without a status") < 2:
        assert time.monotonic() < deadline, said
    assert cloud("--kill").stdout.count(": not running") == 2


def test_hosts_without_an_installation(cloud):
    for action in ("--status", "--logs", "--stop", "--kill"):
        assert cloud(action, names="new").stdout.count(": not started") == 2
    assert cloud("--", "true", names="new").returncode == 1


def test_slices_are_told_about_each_other(cloud):
    program = 'echo "$MEGASCALE_COORDINATOR_ADDRESS $MEGASCALE_NUM_SLICES $MEGASCALE_SLICE_ID"'
    done = cloud("--", "bash", "-c", program, names="a,b")
    assert done.returncode == 0, done.stderr
    assert [call[3:5] for call in cloud.calls] == [["describe", "a"], ["ssh", "a"], ["ssh", "b"]]
    for index, host in enumerate(("a-0", "a-1", "b-0", "b-1")):
        assert text_once_there(cloud.host(host) / "run.log") == f"10.0.0.7 2 {index // 2}\n"


def test_one_slice_is_told_nothing(cloud):
    assert cloud("--", "bash", "-c", 'echo "slices: ${MEGASCALE_NUM_SLICES-none}"').returncode == 0
    assert text_once_there(cloud.host("a-1") / "run.log") == "slices: none\n"


def test_install_copies_the_checkout_and_installs_the_tpu_extra(cloud):
    done = cloud("--python=host_python", "--install", names="a,b")
    assert done.returncode == 0, done.stderr
    for host in ("a-0", "a-1", "b-0", "b-1"):
        folder = cloud.host(host)
        assert (folder / "intttrain" / "pod" / "distributed.py").exists() and (folder / "configs").is_dir()
        assert (folder / "installed").read_text() == "-m pip install --quiet --upgrade -c constraints.txt .[tpu,gcs]\n"
        assert not (folder.parent / "intttrain.tar.gz").exists()


def test_the_archive_is_enough_to_build_the_package(cloud):
    done = cloud("--install", "--dry_run")
    (tar,) = (shlex.split(line) for line in done.stdout.splitlines() if line.startswith("tar "))
    archive = cloud.root / "x.tar.gz"
    tar[tar.index("-czf") + 1] = str(archive)
    subprocess.run(tar, check=True)
    with tarfile.open(archive) as opened:
        names = set(opened.getnames())
    wanted = {"pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE", "configs", "launch/tpu_vm.sh"}
    assert wanted | {"intttrain/__init__.py"} <= names
    assert not any("__pycache__" in name for name in names)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("tpu_vm.sh", ("--install",)), ("queued.sh", (*QUEUED, "--", "true", "--workdir=gs://b/run"))],
)
def test_launchers_that_install_are_used_from_a_checkout(cloud, tmp_path, name, arguments):
    """`intttrain init` copies them to places where there is nothing to install."""
    script = tmp_path / "launch" / name
    shutil.copytree(REPO / "launch", script.parent)
    for dry_run in ((), ("--dry_run",)):
        done = cloud.run(str(script), "--name=a", *PLACE, *dry_run, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"checkout of intttrain, and {tmp_path} is none; use the launchers of a checkout" in done.stderr
    assert cloud.calls == []
    if name == "tpu_vm.sh":  # what needs no checkout works
        assert cloud.run(str(script), "--name=a", *PLACE, "--status").stdout.count(": not started") == 2


def test_an_unreachable_slice_ends_with_its_name(cloud):
    done = cloud("--", "true", names="b,a", FAIL_ON="a")
    assert done.returncode == 1
    assert "cannot reach a" in done.stderr and "error: failed on a, see above" in done.stderr
    assert cloud("--install", "--python=host_python", FAIL_ON="a").returncode != 0


def test_dry_run_runs_nothing_and_prints_what_would(cloud):
    for action in (["--install"], ["--status"], ["--logs"], ["--stop"], ["--", "echo", "it's $x"]):
        done = cloud("--dry_run", *action, names="a,b")
        assert done.returncode == 0 and done.stderr == ""
        assert {"gcloud", "a", "b"} <= {word.split(":")[0] for word in shlex.split(done.stdout)}
    assert cloud.calls == []
    # The printed command does what the script would have done.
    printed = cloud("--dry_run", "--", "echo", "it's $x").stdout
    subprocess.run(["sh", "-c", printed], env=cloud.environment, check=True, capture_output=True)
    assert text_once_there(cloud.host("a-0") / "run.log") == "it's $x\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--zone=z", "--status"), "--name is missing"),
        (("--name=a", "--status"), "--zone is missing"),
        (("--name=a", "--zone=z"), "there is nothing to do"),
        (("--name=a", "--zone=z", "--"), "there is no command after --"),
        (("--name=a", "--zone=z", "--status", "--stop"), "two actions, --status and --stop"),
        (("--name=a", "--zoom=z"), "unknown argument --zoom=z"),
    ],
)
def test_bad_arguments(arguments, message):
    done = subprocess.run([SCRIPT, *arguments], text=True, capture_output=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}; launch/tpu_vm.sh --name=") and done.stderr.count("\n") == 1
