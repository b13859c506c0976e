"""Metric writers and step timing."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.logs.metrics import JsonlWriter, MetricWriters, console_line, make_metric_writers, read_metrics
from intttrain.logs.progress import Progress, StepTimer, human_count, human_duration


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write_run(path: Path, steps: range, *, start_step: int = 0, value: float = 1.0) -> None:
    writer = JsonlWriter(path, start_step)
    for step in steps:
        writer.write(step, {"loss": value})
    writer.close()


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_console_line_shows_known_columns_in_order_and_ttt_norms_last():
    scalars = {"ttt/delta_ratio": 0.3125, "eta_seconds": 192.0, "loss": 2.34121, "tokens_per_second": 41234.0,
               "grad_norm": 0.8401, "learning_rate": 3e-3, "other": 1.0}  # fmt: skip
    expected = "step  20/600  loss 2.3412  grad 0.84  lr 3.00e-03  tok/s 41.2k  ETA 3m12s  delta_ratio 0.312"
    assert console_line(20, 600, scalars) == expected


def test_console_line_without_a_column_is_empty():
    assert console_line(20, 600, {"heldout/loss": 1.0}) == ""


def test_only_process_0_writes(tmp_path):
    stream = io.StringIO()
    with make_metric_writers(tmp_path / "run", num_steps=5, start_step=0, process_index=1, stream=stream) as writers:
        writers.write(1, {"loss": 1.0})
    assert stream.getvalue() == "" and not (tmp_path / "run").exists()


def test_all_destinations_receive_the_values(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stream = io.StringIO()
    with make_metric_writers(tmp_path, num_steps=5, start_step=0, process_index=0, stream=stream) as writers:
        writers.write(1, {"loss": np.float32(1.5), "grad_norm": math.nan})
        writers.write(2, {"loss": 1.25})
    assert stream.getvalue().splitlines() == ["step 1/5  loss 1.5000  grad nan", "step 2/5  loss 1.2500"]
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1.5, 1.25]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5), (2, 1.25)]
    assert events.Tags()["scalars"] == ["loss"]  # the NaN has no point in the chart


def test_tensorboard_hides_the_steps_of_an_aborted_run(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start_step, steps, value in ((0, (1, 2, 3), 1.0), (2, (3, 4), 9.0)):
        with make_metric_writers(
            tmp_path, num_steps=5, start_step=start_step, process_index=0, stream=io.StringIO()
        ) as writers:
            for step in steps:
                writers.write(step, {"loss": value})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, 0)
    writer.write(3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})
    writer.close()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 3, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5
    }  # fmt: skip
    (record,) = read_metrics(path)
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_resume_drops_later_records_and_keeps_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 8))
    write_run(path, range(5, 7), start_step=4, value=2.0)
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\x00\x00\x00", "[1]\n", "{}\n"])
def test_resume_tolerates_a_half_written_last_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 3))
    with path.open("a") as file:
        file.write(torn)
    write_run(path, range(4, 5), start_step=3)
    kept = [1, 2, 3, 4] if torn.endswith("}") else [1, 2, 4]
    assert steps_in(path) == kept


def test_resume_never_leaves_the_file_half_rewritten(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 8))
    before = path.read_bytes()

    def no_space(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device"):
        JsonlWriter(path, 2)
    assert path.read_bytes() == before


def test_a_file_without_later_records_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 3))
    inode = path.stat().st_ino
    write_run(path, range(3, 4), start_step=2)
    assert path.stat().st_ino == inode and steps_in(path) == [1, 2, 3]


def test_reader_leaves_out_a_torn_last_line_and_refuses_one_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 "):
        read_metrics(path)


def test_unusable_workdir_is_one_line(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write metrics to .*run"):
        make_metric_writers(tmp_path / "run", num_steps=1, start_step=0, process_index=0, stream=io.StringIO())


def test_an_array_is_not_a_metric():
    with pytest.raises(TypeError, match=r"'loss' has shape \(2,\)"):
        MetricWriters(()).write(1, {"loss": np.zeros(2)})  # type: ignore[dict-item]


def test_every_writer_is_closed_even_if_one_fails():
    closed = []

    class Failing:
        def __init__(self, name: str) -> None:
            self.name = name

        def write(self, step, scalars):
            pass

        def close(self):
            closed.append(self.name)
            if self.name == "first":
                raise UserError("first failed")

    with pytest.raises(UserError, match="first failed"):
        MetricWriters([Failing("first"), Failing("second")]).close()
    assert closed == ["first", "second"]


def test_step_timer_leaves_out_compilation_and_forgets_old_steps():
    clock = FakeClock()
    timer = StepTimer(window=2, clock=clock)
    clock.now += 60.0  # compilation
    timer.tick(1)
    assert timer.seconds_per_step() is None and timer.rate(10) is None and timer.eta_seconds(9) is None
    for step, seconds in ((2, 5.0), (3, 2.0), (5, 6.0)):
        clock.now += seconds
        timer.tick(step)
    assert timer.seconds_per_step() == pytest.approx(8.0 / 3)  # steps 3, 4 and 5; the slow step 2 has left the window
    assert timer.rate(1000) == pytest.approx(375.0)
    assert timer.eta_seconds(11) == pytest.approx(16.0)
    assert timer.eta_seconds(5) == 0.0


def test_step_timer_does_not_count_excluded_time():
    clock = FakeClock()
    timer = StepTimer(clock=clock)
    timer.tick(1)
    clock.now += 2.0
    with timer.excluded():
        clock.now += 30.0
    timer.tick(2)
    assert timer.seconds_per_step() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="must increase"):
        timer.tick(2)


def test_progress_prints_now_and_then():
    clock, stream = FakeClock(), io.StringIO()
    progress = Progress("tokenize", total=200, every_seconds=5.0, stream=stream, clock=clock)
    for _ in range(10):
        clock.now += 1.0
        progress.advance(10)
    assert stream.getvalue().splitlines() == [
        "tokenize 50/200 (25%)  10/s  ETA 15s",
        "tokenize 100/200 (50%)  10/s  ETA 10s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4s"), (9.96, "10s"), (59.6, "1m00s"), (192, "3m12s"), (3599.7, "1h00m"), (3720, "1h02m"),
     (86399, "1d00h"), (2 * 86400 + 3 * 3600, "2d03h"), (math.nan, "?"), (math.inf, "?"), (-1, "?")],
)  # fmt: skip
def test_human_duration(seconds, text):
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (812.4, "812"), (999.6, "1.00k"), (41234, "41.2k"), (3.05e6, "3.05M"), (123456, "123k"), (7e12, "7T"),
     (math.nan, "?")],
)  # fmt: skip
def test_human_count(value, text):
    assert human_count(value) == text
