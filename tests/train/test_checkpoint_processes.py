"""What one of two processes cannot read or write, neither goes on with."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.train.checkpoint_cases import REPO, folders


def test_two_processes_agree_on_what_only_one_of_them_sees(tmp_path):
    command = [
        REPO / "launch" / "local.sh",
        "2",
        "1",
        sys.executable,
        "-m",
        "tests.train.checkpoint_processes",
        tmp_path,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("INTTTRAIN_", "XLA_FLAGS"))}
    environment |= {"PYTHONPATH": str(REPO)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    of_each = [
        [line.removeprefix(f"[{process}] ") for line in ended.stdout.splitlines() if line.startswith(f"[{process}] ")]
        for process in (0, 1)
    ]
    damaged, forbidden, full = [line for line in of_each[0] if "Gloo" not in line]
    assert [line for line in of_each[1] if "Gloo" not in line] == [damaged, forbidden, full]
    assert damaged == "step 2 of [1, 2]"
    assert "step 2 in" in forbidden and "cannot be read: [Errno 13] Permission denied" in forbidden
    assert "step 9 could not be written" in full and "File too large" in full and "step 2 is complete" in full
    assert folders(tmp_path)[:3] == ["1", "2", "3.damaged"]
