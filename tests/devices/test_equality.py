"""One device and eight compute the same step, whatever the mesh: loss, every gradient, every new parameter."""

from __future__ import annotations

import pytest

from tests.devices.equality import meshes
from tests.forced_devices import on_eight_cpu_devices

# fp32 sums in another order, over up to 256 tokens: a few times 2^-24 * sqrt(256) relative to the largest entry.
TOLERANCE = {"gradient": 1e-5, "grad_norm": 1e-5, "loss": 2e-6, "row_loss": 2e-6, "params": 1e-5}


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes_and_the_planner_lowers_it() -> None:
    """One test, because all of it comes from one process that compiles for minutes."""
    found = on_eight_cpu_devices("tests.devices.equality")
    assert set(found["distances"]) == {f"{kind} {mesh}" for kind in ("ttt", "dense") for mesh in meshes(kind == "ttt")}
    too_far = {}
    for case, distances in found["distances"].items():
        assert len(distances) > 20 and ("gradient.ttt.conv" in distances) == case.startswith("ttt")
        for name, value in distances.items():
            if not value <= TOLERANCE[name.split(".")[0]]:
                too_far[f"{case} {name}"] = value
    assert not too_far

    assert all(value < 1e-5 for value in found["attention"].values()), found["attention"]

    for planned, trained in found["lowerings"].values():
        assert planned == trained, "the planner lowers another step than training"
        assert "mhlo.num_partitions = 8" in planned and planned.count("sharding") > 50
    assert found["lowerings"]["ttt"] != found["lowerings"]["dense"]
