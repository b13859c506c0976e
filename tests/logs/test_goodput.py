"""Where the time goes: nested kinds, restarts, work that was lost, and files that a kill left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intttrain.logs import goodput
from intttrain.logs.goodput import GoodputWriter, Stopwatch, summarise_goodput


class Clock:
    """A clock that stands still unless it is told to go on; as monotonic and as wall clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(goodput.time, "time", clock.time)
    return clock


def test_inner_kinds_take_the_time_of_outer_ones(clock: Clock) -> None:
    stopwatch = Stopwatch(clock=clock)
    clock.now += 2
    stopwatch.switch("training")
    clock.now += 10
    with stopwatch.spent_on("saving"):
        clock.now += 3
        with pytest.raises(OSError), stopwatch.spent_on("reading"):
            clock.now += 4
            raise OSError
        clock.now += 1
    clock.now += 5
    wanted = {"starting": 2, "training": 15, "saving": 4, "reading": 4, "compiling": 0, "evaluating": 0}
    assert stopwatch.seconds() == wanted == stopwatch.seconds()


def start(path: Path, clock: Clock, step: int, *, start_s: float, steps: int, seconds_per_step: float) -> None:
    """One start of a run that goes as far as it comes, with a record after every second step."""
    stopwatch = Stopwatch(clock=clock)
    clock.now += start_s
    log = GoodputWriter(path, stopwatch, step)
    stopwatch.switch("training")
    for number in range(step + 1, step + steps + 1):
        clock.now += seconds_per_step
        if number % 2 == 0:
            log.write(number, {})


def test_a_run_that_was_killed_twice(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "goodput.jsonl"
    assert summarise_goodput(path) is None
    start(path, clock, 0, start_s=10, steps=8, seconds_per_step=5)  # 50 s
    clock.now += 100
    start(path, clock, 5, start_s=20, steps=1, seconds_per_step=5)  # steps 6 to 8 are lost: 15 s
    with path.open("a") as file:
        file.write('{"start": 2, "step"')  # killed
    clock.now += 40
    start(path, clock, 6, start_s=30, steps=2, seconds_per_step=10)
    found = summarise_goodput(path)
    assert found is not None and found.starts == 3 and found.total_s == pytest.approx(clock.now - 1000)
    wanted = {
        "training": 25 + 5 + 20,
        "starting": 60,
        "lost": 15,
        "down": 140,
        "compiling": 0,
        "reading": 0,
        "saving": 0,
    }
    assert {kind: found.seconds[kind] for kind in wanted} == pytest.approx(wanted)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.line() == "goodput 18.9% of 4m25s in 3 starts; down 52.8%, starting 22.6%, lost 5.7%"
    assert [json.loads(line)["start"] for line in path.read_text().splitlines() if line.endswith("}")][-1] == 3


def test_records_of_another_kind_are_passed_over(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "goodput.jsonl"
    content: list[Any] = [1, {"start": 1}, "x"]
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    start(path, clock, 0, start_s=1, steps=2, seconds_per_step=2)
    found = summarise_goodput(path)
    assert found is not None and found.line() == "goodput 80.0% of 5.0s in 1 start; starting 20.0%"
