""".ci/run with a stand-in for make: which part fails decides, and the newest releases do not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PARTS = ["check", "test", "test-slow", "check-plan", "test-newest"]
MAKE = """#!/bin/sh
echo "$1" >>"$CALLS"
[ "$1" != "$FAILING" ] || { echo "== 1 failed, 2 passed =="; exit "$STATUS"; }
echo "== 3 passed =="
"""


def ci(
    folder: Path, failing: str = "", seconds: str = "3600", with_status: str = "2"
) -> tuple[int, list[str], list[str]]:
    """Returns the status, the lines of output, and the parts that were run."""
    (folder / "make").write_text(MAKE)
    (folder / "make").chmod(0o755)
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    environment |= {"FAILING": failing, "CI_SECONDS": seconds, "STATUS": with_status}
    result = subprocess.run([REPO / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines(), (folder / "calls").read_text().split()


def test_all_parts_run_and_the_newest_releases_last(tmp_path):
    status, lines, parts = ci(tmp_path)
    assert (status, parts) == (0, PARTS)
    assert lines[-1].startswith("CI passed: ") and "other projects pass as well" in lines[-1]


@pytest.mark.parametrize("part", [part for part in PARTS if part != "test-newest"])
def test_a_part_that_fails_ends_it_and_is_named_last(tmp_path, part):
    status, lines, parts = ci(tmp_path, failing=part)
    assert (status, lines[-1], parts[-1]) == (1, f"CI failed in: make {part}", part)


def test_the_newest_releases_do_not_count(tmp_path):
    status, lines, parts = ci(tmp_path, failing="test-newest")
    assert (status, parts) == (0, PARTS)
    assert [line for line in lines if "failed" in line] == ["newest: == 1 failed, 2 passed =="]
    assert lines[-1].startswith("CI passed: ") and "do NOT pass" in lines[-1]


def test_newest_releases_that_were_not_tried_to_the_end_are_not_called_failing(tmp_path):
    status, lines, parts = ci(tmp_path, failing="test-newest", with_status="124")  # of timeout
    assert (status, parts) == (0, PARTS)
    assert "did not end in time" in lines[-1] and "NOT pass" not in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "parts", "left_out"),
    [
        ("1520", PARTS, ()),
        ("620", [part for part in PARTS if part != "test-slow"], ("the slow tests",)),
        ("400", ["check", "test", "test-newest"], ("the slow tests", "a recorded plan")),
        ("200", ["check", "test"], ("the slow tests", "a recorded plan")),
    ],
)
def test_what_does_not_fit_into_the_time_is_left_out_and_said(tmp_path, seconds, parts, left_out):
    status, lines, run = ci(tmp_path, seconds=seconds)
    assert (status, run) == (0, parts)
    assert [what for what in ("the slow tests", "a recorded plan") if f"WITHOUT {what} (" in lines[-1]] == [*left_out]
    assert ("no time was left for the newest" in lines[-1]) is ("test-newest" not in parts)
