"""Which process holds up the others, by its own time; with a clock by hand and the store of several processes."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import pytest

from intttrain.pod.step_times import WINDOW, StepTimes
from tests.pod.shelf import Shelf

HOST = socket.gethostname()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Three:
    """Processes whose steps take one second together; ``own`` of it is each one's own."""

    def __init__(self) -> None:
        self.clock, documents = Clock(), dict[tuple[str, int], dict[str, Any]]()
        self.all = [StepTimes(Shelf(index, documents), clock=self.clock) for index in range(3)]
        for times in self.all:
            times.tick()

    def steps(self, count: int, own: tuple[float, float, float], step_s: float = 1.0) -> None:
        for _ in range(count):
            began = self.clock.now
            for times, own_s in zip(self.all, own, strict=True):
                self.clock.now = began + own_s
                with times.waiting():
                    self.clock.now = began + step_s
                times.tick()

    def publish(self) -> tuple[dict[str, float], str]:
        for times in self.all[1:]:
            assert times.publish() == ({}, "")
        return self.all[0].publish()


@pytest.fixture
def three() -> Three:
    return Three()


def test_the_one_that_does_not_wait_is_named_once(three: Three) -> None:
    three.steps(WINDOW, (0.1, 0.2, 0.95))
    numbers, warning = three.publish()
    assert numbers == pytest.approx({"hosts/own_seconds": 0.95, "hosts/own_seconds_median": 0.2, "hosts/slowest": 2})
    assert warning.startswith(
        f"warning: process 2 (host {HOST}) holds up the others: 950 ms of its steps of 1.0s are its own, 200 ms in the "
        "median process"
    )
    three.steps(1, (0.1, 0.2, 0.95))
    assert three.publish()[1] == "", "once is enough"
    three.steps(WINDOW, (0.1, 0.95, 0.2))
    numbers, warning = three.publish()
    assert numbers["hosts/slowest"] == 1 and "process 1" in warning, "another one, and what was is forgotten"


@pytest.mark.parametrize(
    "own",
    [
        (0.1, 0.1, 0.7),  # more than the others, but the device takes longer
        (0.95, 0.95, 0.98),  # all are busy: nobody waits for anybody
        (0.0, 0.0, 0.0),
    ],
)
def test_no_warning(own: tuple[float, float, float], three: Three) -> None:
    three.steps(2 * WINDOW, own)
    assert three.publish()[1] == ""


def test_neither_a_few_steps_nor_a_hiccup(three: Three) -> None:
    three.steps(WINDOW - 1, (0.1, 0.1, 0.95))
    assert three.publish()[1] == ""
    three.steps(2 * WINDOW, (0.1, 0.1, 0.1))
    three.steps(1, (0.1, 0.1, 30.0), step_s=30.1)
    numbers, warning = three.publish()
    assert warning == "" and numbers["hosts/own_seconds"] == pytest.approx(0.1)


def test_two_processes_of_which_one_is_slow() -> None:
    clock, documents = Clock(), dict[tuple[str, int], dict[str, Any]]()
    first, second = (StepTimes(Shelf(index, documents), clock=clock) for index in range(2))
    for _ in range(WINDOW + 1):
        with first.waiting():
            clock.now += 1
        first.tick()
        second.tick()
    second.publish()
    numbers, warning = first.publish()
    assert numbers["hosts/slowest"] == 1 and numbers["hosts/own_seconds_median"] == 0 and "process 1" in warning


def test_saving_and_compiling_belong_to_no_step(three: Three) -> None:
    three.steps(3, (0.1, 0.1, 0.1))
    three.clock.now += 500
    for times in three.all:
        times.restart()
        times.tick()
    three.steps(1, (0.1, 0.1, 0.1))
    three.publish()
    found = three.all[0].summary()["1"]
    assert found["host"] == HOST
    assert sum(found["step"]["steps_by_seconds"].values()) == 4
    assert found["step"]["max"] == pytest.approx(1.0, rel=0.12)
    assert found["own"]["median"] == pytest.approx(0.1, rel=0.12)


def test_histograms_of_a_process_that_is_alone() -> None:
    clock = Clock()
    times = StepTimes(None, clock=clock)
    assert times.summary() == {
        "0": {"host": HOST, "step": {"steps_by_seconds": {}}, "own": {"steps_by_seconds": {}}}
    }, "no step yet"
    times.tick()
    for seconds in [0.02] * 98 + [0.5, 3.0]:
        clock.now += seconds
        times.tick()
    assert times.publish() == ({}, "")
    step = times.summary()["0"]["step"]
    assert list(step) == ["median", "p99", "max", "steps_by_seconds"]
    assert [step[name] for name in ("median", "p99", "max")] == pytest.approx([0.02, 3.0, 3.0], rel=0.12)
    assert list(step["steps_by_seconds"].values()) == [98, 1, 1]


def test_process_0_that_is_gone_is_left_to_the_watchdog() -> None:
    class Gone(Shelf):
        def put(self, folder: str, document: Mapping[str, Any]) -> None:
            raise RuntimeError("UNAVAILABLE")

    times = StepTimes(Gone(1, {}), clock=Clock())
    times.tick()
    times.tick()
    assert times.publish() == ({}, "")
