"""What is shipped beside the package: every configuration resolves, and the demo calls what exists."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from intttrain.app import commands, evaluate, generate
from intttrain.app.cli import COMMANDS
from intttrain.config import resolve
from tests.app.small import REPO, cli, done, error_line

CONFIGS = sorted((REPO / "configs").glob("*.py"))
DEMO = REPO / "launch" / "demo.sh"
STUB = """#!/bin/sh
# Writes down how it was called and makes the folder that the real program would make.
call=$(mktemp "$CALLS/XXXXXX")
for argument in "$@"; do printf '%s\\0' "$argument" >> "$call"; done
date +%s%N > "$call.time"
for argument in "$@"; do
    case $argument in --output=*|--workdir=*) mkdir -p "${argument#*=}" ;; esac
done
[ "$1" != "$FAILING" ]
"""


def variants(file: Path) -> list[str]:
    """Returns the names in backticks of the paragraph that begins with ``Variants:``."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    paragraph = re.search(r"^Variants:(.*?)(?:\n\n|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([a-z][a-z0-9_]*)`", paragraph[1]) if paragraph else []


def flat(flag: str) -> dict[str, str]:
    """Returns what ``intttrain config`` prints for a configuration."""
    lines = done("config", flag).out.split("\nderived\n")[0].splitlines()
    return {words[0]: words[1] if len(words) > 1 else "" for words in (line.split(maxsplit=1) for line in lines)}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_variant_resolves(file: Path) -> None:
    names = [flat(f"--config={file}:{variant}")["name"] for variant in variants(file)]
    assert len(set(names)) == len(names), "runs of two variants cannot be told apart"
    assert flat(f"--config={file}")["name"] in (names or [flat(f"--config={file}")["name"]])
    if names:
        assert "nosuch" in error_line(cli("config", f"--config={file}:nosuch"))


TWINS = [file for file in CONFIGS if {"ttt", "dense"} <= set(variants(file))]


@pytest.mark.parametrize("file", TWINS, ids=lambda file: file.stem)
def test_twins_differ_only_in_ttt(file: Path) -> None:
    ttt, dense = flat(f"--config={file}:ttt"), flat(f"--config={file}:dense")
    differing = {key for key in ttt.keys() | dense.keys() if ttt.get(key) != dense.get(key)}
    assert {key for key in differing if not key.startswith("model.ttt")} == {"name"}
    assert dense["model.ttt"] == "None" and "model.ttt.eta" in ttt


def test_the_demo_has_twins() -> None:
    assert REPO / "configs" / "tiny.py" in TWINS


# --- launch/demo.sh ------------------------------------------------------------------------------------------------


def test_demo_is_sound_shell() -> None:
    for shell in filter(shutil.which, ("sh", "dash", "bash", "busybox")):
        command = [shell, "sh", "-n"] if shell == "busybox" else [shell, "-n"]
        result = subprocess.run([*command, DEMO], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, ""), shell
    if shutil.which("shellcheck"):
        result = subprocess.run(["shellcheck", DEMO], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


class Demo:
    """The demo in a copy of the repository, with a stub in place of the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("launch", "configs"):
            shutil.copytree(REPO / name, folder / name)
        (folder / "bin").mkdir()
        (folder / "bin" / "intttrain").write_text(STUB)
        (folder / "bin" / "intttrain").chmod(0o755)

    def run(self, failing: str = "") -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        """Runs the script and returns its result and the calls in their order."""
        calls = self.folder / "calls"
        shutil.rmtree(calls, ignore_errors=True)
        calls.mkdir()
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "CALLS": str(calls), "FAILING": failing}
        script = ["sh", self.folder / "launch" / "demo.sh"]
        result = subprocess.run(script, env=environment, cwd="/", capture_output=True, text=True, check=False)
        times = sorted(calls.glob("*.time"), key=lambda file: int(file.read_text()))
        return result, [file.with_suffix("").read_bytes().decode().split("\0")[:-1] for file in times]


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    return Demo(tmp_path)


def test_demo_goes_the_whole_way(demo: Demo) -> None:
    result, calls = demo.run()
    assert result.returncode == 0, result.stderr
    assert [call[0] for call in calls] == ["prepare", "train", "train", "train", "train", "eval", "export", "generate"]
    for early, late in ((calls[1:3], calls[3:5]),):
        assert {":dense" in call[1] for call in early} == {":dense" in call[1] for call in late} == {True, False}
        assert all("--stop_at_step=300" in call for call in early)
        stopped = {tuple(argument for argument in call if "stop_at" not in argument) for call in early}
        assert stopped == {tuple(call) for call in late}, "the second time is the same command"
    for call in calls:
        printed = "$ intttrain train" if call[0] == "train" else f"$ intttrain {call[0]}"
        assert printed in result.stdout, "every command is shown before it runs"
    assert {path.name for path in demo.folder.iterdir()} == {"launch", "configs", "bin", "calls", "runs"}


def test_demo_flags_exist_and_its_values_fit(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call gets through the real command line, up to the work itself."""
    _, calls = demo.run()
    reached = []
    homes = {
        commands: ("show_config", "prepare_stores", "train_model", "export_checkpoint"),
        evaluate: ("evaluate_model",),
        generate: ("generate_text",),
    }
    for module, names in homes.items():
        for name in names:
            monkeypatch.setattr(module, name, lambda values: reached.append(values) or 0)
    monkeypatch.chdir(demo.folder)
    for call in calls:
        done(*call)
    assert len(reached) == len(calls) > 0
    stops = {values.stop_at_step for values in reached if "stop_at_step" in values} - {None}
    steps = {resolve(values.config).train.num_steps for values in reached if "config" in values}
    assert len(steps) == 1 and all(0 < stop < min(steps) for stop in stops)
    assert f"eval/{min(steps)}/positions.png" in DEMO.read_text()


def test_demo_continues_where_it_was(demo: Demo) -> None:
    demo.run()
    result, calls = demo.run()
    assert result.returncode == 0, result.stderr
    assert "continuing there" in result.stdout
    assert [call[0] for call in calls] == ["train", "train", "train", "train", "eval", "generate"]


@pytest.mark.parametrize("command", ["prepare", "train", "eval", "export"])
def test_demo_stops_at_the_first_failure(demo: Demo, command: str) -> None:
    result, calls = demo.run(failing=command)
    assert result.returncode != 0
    assert calls[-1][0] == command
    if command == "train":
        assert "error: training failed" in result.stderr and len(calls) == 3


def test_usage_in_docstrings_names_real_flags() -> None:
    """The commands that configuration files show are taken from their docstrings and tried against the flags."""
    from absl import flags

    for file in CONFIGS:
        for name, rest in re.findall(
            r"^ +intttrain (\w+) +(.*)$", ast.get_docstring(ast.parse(file.read_text())) or "", re.M
        ):
            values = flags.FlagValues()
            COMMANDS[name][1](values)
            for flag in re.findall(r"--([a-z_]+)[.=]", rest):
                assert flag in values, f"{file.name}: intttrain {name} has no --{flag}"
