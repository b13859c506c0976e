"""A cloud in a folder: a `gcloud` that keeps a home folder per host and runs there what it is given.

Two hosts in each slice. FAIL_ON=NAME makes that slice unreachable. `states.json` has, for every request of a queued
resource in turn, the states that it passes through, one a look; the last one stays. REFUSED="0 2" refuses requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PLACE = ("--zone=z1", "--project=p1")

GCLOUD = """#!PYTHON
import json, os, shutil, signal, subprocess, sys
from pathlib import Path
root = Path(__file__).parent.parent
words = sys.argv[1:]
with open(root / "calls.jsonl", "a") as calls:
    print(json.dumps(words), file=calls)

def flag(name):
    return next((word.split("=", 1)[1] for word in words if word.startswith(name + "=")), None)

def tpu_vm(action, name):
    if action == "describe":
        sys.exit(print("10.0.0.7"))
    assert "--worker=all" in words
    name = words[5].split(":")[0] if action == "scp" else name
    if name == os.environ.get("FAIL_ON"):
        sys.exit("cannot reach " + name)
    for host in range(2):
        home = root / "hosts" / f"{name}-{host}"
        home.mkdir(parents=True, exist_ok=True)
        if action == "scp":
            shutil.copy(words[4], home / words[5].split(":")[1])
        else:
            done = subprocess.run(["sh", "-c", flag("--command")], env=os.environ | {"HOME": str(home)}, cwd=home)
            if done.returncode:
                sys.exit(done.returncode)

def queued_resources(action, name):
    if os.environ.get("NO_ACCESS"):
        sys.exit("ERROR: PERMISSION_DENIED on project p1\\n- details of it")
    request, count = root / "request.json", root / "requests"
    if action == "create":
        number = int(count.read_text()) if count.exists() else 0
        count.write_text(str(number + 1))
        if str(number) in os.environ.get("REFUSED", "").split():
            sys.exit("ERROR: quota of TPUs exceeded")
        request.write_text(json.dumps(json.loads((root / "states.json").read_text())[number]))
    elif not request.exists():
        sys.exit(f"WARNING: old\\nERROR: NOT_FOUND: there is no {name}\\n- details of it")
    elif action == "describe":
        first, *rest = json.loads(request.read_text())
        request.write_text(json.dumps(rest or [first]))
        print(first)
    elif action == "delete":
        assert "--force" in words and "--quiet" in words
        request.unlink()
        for number in (root / "hosts").glob("*/intttrain/run.pid"):
            try:
                os.killpg(int(number.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(root / "hosts", ignore_errors=True)

if words[:2] == ["storage", "ls"]:
    found = sorted(root.glob(words[2].removeprefix("gs://")))
    sys.exit(None if [print(f"gs://{path.relative_to(root)}") for path in found] else "matched no objects")
assert words[:2] == ["compute", "tpus"] and flag("--zone") == "z1" and flag("--project") == "p1", words
{"tpu-vm": tpu_vm, "queued-resources": queued_resources}[words[2]](words[3], words[4])
"""
# Stands for Python on a host: `-m venv venv` makes an environment whose Python writes down how it is called.
HOST_PYTHON = """#!/bin/sh
[ "$*" = "-m venv venv" ] || exit 1
mkdir -p venv/bin
printf '#!/bin/sh\\necho "$@" >installed\\n' >venv/bin/python
chmod +x venv/bin/python
"""


class Cloud:
    """The folder with the fake gcloud, its calls and its hosts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = dict(os.environ)
        self._program("gcloud", GCLOUD.replace("PYTHON", sys.executable))
        self._program("host_python", HOST_PYTHON)
        self.environment["PATH"] = f"{root / 'bin'}:{os.environ['PATH']}"

    def _program(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | variables
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)

    @property
    def calls(self) -> list[list[str]]:
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def host(self, name: str) -> Path:
        folder = self.root / "hosts" / name / "intttrain"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
