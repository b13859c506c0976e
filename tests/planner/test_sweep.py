"""Sweeps and tables, from plans that were not compiled."""

from __future__ import annotations

import dataclasses

import pytest

from intttrain.core.config import default_config, override, resolve
from intttrain.core.errors import UserError
from intttrain.core.hardware import GIB
from intttrain.planner import sweep as sweeping
from intttrain.planner.memory import Verdict
from intttrain.planner.plan import Plan, Prediction
from intttrain.planner.report import describe_plan, describe_plans, describe_ttt_share, pareto


def plan(needed: float, seconds: float | None) -> Plan:
    """A plan of so many GiB and seconds on a device of 16 GiB."""
    fits = needed <= 16
    prediction = None if seconds is None else Prediction(seconds, seconds, 0.0, 0.0, 1000 / seconds, 0.4 / seconds)
    return Plan(
        name="x", topology="v5e:4x4", mesh="fsdp 16", devices=16, tokens_per_step=16000,
        verdict=Verdict(fits, int(needed * GIB), 16 * GIB, "fits" if fits else "does not fit by 1.00 GiB: try", ()),
        memory=None, cost=None, traffic=None, replicated=None, prediction=prediction, refusal=None, remat="full",
        kept_bytes=None, microbatches=1, compile_seconds=1.0, versions={"jax": "1"},
    )  # fmt: skip


def test_points_are_all_combinations():
    config = resolve(default_config())
    points = sweeping.parse_sweep("model.remat=full,qkv train.microbatches=1,2,4", config)
    assert len(points) == 6
    assert points[0] == {"model.remat": "full", "train.microbatches": 1}
    changed = override(config, points[-1])
    assert (changed.model.remat, changed.train.microbatches) == ("qkv", 4)
    assert dataclasses.replace(changed, model=config.model, train=config.train) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model.remat", "'model.remat' is not KEY=VALUE,VALUE"),
        ("model.remta=full", "unknown configuration key model.remta; did you mean 'model.remat'?"),
        (" ", "--sweep is empty"),
    ],
)
def test_a_bad_sweep_is_one_line(text, said):
    with pytest.raises(UserError) as error:
        sweeping.parse_sweep(text, resolve(default_config()))
    assert said in str(error.value)


def test_impossible_points_are_left_out_with_their_reason(monkeypatch):
    config, lines = resolve(default_config()), []
    monkeypatch.setattr(
        sweeping, "make_plan", lambda config, topology, hlo: plan(4.0, float(config.train.microbatches))
    )
    points = sweeping.parse_sweep("train.microbatches=1,3,4", config)
    plans = sweeping.make_plans(config, "v5e:4x4", points, hlo=None, report=lines.append)
    assert [label for label, _ in plans] == ["microbatches=1", "microbatches=4"]
    assert any("left out: train.microbatches=3 does not divide train.batch_rows=8" in line for line in lines)
    with pytest.raises(UserError, match="no combination is possible"):
        sweeping.make_plans(config, "v5e:4x4", points[1:2], hlo=None, report=lines.append)


def test_pareto_keeps_what_nothing_beats_in_both():
    small, fast, worse, large = plan(4.0, 8.0), plan(8.0, 4.0), plan(8.0, 5.0), plan(20.0, None)
    assert pareto([small, fast, worse, large]) == [small, fast]
    table = describe_plans([("small", small), ("fast", fast), ("worse", worse), ("large", large)])
    marked = [line.split()[1] for line in table.splitlines() if line.startswith("*")]
    assert marked == ["small", "fast"]
    assert "does not fit" in table.splitlines()[-1]


def test_share_of_ttt():
    text = describe_ttt_share(plan(5, 4.4), plan(4, 4.0))
    assert "TTT costs +10.0% of the step and +1.00 GiB a device (predicted)" in text


def test_a_refused_plan_is_a_page_too():
    text = describe_plan(plan(20, None))
    assert "does not fit by 1.00 GiB" in text and "predicted, not measured" in text
