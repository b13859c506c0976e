"""A sum that is missing over a mesh axis, or an order that differs on a mesh, is seen by every run of the tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.devices.test_equality import TOLERANCE
from tests.forced_devices import on_cpu_devices


@pytest.fixture(scope="module")
def found() -> Any:
    return on_cpu_devices(16, "tests.devices.every_axis")


def test_a_mesh_with_all_axes_computes_what_one_device_computes(found: Any) -> None:
    """Loss, losses of rows in their order, gradients, new parameters; gates are drawn for half of the chunks."""
    assert len(found["step"]) > 20 and "gradient.ttt.conv" in found["step"]
    too_far = {name: value for name, value in found["step"].items() if not value <= TOLERANCE[name.split(".")[0]]}
    assert not too_far


def test_the_first_shard_of_a_row_has_no_keys_before_it(found: Any) -> None:
    """In rows of one document the last shard's keys look like the first one's past, but they are its future."""
    assert found["halo"] < 1e-5
