"""Traces, model FLOPs utilisation, goodput and Weights & Biases of a small run."""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from intttrain.app import observe
from intttrain.core.config import default_config, resolve
from intttrain.core.goodput import summarise_goodput
from intttrain.core.hardware import CHIPS
from intttrain.core.metrics import METRICS_FILE, read_metrics
from intttrain.model import model_flops_per_token
from tests.app.small import NUM_STEPS, World, cli, done, error_line


class FakeWandb(types.ModuleType):
    """Records what a run sends; ``failure`` is raised at the start."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.failure, self.starts, self.records, self.finished = failure, [], [], 0  # type: ignore[var-annotated]

    def init(self, **arguments: Any) -> FakeWandb:
        if self.failure is not None:
            raise self.failure
        self.starts.append(arguments)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.records.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_a_run_is_traced_sent_and_timed_over_its_starts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    workdir = tmp_path / "run"
    command = ("train", world.config, f"--workdir={workdir}", "--config.train.wandb_project=small")
    first = done(*command, "--stop_at_step=4", "--config.train.profile_steps=(2,3)")
    assert f"trace of the chosen steps in {workdir / 'profile'}" in first.err
    assert [path.name for path in workdir.rglob("*.xplane.pb")]
    second = done(*command, "--config.train.profile_steps=(900,901)")  # never reached
    assert "trace" not in second.err

    goodput = summarise_goodput(workdir / "goodput.jsonl")
    assert goodput is not None and goodput.starts == 2 and goodput.line() in second.err
    assert sum(goodput.shares.values()) == pytest.approx(1) and all(s >= 0 for s in goodput.seconds.values())
    assert min(goodput.seconds[kind] for kind in ("starting", "compiling", "saving", "reading", "training")) > 0
    assert goodput.seconds["lost"] == 0

    assert [start["project"] for start in wandb.starts] == ["small"] * 2 and wandb.finished == 2
    assert len({start["id"] for start in wandb.starts}) == 1, "one entry for both"
    assert [step for step, _ in wandb.records] == list(range(1, NUM_STEPS + 1))
    wanted = {record["step"]: record["loss"] for record in read_metrics(workdir / METRICS_FILE)}
    assert {step: values["loss"] for step, values in wandb.records} == wanted


def test_weights_and_biases_that_cannot_be_had(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("train", world.config, f"--workdir={tmp_path / 'run'}", "--config.train.wandb_project=small")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("api_key not configured\nlong story")))
    line = error_line(cli(*command), after_other_lines=True)
    assert "'small'" in line and "(api_key not configured)" in line and "WANDB_MODE=offline" in line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install wandb" in error_line(cli(*command), after_other_lines=True)
    assert "WANDB_API_KEY" not in os.environ


def test_utilisation_is_the_rule_over_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(default_config())
    assert observe.utilisation(config, 1e6) is None, "nothing is known about this processor"
    monkeypatch.setattr(observe, "find_chip", lambda kind: dataclasses.replace(CHIPS["v5p"], peak_flops=1e15))
    flops = model_flops_per_token(config.model, config.data.seq_len)
    assert observe.utilisation(config, 1e6) == pytest.approx(1e6 * flops / 1e15)
    assert observe.utilisation(config, None) is None


def test_the_largest_peak_of_the_local_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(*stats: Any) -> None:
        made = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
        monkeypatch.setattr(observe.jax, "local_devices", lambda: made)

    devices({"peak_bytes_in_use": 2**30}, {"peak_bytes_in_use": 3 * 2**29}, None)
    assert observe.peak_memory_gib() == pytest.approx(1.5)
    devices(None, {})
    assert observe.peak_memory_gib() is None
