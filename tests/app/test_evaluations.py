"""``intttrain eval --task=...`` from the command line to the files that it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intttrain.config.registry import EVAL_TASKS, SHIPPED_TASKS
from intttrain.evals.gating import study as gating_study
from tests.app.conftest import World
from tests.app.small import cli, done, error_line, unchanged

PACKAGE = set(SHIPPED_TASKS.values())
GATES = "--config.eval.gates=({'rule': 'online'},)"


def result_of(workdir: Path, name: str) -> Any:
    (path,) = (workdir / "eval").rglob(f"{name}.json")
    return json.loads(path.read_text())


def test_help_names_the_tasks_that_are_shipped() -> None:
    assert set(SHIPPED_TASKS) == {name for name, entry in EVAL_TASKS.entries().items() if entry.home in PACKAGE}
    assert ", ".join(SHIPPED_TASKS) in " ".join(done("eval", "--help").out.split())


def test_context(world: World, wild: tuple[Path, str]) -> None:
    lengths = ("--config.eval.context.lengths=(32, 64)", "--config.eval.context.block_tokens=20")
    out = done("eval", world.config, f"--workdir={wild[0]}", "--task=context", *lengths, GATES).out
    content = result_of(wild[0], "context")
    assert [column["length"] for column in content["columns"]] == [32, 64]
    assert set(content["columns"][0]["levels"]) == {"on", "off", "online high reconstruction 0.5"}
    assert "on - off" in out and "context.json" in out


def test_gating(world: World, wild: tuple[Path, str]) -> None:
    grid = [
        f"--config.eval.gating.{name}={value}"
        for name, value in {
            "rules": "('online', 'periodic')", "signals": "('reconstruction',)", "update_on": "('high',)",
            "rates": "(0.5,)", "lengths": "(1,)", "oracles": "('tree',)",
        }.items()
    ]  # fmt: skip
    out = done("eval", world.config, f"--workdir={wild[0]}", "--task=gating", *grid).out
    content = result_of(wild[0], "gating")
    assert [row["rule"] for row in content["rows"]] == ["online", "periodic"]
    assert "periodic" in out and "gating_quality.png" in out
    assert len(list((wild[0] / "eval").rglob("gating_*.png"))) == 3


def test_thresholds_go_from_calibration_into_generation(
    world: World, wild: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating_study, "MIN_CALIBRATION_CHUNKS", 10)
    grid = ("--config.eval.gating.rates=(0.5,)", "--config.eval.gating.signals=('nll',)")
    out = done("eval", world.config, f"--workdir={wild[0]}", "--task=calibrate", *grid).out
    high, low = result_of(wild[0], "calibrate")["gates"]  # the name for which --follow looks
    assert (high["update_on"], low["update_on"]) == ("high", "low") and high["thresholds"] == low["thresholds"]
    assert "training documents" in out
    command = ("generate", f"--workdir={wild[0]}", "--prompt=" + 40 * "a", "--temperature=0", "--max_new_tokens=4")
    texts = [
        done(*command, "--gate=threshold", "--gate_signal=nll", f"--gate_thresholds={value}").out
        for value in ("-1", "1e9", high["thresholds"][0])
    ]
    assert texts[0] == done(*command).out and texts[1] == done(*command, "--update=off").out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--task=code"], ["--execute_model_code"]),
        (["--task=context", "--config.eval.context.lengths=(40,)"], ["[40]", "multiple of 16", "use for example 144"]),
        (["--task=context", "--config.eval.gates=({'rule': 'sometimes'},)"], ["eval.gates", "sometimes"]),
        (["--task=gating", "--config.eval.gating.rules=('sometimes',)"], ["eval.gating.rules", "sometimes"]),
        (["--task=gating", "--config.eval.gating.random_seeds=3"], ["eval.gating.random_seeds", "10"]),
        (
            ["--task=gating", "--config.eval.gating.lengths=(1,)", "--config.eval.gating.calibration_documents=2"],
            ["calibration_documents=2", "100"],
        ),
        (["--task=gating", "--config.eval.gating.lengths=(8,)"], ["eval.gating.lengths=[8]", "512", "303"]),
        (
            ["--task=context", "--config.eval.gates=({'rule': 'threshold'},)"],
            ["takes 1 thresholds", "not 0", "calibrate"],
        ),
        (["--task=contxt"], ["--task=contxt: ", "'positions'", "did you mean 'context'?"]),
    ],
)
def test_bad_input(world: World, wild: tuple[Path, str], flags: list[str], parts: list[str]) -> None:
    with unchanged(wild[0]):
        line = error_line(cli("eval", world.config, f"--workdir={wild[0]}", *flags), after_other_lines=True)
    assert all(part in line for part in parts), line
