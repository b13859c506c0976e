"""The table of exit statuses in docs/operations.md is what every launcher does, and what config/errors.py says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from intttrain.config.errors import FINAL_STATUSES, RESTART_STATUS, MissingProcessError, PassingError, UserError
from tests.launch.test_gke import NEEDED, gke, job_and_pod, manifest
from tests.launch.test_local import run as local
from tests.launch.test_queued import Queue
from tests.launch.test_slurm import Slurm

REPO = Path(__file__).resolve().parents[2]
END, AGAIN = "end", "start again"
DISRUPTED = "DisruptionTarget"


def read_table() -> dict[int, str]:
    """What the page says that launchers do, by status."""
    page = (REPO / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| ([\d, ]+|others: .*?) \| .*? \| (end|start again)\b.*\|$", page, re.MULTILINE)
    return {int(status): action for cell, action in rows for status in re.findall(r"\b\d+\b", cell)}


TABLE = read_table()


def test_the_table_is_that_of_the_errors():
    assert {0, 1, 2, 3, 4, 130, 134, 137, 143} <= TABLE.keys()
    assert {status for status, action in TABLE.items() if action == END} == {0, *FINAL_STATUSES}
    assert UserError("").status in FINAL_STATUSES
    assert PassingError("").status == MissingProcessError("").status == RESTART_STATUS
    assert TABLE[RESTART_STATUS] == AGAIN


FINAL = [status for status, action in TABLE.items() if action == END]
ASKED = (130, 143)  # under SLURM by SLURM, which queues the job again
FAILED = [status for status, action in TABLE.items() if action == AGAIN and status not in ASKED]


@pytest.mark.parametrize("statuses", [*((status,) for status in FINAL), FAILED, *((status,) for status in ASKED)])
def test_slurm(statuses, tmp_path):
    slurm = Slurm(tmp_path)
    ended, _ = slurm(*(f"exit {status}" for status in statuses), "exit 0", MAX_RESTARTS="20")
    assert slurm.calls.count("srun") == (len(FAILED) + 1 if statuses == FAILED else 1)
    assert slurm.calls.count("scontrol") == (statuses[0] in ASKED)
    assert ended == (statuses[0] if statuses[0] in FINAL else 0)


@pytest.mark.parametrize("statuses", [*((status,) for status in FINAL), [*FAILED, *ASKED]])
def test_queued(statuses, tmp_path):
    queue = Queue(tmp_path)
    queue.environment |= {"POLL_SECONDS": "0.02", "ROOT": str(tmp_path)}
    script = (*(f"exit {status}" for status in statuses), "exit 0")
    done = queue(*script, states=[["ACTIVE"]], MAX_RESTARTS="20")
    assert queue.starts() == (1 if statuses[0] in FINAL else len(script))
    assert done.returncode == (statuses[0] if statuses[0] in FINAL else 0)


@pytest.mark.parametrize("status", [2, 4])  # it starts nothing again, whatever the status
def test_local(status):
    assert local("2", "1", "bash", "-c", f"exit {status}").returncode == status


def ends_like(pod: int | str, made: dict[str, Any]) -> tuple[str, bool]:
    """What JobSet does after a pod ended with a status or a condition, and whether that counts: its rules, replayed."""
    job, _ = job_and_pod(made)
    message, reason = "Job has reached the specified backoff limit", "BackoffLimitExceeded"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        conditions = [condition["type"] for condition in rule.get("onPodConditions", [])]
        if pod in conditions or pod in rule.get("onExitCodes", {}).get("values", []):
            said = f"failed with exit code {pod}" if isinstance(pod, int) else f"has condition {pod}"
            message, reason = f"Pod a/b {said} matching FailJob rule at index {index}", "PodFailurePolicy"
            break
    for rule in made["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return (END if rule["action"] == "FailJobSet" else AGAIN), not rule["action"].endswith("IgnoreMaxRestarts")
    return AGAIN, True


@pytest.mark.parametrize(("status", "action"), [item for item in TABLE.items() if item[0]])
def test_gke(status, action):
    made = manifest(*NEEDED)
    found, counts = ends_like(status, made)
    assert found == action
    assert action == END or counts == (status not in ASKED)


def test_gke_does_not_count_a_node_that_goes_away():
    made = manifest(*NEEDED, "--spot")
    assert ends_like(DISRUPTED, made) == (AGAIN, False)
    conditions = job_and_pod(made)[0]["podFailurePolicy"]["rules"][1]["onPodConditions"]
    assert conditions == [{"type": "DisruptionTarget", "status": "True"}]
    # Whatever a later Kubernetes says instead of the index is counted, so that nothing goes on for ever.
    for rule in made["spec"]["failurePolicy"]["rules"]:
        assert not re.search(rule["onJobFailureMessagePatterns"][0], "Pod a/b matching FailJob rule final")


@pytest.mark.parametrize(("status", "action"), [item for item in TABLE.items() if item[0]])
def test_xpk(status, action):
    words = gke.xpk_command(gke.parse([*NEEDED, "--xpk=c", "--", "intttrain", "plan"]))
    (codes,) = (word.partition("=")[2] for word in words if word.startswith("--restart-on-exit-codes="))
    ranges = [tuple(map(int, part.split("-"))) for part in codes.split(",")]
    restarts = any(first[0] <= status <= first[-1] for first in ranges) or status > 126  # xpk adds those
    assert restarts == (action == AGAIN)


@pytest.mark.parametrize("script", ["slurm.sh", "queued.sh"])
def test_scripts_name_the_final_statuses(script):
    text = (REPO / "launch" / script).read_text()
    final = " ".join(map(str, FINAL_STATUSES))
    assert f"0 | {' | '.join(final.split())}) exit" in text or f"for status in {final};" in text
