"""Rows that are cut over devices: every case, in value and every gradient, and the mistakes that must be seen."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.forced_devices import on_eight_cpu_devices
from tests.ttt.cases import CASES
from tests.ttt.sharded import FAULTS, FEW, MESHES, name_of, runs_on

# fp32 sums of at most 16 x 12 products in another order, on both sides.
FP32 = 2e-5
SPECTRAL = 2e-3  # as exact as 12 power iterations converge


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    return on_eight_cpu_devices("tests.ttt.sharded", *FEW, "faults")


def test_shards_compute_what_one_device_computes(found: dict[str, dict[str, float]]) -> None:
    check(found, FEW, (f"fault {fault}" for fault in FAULTS))


@pytest.mark.slow
def test_on_all_other_meshes() -> None:
    others = [mesh for mesh in MESHES if mesh not in FEW]
    check(on_eight_cpu_devices("tests.ttt.sharded", *others), others)


def check(found: dict[str, dict[str, float]], meshes: Iterable[str], besides: Iterable[str] = ()) -> None:
    """Holds every comparison on these meshes to its tolerance; all that can be made have to be there."""
    wanted = [
        name_of(mesh, case, fresh=fresh)
        for mesh in meshes
        for case in CASES
        for fresh in (False, True)
        if runs_on(case, mesh, fresh=fresh)
    ]
    assert set(found) == {*wanted, *besides} and len(wanted) > 10
    too_far = {
        f"{case} {name}": value
        for case in wanted
        for name, value in found[case].items()
        if not value <= (SPECTRAL if "spectral" in case else FP32)
    }
    assert not too_far
    always = {"z", "v", "gates", "eta", "s_in", "w_down", "o_BTD"}
    assert all(always | (set() if "fresh" in case else {"state"}) <= found[case].keys() for case in wanted)


# What each mistake spoils first.
SPOILED = {
    "restart": ("o_BTD", "z"),
    "inclusive": ("o_BTD", "z"),
    "forgets_documents": ("o_BTD",),
    "no_sum_of_eta": ("eta",),
    "forward_order_backward": ("v", "s_in"),
    "stored_order": ("o_BTD", "z"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(found: dict[str, dict[str, float]], fault: str) -> None:
    for name in SPOILED[fault]:
        assert found[f"fault {fault}"][name] > 1e-2, name
