"""A mesh axis is added to the table and to the configuration, and nowhere else: the same step; with less, no step."""

from __future__ import annotations

from tests.devices.test_equality import TOLERANCE
from tests.forced_devices import on_cpu_devices


def test_an_axis_that_is_added_to_the_table_trains_the_same_step() -> None:
    found = on_cpu_devices(4, "tests.devices.added_axis")
    step = found["step"]
    assert len(step) > 20 and "gradient.ttt.conv" in step and "grad_norm" in step
    too_far = {name: value for name, value in step.items() if not value <= TOLERANCE[name.split(".")[0]]}
    assert not too_far

    # A sum that leaves the axis out: unrefused, this step has the same loss and a smaller gradient.
    assert "out_specs" in found["refusal"] and "replica" in found["refusal"], found["refusal"]
