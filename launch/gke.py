#!/usr/bin/env python3
"""Runs a command on TPU slices of a GKE cluster: writes the manifest of a JobSet and gives it to kubectl.

    launch/gke.py --name=NAME --tpu=TOPOLOGY --image=IMAGE [--slices=N] [--spot] [--namespace=NAMESPACE]
        [--service_account=NAME] [--queue=NAME] [--env=NAME=VALUE ...] [--secret=NAME=SECRET/KEY ...]
        [--max_restarts=N] [--xpk=CLUSTER] [--dry_run] -- COMMAND...

TOPOLOGY is written as for `intttrain plan`: v5p:4x4x4 or v5p-128. Every slice is one job of the set, every host one
pod of a job. A pod that fails makes the set start again, up to --max_restarts times in all, except with status 2 or 3,
which end it. A pod that goes away with its node makes it start again, too, and is not counted. --secret takes the value
of a variable from a Kubernetes secret. --dry_run prints the manifest. --xpk has xpk create the workload instead of
kubectl.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from intttrain.config.errors import FINAL_STATUSES, UserError
from intttrain.planner.topology import Topology, describe_topology

# Values of cloud.google.com/gke-tpu-accelerator ("Plan TPUs in GKE" of the GKE documentation).
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5p": "tpu-v5p-slice",
    "v5e": "tpu-v5-lite-podslice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
CONTAINER = "intttrain"
INTERRUPTED_STATUSES = [130, 143]  # of pods that are asked to end, before a node goes away
# Between SIGTERM and SIGKILL: the step that runs has to end and the checkpoint to reach its bucket.
GRACE_SECONDS = 600
MAX_NAME = 63  # of a pod: NAME-slice-JOB-HOST-abcde
# "tokenizers_parallelism" and "author" are none.
SECRET_NAME = re.compile(
    r"KEY|TOKEN(?!IZER)|SECRET|PASS(WORD|WD|PHRASE)|CREDENTIAL|AUTH(?!OR)|PRIVATE|COOKIE|SIGNATURE", re.IGNORECASE
)
# What Hugging Face, AWS, OpenAI and others, GitHub, GitLab, Google and Slack hand out, and private keys.
SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|AIza|ya29\.|xox[abprs]-)[\w.-]{16,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)


class Parser(argparse.ArgumentParser):
    """Reports errors as the other launchers do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; launch/gke.py --help lists the arguments")


def main(argv: Sequence[str]) -> int:
    try:
        arguments = parse(argv)
        if arguments.xpk:
            command, text = xpk_command(arguments), ""
        else:
            command, text = ["kubectl", "apply", "-f", "-"], yaml.safe_dump(manifest(arguments), sort_keys=False)
        if arguments.dry_run:
            print(f"# {shlex.join(command)}\n{text}".rstrip() if text else shlex.join(command))
            return 0
        return subprocess.run(command, input=text, text=True).returncode
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except FileNotFoundError as error:
        print(f"error: there is no command {error.filename}", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads and checks the arguments; ``tpu`` becomes a ``Topology`` of all slices.

    Raises:
      UserError: one is missing or wrong.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name in ("name", "tpu", "image"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("namespace", "service_account", "queue", "xpk"):
        parser.add_argument(f"--{name}")
    for name in ("env", "secret"):
        parser.add_argument(f"--{name}", action="append", default=[])
    for name in ("spot", "dry_run"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--max_restarts", type=int, default=20)
    split = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:split])
    arguments.command = list(argv[split + 1 :])
    arguments.tpu = describe_topology(arguments.tpu, arguments.slices)
    check(arguments)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Refuses what Kubernetes would refuse later, and a run that could not resume."""
    if not arguments.command:
        raise UserError("there is no command after --")
    words = ["bash", str(Path(__file__).with_name("workdir_of.sh")), *arguments.command]
    workdir = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    if not workdir and {"intttrain", "train"} <= set(" ".join(arguments.command).split()):
        raise UserError("the command has no --workdir; name a bucket, --workdir=gs://...")
    if workdir and not workdir.startswith("gs://"):
        raise UserError(f"--workdir={workdir} is lost with its container; use a bucket, --workdir=gs://...")
    longest = MAX_NAME - len(f"-slice-{arguments.slices - 1}-{hosts(arguments.tpu) - 1}-abcde")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", arguments.name) or len(arguments.name) > longest:
        raise UserError(
            f"--name={arguments.name} has to be at most {longest} small letters, digits and -, and begin with a letter"
        )
    if arguments.max_restarts < 0:
        raise UserError(f"--max_restarts={arguments.max_restarts} has to be at least 0")
    check_variables(arguments.env, arguments.secret)
    check_command(arguments.command)


def check_variables(plain: Sequence[str], secret: Sequence[str]) -> None:
    """Refuses variables that are not written as they should be, and secrets in the manifest; repeats no value."""
    for text in plain:
        name, given, value = text.partition("=")
        if not given or not is_variable(name):
            raise UserError(f"--env={name} has to be NAME=VALUE")
        check_readable(f"--env={name}=...", name, value)
    for text in secret:
        if not is_variable(text.partition("=")[0]) or not re.fullmatch(r"[^=]+=[a-z0-9.-]+/[\w.-]+", text):
            raise UserError("--secret has to be NAME=SECRET/KEY, a Kubernetes secret and a key in it, not a value")


def check_command(command: Sequence[str]) -> None:
    """Refuses secrets among the words of the command, which are stored in the manifest; repeats no value."""
    for word in command:
        name, given, value = word.partition("=")
        if given and is_variable(name):  # for env, or a shell
            check_readable(f"{name}=... in the command", name, "" if value.startswith("$") else value)
        else:
            check_readable("a word of the command", "", word)


def check_readable(what: str, name: str, value: str) -> None:
    """Refuses a variable that is called like a secret, or a value that looks like one."""
    if (value and SECRET_NAME.search(name)) or SECRET_VALUE.search(value):
        raise UserError(f"{what} would be stored readably; use --secret={name or 'NAME'}=SECRET/KEY")


def is_variable(name: str) -> bool:
    """Returns whether a variable of the environment may be called so."""
    return re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None


def hosts(tpu: Topology) -> int:
    """Returns the hosts of one slice."""
    return tpu.hosts // tpu.slices


def manifest(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the JobSet as the dict that its YAML says."""
    metadata: dict[str, Any] = {"name": arguments.name}
    if arguments.namespace:
        metadata["namespace"] = arguments.namespace
    if arguments.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": arguments.queue}
    # All pods of a job on one node pool, and no two jobs on the same one: a node pool is a slice.
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    job = {
        "parallelism": hosts(arguments.tpu),
        "completions": hosts(arguments.tpu),
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod alone cannot start again: the others wait for it in a collective
        "podFailurePolicy": {"rules": pod_failure_rules()},
        "template": {"spec": pod(arguments)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": arguments.max_restarts, "rules": set_failure_rules()},
            "replicatedJobs": [{"name": "slice", "replicas": arguments.slices, "template": {"spec": job}}],
        },
    }


def pod_failure_rules() -> list[dict[str, Any]]:
    """Returns which pods end their job at once; the rest does so as well, since a job has no second attempt."""
    final = {"containerName": CONTAINER, "operator": "In", "values": list(FINAL_STATUSES)}
    interrupted = {"containerName": CONTAINER, "operator": "In", "values": INTERRUPTED_STATUSES}
    return [
        {"action": "FailJob", "onExitCodes": final},
        # The pod of a node that is pre-empted, drained or under maintenance, and the others, which save with it.
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": interrupted},
    ]


def set_failure_rules() -> list[dict[str, Any]]:
    """Returns what the set does about a failed job; where none applies it starts again, and counts that.

    Which rule for pods it was, only the message of the job says; JobSet reads messages since 0.10.
    """
    return [
        {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"matching FailJob rule at index {indices}$"],
        }
        for name, action, indices in (
            ("startingAgainCannotHelp", "FailJobSet", "0"),
            ("preemptionIsNoFailure", "RestartJobSetAndIgnoreMaxRestarts", "[12]"),
        )
    ]


def pod(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the specification of the pod of one host."""
    tpu: Topology = arguments.tpu
    chips = {"google.com/tpu": str(tpu.chips // tpu.hosts)}
    pairs = [text.partition("=") for text in arguments.env]
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, _, value in pairs]
    for text in arguments.secret:
        name, _, reference = text.partition("=")
        secret, _, key = reference.partition("/")
        environment.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    container: dict[str, Any] = {"name": CONTAINER, "image": arguments.image, "command": arguments.command}
    if environment:
        container["env"] = environment
    container["resources"] = {"requests": chips, "limits": dict(chips)}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[tpu.chip.name],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, tpu.shape)),
    }
    spec: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE_SECONDS}
    if arguments.service_account:
        spec["serviceAccountName"] = arguments.service_account
    if arguments.slices > 1:  # gradients between slices travel without the pods' overlay network
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if arguments.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        toleration = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        spec["tolerations"] = [toleration]
    return spec | {"nodeSelector": selector, "containers": [container]}


def xpk_command(arguments: argparse.Namespace) -> list[str]:
    """Returns the command of xpk that creates the same workload.

    Raises:
      UserError: xpk cannot express an argument.
    """
    for name in ("secret", "namespace", "service_account", "queue"):
        if getattr(arguments, name):
            raise UserError(f"--{name} and --xpk exclude each other: xpk has no such flag; use it without --xpk")
    tpu: Topology = arguments.tpu
    count = tpu.chips // tpu.slices * tpu.chip.tensor_cores
    name = f"{'v5litepod' if tpu.chip.name == 'v5e' else tpu.chip.name}-{count}"
    usual = describe_topology(name)
    if usual.shape != tpu.shape:
        raise UserError(f"xpk names slices by their size, and {name} is {usual.name}, not {tpu.name}; go without --xpk")
    restart = [status for status in range(1, 127) if status not in FINAL_STATUSES]  # xpk adds 127 to 255 by itself
    return [
        "xpk", "workload", "create", f"--cluster={arguments.xpk}", f"--workload={arguments.name}",
        f"--tpu-type={name}", f"--num-slices={arguments.slices}", f"--docker-image={arguments.image}",
        f"--command={shlex.join(arguments.command)}", f"--max-restarts={arguments.max_restarts}",
        f"--restart-on-exit-codes={ranges(restart)}", f"--termination-grace-period-seconds={GRACE_SECONDS}",
        *(f"--env={text}" for text in arguments.env), *(["--spot"] if arguments.spot else []),
    ]  # fmt: skip


def ranges(numbers: Sequence[int]) -> str:
    """Writes rising numbers as ``1,4-126``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
