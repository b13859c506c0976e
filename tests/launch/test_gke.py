"""launch/gke.py: manifests against the API's own models and the table of chips, kubectl and xpk as stand-ins."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from intttrain.layout.hardware import CHIPS
from intttrain.planner.topology import describe_topology

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "launch" / "gke.py"
COMMAND = ("--", "intttrain", "train", "--config=configs/tiny.py", "--workdir=gs://bucket/it's a")
NEEDED = ("--name=run", "--tpu=v5p:2x2x2", "--image=gcr.io/p/i:1")
EVERYTHING = (
    *NEEDED, "--slices=2", "--spot", "--namespace=team", "--service_account=writer", "--queue=low", "--env=A=b=c",
    "--env=EMPTY=", "--secret=WANDB_API_KEY=wandb/key", "--max_restarts=3",
)  # fmt: skip


def load():
    spec = importlib.util.spec_from_file_location("gke", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gke = load()


def manifest(*arguments: str) -> dict[str, Any]:
    return gke.manifest(gke.parse([*arguments, *COMMAND]))


def job_and_pod(made: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return job, job["template"]["spec"]


def after_the_models(made: dict[str, Any]) -> dict[str, Any]:
    """The manifest as the generated models of the API keep it: fields they do not know are gone, types are checked."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api (the dev extra)")
    return models.JobsetV1alpha2JobSet.from_dict(made).to_dict()


@pytest.mark.parametrize("arguments", [NEEDED, EVERYTHING], ids=["needed", "everything"])
def test_the_manifest_is_one_of_the_api(arguments):
    made = manifest(*arguments)
    assert after_the_models(made) == made
    assert made["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and made["kind"] == "JobSet"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.failurePolicy.maxRestart", 3),
        ("spec.failurePolicy.maxRestarts", "3"),
        ("spec.replicatedJobs.0.template.spec.parallelism", "2"),
        ("spec.replicatedJobs.0.template.podFailurePolicy", {"rules": []}),
        ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelectors", {}),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.env.0.valueFrom", {"secretRef": {}}),
    ],
)
def test_the_check_against_the_api_can_fail(path, value):
    made = copy.deepcopy(manifest(*EVERYTHING))
    *parents, last = path.split(".")
    place: Any = made
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    with pytest.raises((AssertionError, ValueError)):
        assert after_the_models(made) == made


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize(
    "name", ["v4:2x2x4", "v5p:2x2x1", "v5p:4x4x8", "v5e:4x8", "v6e:16x16", "tpu7x:4x4x4", "v5p-128"]
)
def test_pods_and_chips_are_those_of_the_topology(name, slices):
    tpu = describe_topology(name, slices)
    made = manifest("--name=run", f"--tpu={name}", "--image=i", f"--slices={slices}")
    job, pod = job_and_pod(made)
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": "4"}
    assert made["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert job["parallelism"] == job["completions"]
    assert slices * job["parallelism"] * int(resources["limits"]["google.com/tpu"]) == tpu.chips
    lengths = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert len(lengths) == tpu.chip.torus_dims and math.prod(map(int, lengths)) * slices == tpu.chips
    assert pod.get("hostNetwork", False) == (slices > 1)


def test_every_chip_has_its_label():
    assert gke.ACCELERATORS.keys() == CHIPS.keys()


def test_what_starts_again_and_what_does_not():
    made = manifest(*EVERYTHING)
    job, pod = job_and_pod(made)
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 3
    for failure in job["podFailurePolicy"]["rules"]:
        assert failure["action"] == "FailJob"
        assert failure.get("onExitCodes", {}).get("containerName", pod["containers"][0]["name"]) == "intttrain"
    # One pod alone is never started again, and a save has time to finish.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 300


def test_the_command_and_variables_arrive_and_secrets_stay_where_they_are():
    _, pod = job_and_pod(manifest(*EVERYTHING))
    (container,) = pod["containers"]
    assert container["command"] == list(COMMAND[1:])
    assert container["env"] == [
        {"name": "A", "value": "b=c"},
        {"name": "EMPTY", "value": ""},
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}},
    ]


KUBECTL = """#!/bin/sh
printf '%s\\n' "$@" >"$FOLDER/words"
cat >"$FOLDER/input"
echo "jobset.jobset.x-k8s.io/run created"
exit "${STATUS:-0}"
"""


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    for name in ("kubectl", "xpk"):
        (folder / name).write_text(KUBECTL)
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = os.environ | {"PATH": path, "FOLDER": str(folder), "PYTHONPATH": str(REPO)} | variables
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)


def test_kubectl_is_given_what_the_dry_run_prints(tmp_path):
    dry = run(tmp_path, *EVERYTHING, "--dry_run", *COMMAND)
    assert dry.returncode == 0 and not (tmp_path / "words").exists()
    first, rest = dry.stdout.split("\n", 1)
    assert first == "# kubectl apply -f -" and yaml.safe_load(rest) == manifest(*EVERYTHING)
    assert run(tmp_path, *EVERYTHING, *COMMAND).returncode == 0
    assert (tmp_path / "words").read_text().split() == ["apply", "-f", "-"]
    assert (tmp_path / "input").read_text() == rest
    assert run(tmp_path, *NEEDED, *COMMAND, STATUS="7").returncode == 7


def test_xpk_is_given_the_same_workload(tmp_path):
    arguments = ("--name=run", "--tpu=v5e:8x8", "--slices=2", "--image=i", "--spot", "--env=A=b", "--xpk=c1")
    assert run(tmp_path, *arguments, *COMMAND).returncode == 0
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:2] == ["workload", "create"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[2:] if "=" in word)
    codes = flags.pop("restart-on-exit-codes")
    assert flags == {
        "cluster": "c1", "workload": "run", "tpu-type": "v5litepod-64", "num-slices": "2", "docker-image": "i",
        "command": "intttrain train --config=configs/tiny.py '--workdir=gs://bucket/it'\"'\"'s a'",
        "max-restarts": "20", "termination-grace-period-seconds": "600", "env": "A=b",
    }  # fmt: skip
    assert words[-1] == "--spot" and codes == "1,4-126"


@pytest.mark.parametrize("name", ["v4:4x4x8", "v5p:2x2x1", "v5e:16x16", "v6e:8x8", "tpu7x:4x4x4"])
def test_names_of_xpk_are_read_back(name):
    words = gke.xpk_command(gke.parse(["--name=r", f"--tpu={name}", "--image=i", "--xpk=c", *COMMAND]))
    (given,) = (word.partition("=")[2] for word in words if word.startswith("--tpu-type="))
    assert describe_topology(given).name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*NEEDED[1:], *COMMAND), "the following arguments are required: --name"),
        ((*NEEDED, "--zoom=1", *COMMAND), "unrecognized arguments: --zoom=1"),
        ((*NEEDED, "--slices=x", *COMMAND), "argument --slices: invalid int value"),
        ((*NEEDED, "--slices=0", *COMMAND), "slices=0 has to be at least 1"),
        ((*NEEDED, "--max_restarts=-1", *COMMAND), "--max_restarts=-1 has to be at least 0"),
        (NEEDED, "there is no command after --"),
        ((*NEEDED, "--", "intttrain", "train", "--workdir=runs/a"), "--workdir=runs/a is lost with its container"),
        ((*NEEDED, "--", "intttrain", "train", "--workdir", "runs/a b"), "--workdir=runs/a b is lost with its"),
        ((*NEEDED, "--", "sh", "-c", "intttrain train -workdir 'runs/a'"), "--workdir=runs/a is lost with its"),
        ((*NEEDED, "--", "intttrain", "train", "--config=a"), "the command has no --workdir; name a bucket"),
        (("--name=run", "--tpu=v5q:2x2x2", "--image=i", *COMMAND), "topology 'v5q:2x2x2'"),
        (("--name=Run", *NEEDED[1:], *COMMAND), "--name=Run has to be at most 47 small letters"),
        (("--name=" + 48 * "a", *NEEDED[1:], *COMMAND), f"--name={48 * 'a'} has to be at most 47"),
        ((*NEEDED, "--env=1A=b", *COMMAND), "--env=1A has to be NAME=VALUE"),
        ((*NEEDED, "--env=WANDB_API_KEY=hush", *COMMAND), "--env=WANDB_API_KEY=... would be stored readably"),
        *(
            ((*NEEDED, f"--env={name}=hush", *COMMAND), f"--env={name}=... would be stored readably; use --secret=")
            for name in ("hf_token", "AWS_CREDENTIALS", "DB_PASSWD", "Proxy_Auth", "passphrase", "SSH_PRIVATE")
        ),
        *(
            ((*NEEDED, f"--env=A={value}hush", *COMMAND), "--env=A=... would be stored readably; use --secret=A=")
            for value in ("hf_" + 30 * "a", "sk-proj-" + 30 * "a", "ghp_" + 30 * "a")
        ),
        ((*NEEDED, "--env=A=AKIA" + 16 * "Q", "--xpk=c", *COMMAND), "--env=A=... would be stored readably"),
        ((*NEEDED, "--", "env", "hf_token=hush", *COMMAND[1:]), "hf_token=... in the command would be stored readably"),
        ((*NEEDED, *COMMAND, "--x=hf_" + 30 * "a"), "a word of the command would be stored readably"),
        ((*NEEDED, "--secret=WANDB_API_KEY=hush", *COMMAND), "--secret has to be NAME=SECRET/KEY"),
        ((*NEEDED, "--secret=A=b/c", "--xpk=c", *COMMAND), "--secret and --xpk exclude each other"),
        (("--name=r", "--tpu=v5p:2x2x6", "--image=i", "--xpk=c", *COMMAND), "topology 'v5p-48'"),
        (("--name=r", "--tpu=v5p:4x2x2", "--image=i", "--xpk=c", *COMMAND), "xpk names slices by their size"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message, capsys):
    assert gke.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {message}") and said.err.count("\n") == 1
    assert "hush" not in said.err and "hf_aa" not in said.err and "QQ" not in said.err


@pytest.mark.parametrize(
    "text", ["TOKENIZERS_PARALLELISM=false", "AUTHOR=me", "HF_TOKEN=", "A=sk-8x8", "GIT=" + 40 * "a"]
)
def test_what_is_no_secret_is_passed_on(text):
    _, pod = job_and_pod(manifest(*NEEDED, f"--env={text}"))
    name, _, value = text.partition("=")
    assert pod["containers"][0]["env"] == [{"name": name, "value": value}]


def test_a_secret_that_the_pod_fetches_is_no_secret_of_the_manifest():
    fetch = "export WANDB_API_KEY=$(gcloud secrets versions access latest --secret=wandb); exec intttrain train"
    gke.parse([*NEEDED, "--", "bash", "-c", f"{fetch} --workdir=gs://b/w"])
    gke.parse([*NEEDED, "--", "bash", "-c", "no workdir"])


def test_a_missing_kubectl_is_one_line(tmp_path):
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "bash").symlink_to(bash)  # nothing else: this machine may have a kubectl
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *NEEDED, *COMMAND], env=environment, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr == "error: there is no command kubectl\n"
