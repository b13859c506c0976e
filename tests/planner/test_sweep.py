"""Sweeps and tables, from plans that were not compiled."""

from __future__ import annotations

import dataclasses

import pytest

from intttrain.config import default_config, override, resolve
from intttrain.config.errors import UserError
from intttrain.layout.hardware import CHIPS, GIB
from intttrain.planner import plan as planning
from intttrain.planner import sweep as sweeping
from intttrain.planner.cost import Unpriced, step_cost
from intttrain.planner.memory import Verdict
from intttrain.planner.plan import Plan, Prediction
from intttrain.planner.report import describe_plan, describe_plans, describe_ttt_share, pareto
from intttrain.planner.topology import describe_topology
from intttrain.planner.xla.hlo import parse_module


def plan(needed: float, seconds: float | None, *unknown: str) -> Plan:
    """A plan of so many GiB and seconds on a device of 16 GiB; ``unknown`` has no estimate."""
    fits = needed <= 16
    prediction = None
    if seconds is not None:
        prediction = Prediction(seconds, seconds, 0.0, 0.0, 1000 / seconds, 0.4 / seconds, unknown=unknown)
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


def test_an_unknown_time_is_not_a_short_one():
    """The plan whose gather has no estimate looks like the fastest one, and may be the slowest."""
    known, unknown = plan(8.0, 4.0), plan(8.0, 1.0, "fusion at /x/intttrain/model/a.py:7")
    assert pareto([known, unknown]) == [known]
    slim = plan(4.0, 1.0, "fusion at /x/intttrain/model/a.py:7")
    assert pareto([known, slim]) == [known, slim], "less memory is less memory, but it does not beat the other"
    slower = plan(8.0, 2.0, "fusion at /x/intttrain/model/a.py:7")
    assert pareto([unknown, slower]) == [unknown], "both lack the same"
    table = describe_plans([("known", known), ("unknown", unknown)]).splitlines()
    assert table[1].startswith("* known") and ">" not in table[1]
    assert table[2].startswith("  unknown") and ">   1.00" in table[2]
    assert table[3] == "> at least so long: no estimate for fusion at intttrain/model/a.py:7"


def test_share_of_ttt():
    unlike = describe_ttt_share(plan(5, 4.4, "sort at a.py:1"), plan(4, 4.0))
    assert unlike.endswith("(predicted); the time compares lower bounds that leave out different work")
    text = describe_ttt_share(plan(5, 4.4), plan(4, 4.0))
    assert text.endswith("(predicted)")
    assert "TTT costs +10.0% of the step and +1.00 GiB a device (predicted)" in text


def test_a_refused_plan_is_a_page_too():
    text = describe_plan(plan(20, None))
    assert "does not fit by 1.00 GiB" in text and "predicted, not measured" in text


def test_the_page_says_what_has_no_estimate():
    """Half a module's time is unknown: the step is a lower bound, and the page names the operation and what it says."""
    text = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %y = f32[1024]{0} negate(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %z = f32[1024]{0} sort(%y), dimensions={0}
  ROOT %a = f32[1024]{0} copy(%z), backend_config={"estimated_cycles":"20"}
}
"""
    cost = step_cost(parse_module(text), kernel_cost=lambda call: None)
    names = tuple(sorted(f"{item.opcode} at {item.line or item.name}" for item in cost.missing))
    base = plan(5, 2.0, *names)
    assert base.prediction is not None
    priced = dataclasses.replace(base.prediction, unknown_seconds=0.1)
    page = describe_plan(dataclasses.replace(base, cost=cost, prediction=priced))
    assert "predicted step at least 2.00 s" in page and "at most 500 tokens/s/chip, MFU at most 0.200" in page
    assert "2 operations have no estimate (2 of 3 executions in a step)" in page
    assert "Moving their arrays once takes 0.100 s, 5.0% of the time above" in page
    assert "1 x negate y f32[1024] , the compiler wrote 9223372036854775807" in page.replace("  ", " ")
    assert "1 x sort z f32[1024]" in page
    assert cost.cycles == 20 and "9223372036854" not in page.replace("wrote 9223372036854775807", "")


def test_what_carries_no_number_and_moves_little_is_no_bound():
    """In a step of a second on v5e: bookkeeping of a few bytes does not mark a plan, an invalid number does."""

    def item(written: str, size: int, category: str = "other") -> Unpriced:
        return Unpriced("x", "scatter", category, "f32[8]", 2, size, written, f"{category}{size}{written}.py:1")

    cost = step_cost(
        parse_module("HloModule m\n\nENTRY %main () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n"),
        kernel_cost=lambda call: None,
    )
    items = (item("", 10**6), item("", 10**9), item("-1", 8), item("-1", 8, "offloaded"), item("-1", 8, "collective"))
    config = resolve(default_config())
    found = planning._predict(
        config, describe_topology("v5e:4x4", 1), dataclasses.replace(cost, cycles=1.5e9, unpriced=items), ()
    )
    assert found.unknown == (
        "scatter at offloaded8-1.py:1", "scatter at other1000000000.py:1", "scatter at other8-1.py:1",
    )  # fmt: skip
    assert found.unknown_seconds == pytest.approx(2 * (10**6 + 10**9 + 8) / CHIPS["v5e"].device_hbm_bytes_per_second)
