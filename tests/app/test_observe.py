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
from intttrain.app.runs import read_run_id
from intttrain.config import default_config, resolve
from intttrain.layout.hardware import CHIPS
from intttrain.logs.goodput import summarise_goodput
from intttrain.logs.metrics import METRICS_FILE, read_metrics
from intttrain.model import model_flops_per_token
from tests.app.small import NUM_STEPS, World, cli, done, error_line


class FakeWandb(types.ModuleType):
    """Records what a run sends; ``failure`` is raised at the start, and by the functions that ``broken`` names."""

    Settings = dict

    def __init__(self, failure: Exception | None = None, broken: tuple[str, ...] = ()) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.broken = broken
        self.failure, self.starts, self.records, self.finished = failure, [], [], 0  # type: ignore[var-annotated]

    def init(self, **arguments: Any) -> FakeWandb:
        if self.failure is not None:
            raise self.failure
        self.starts.append(arguments)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        if "log" in self.broken:
            raise RuntimeError("the service is gone")
        self.records.append((step, values))

    def finish(self) -> None:
        if "finish" in self.broken:
            raise RuntimeError("the service is gone")
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
    workdir = workdir.rename(tmp_path / "moved")
    command = ("train", world.config, f"--workdir={workdir}", "--config.train.wandb_project=small")
    second = done(*command, "--config.train.profile_steps=(900,901)")  # never reached
    assert "trace" not in second.err

    goodput = summarise_goodput(workdir / "goodput.jsonl")
    assert goodput is not None and goodput.starts == 2 and goodput.line() in second.err
    assert sum(goodput.shares.values()) == pytest.approx(1) and all(s >= 0 for s in goodput.seconds.values())
    assert min(goodput.seconds[kind] for kind in ("starting", "compiling", "saving", "reading", "training")) > 0
    assert goodput.seconds["lost"] == 0

    assert [start["project"] for start in wandb.starts] == ["small"] * 2 and wandb.finished == 2
    assert {start["id"] for start in wandb.starts} == {read_run_id(workdir)}, "one entry for both, though it moved"
    assert wandb.starts[0]["config"]["model.ttt.eta"] == 0.3 and wandb.starts[0]["resume"] == "allow"
    assert wandb.starts[0]["settings"] == {"init_timeout": 30.0, "finish_timeout": 60.0}
    assert [step for step, _ in wandb.records] == list(range(1, NUM_STEPS + 1))
    wanted = {record["step"]: record["loss"] for record in read_metrics(workdir / METRICS_FILE)}
    assert {step: values["loss"] for step, values in wandb.records} == wanted


def test_weights_and_biases_that_cannot_be_had(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("train", world.config, f"--workdir={tmp_path / 'run'}", "--config.train.wandb_project=small")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("api_key not configured\nlong story")))
    line = error_line(cli(*command), after_other_lines=True)
    assert "'small'" in line and "(api_key not configured)" in line and "WANDB_MODE=offline" in line
    monkeypatch.setattr(FakeWandb, "Settings", None)  # an old release
    assert "pip install --upgrade wandb" in error_line(cli(*command), after_other_lines=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install wandb" in error_line(cli(*command), after_other_lines=True)
    assert "WANDB_API_KEY" not in os.environ


@pytest.mark.parametrize(
    ("wandb", "line"),
    [
        (FakeWandb(TimeoutError("no answer in 30 s")), "does not start (no answer in 30 s); the run goes on"),
        (FakeWandb(broken=("log",)), "warning: Weights & Biases lacks 10 records (the service is gone)"),
        (FakeWandb(broken=("finish",)), "warning: Weights & Biases could not be closed (the service is gone)"),
    ],
)
def test_weights_and_biases_that_fails_ends_nothing(
    wandb: FakeWandb, line: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    outcome = done("train", world.config, f"--workdir={tmp_path / 'run'}", "--config.train.wandb_project=small")
    assert line in outcome.err and outcome.err.count("warning") <= 2, outcome.err
    assert [record["step"] for record in read_metrics(tmp_path / "run" / METRICS_FILE)] == list(range(1, NUM_STEPS + 1))
    assert (tmp_path / "run" / "checkpoints" / str(NUM_STEPS)).is_dir()


def test_a_trace_that_cannot_be_made_ends_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    monkeypatch.setattr(observe.jax.profiler, "start_trace", lambda folder: (_ for _ in ()).throw(OSError(28, "full")))
    flags = ("--config.train.profile_steps=(2,3)", "--config.train.num_steps=4")
    err = done("train", world.config, f"--workdir={workdir}", *flags).err
    assert err.count("warning: no trace can be made (full); the run goes on") == 1, err


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
