"""Evaluation on meshes of devices gives what one device gives."""

from __future__ import annotations

import pytest

from tests.evals.sharded import MESHES
from tests.forced_devices import on_eight_cpu_devices


@pytest.mark.slow
def test_every_mesh_scores_as_one_device() -> None:
    found = on_eight_cpu_devices("tests.evals.sharded")
    assert set(found) == {f"{kind} {mesh}" for kind in ("ttt", "dense") for mesh in MESHES}
    assert all("state_norm" in values for name, values in found.items() if name.startswith("ttt"))
    for name, values in found.items():
        assert values["weight"] == 0, name
        assert all(value < 2e-5 for value in values.values()), (name, values)
