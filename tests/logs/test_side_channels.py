"""Destinations of metrics that fail while a run goes on."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from intttrain.config.errors import PassingError, UserError
from intttrain.logs import side_channels
from intttrain.logs.metrics import (
    ConsoleWriter,
    JsonlWriter,
    TensorBoardWriter,
    make_metric_writers,
    read_metrics,
)
from intttrain.logs.side_channels import SideChannel, ending_nothing
from intttrain.storage import retries
from intttrain.storage.files import append_line

STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Sink:
    """Remembers steps; raises ``failure`` while there is one."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.failure: Exception | None = None
        self.closed = False

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self.failure is not None:
            raise self.failure
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True
        if self.failure is not None:
            raise self.failure


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that channels would have waited at their end."""
    found: list[float] = []
    monkeypatch.setattr(side_channels.time, "sleep", found.append)
    return found


def test_records_wait_during_an_outage_and_come_in_order() -> None:
    sink, lines = Sink(), list[str]()
    channel = SideChannel("metrics.jsonl", sink, lines.append, clock=float)
    for step in range(1, 8):
        sink.failure = STALE if step in (3, 4, 5) else None
        channel.write(step, {"loss": 1.0})
    channel.close()
    assert sink.steps == list(range(1, 8)) and sink.closed
    assert lines == [
        "warning: metrics.jsonl cannot be written (Stale file handle); the run goes on, and up to 10000 records wait "
        "until it can",
        "metrics.jsonl can be written again; no record is missing",
    ]


def test_an_outage_that_lasts_is_bounded_in_memory_and_told_at_the_end(waits: list[float]) -> None:
    sink, lines = Sink(), list[str]()
    channel = SideChannel("metrics.jsonl", sink, lines.append, kept=3, clock=float)
    sink.failure = FULL
    for step in range(1, 11):
        channel.write(step, {})
    assert len(lines) == 1, "once"
    sink.failure = None
    channel.write(11, {})
    assert sink.steps == [8, 9, 10, 11] and lines[-1] == "metrics.jsonl can be written again; 7 records are missing"
    sink.failure = FULL
    channel.write(12, {})
    channel.close()
    assert lines[-2] == "warning: metrics.jsonl lacks 1 records (No space left on device)"
    assert "could not be closed" in lines[-1] and not waits, "a full disk does not pass"


def test_the_end_waits_a_little_for_what_passes(waits: list[float]) -> None:
    sink = Sink()
    channel = SideChannel("metrics.jsonl", sink, lambda line: None)
    sink.failure = STALE
    channel.write(1, {})
    channel.close()
    assert waits == list(side_channels.LAST_WAITS_S) and sink.closed and sink.steps == []


def test_an_attempt_that_took_long_is_not_made_again_at_every_step() -> None:
    now = [0.0]
    attempts: list[float] = []

    class Slow(Sink):
        def write(self, step: int, scalars: Mapping[str, float]) -> None:
            attempts.append(now[0])
            now[0] += 60
            raise STALE

    channel = SideChannel("metrics.jsonl", Slow(), lambda line: None, clock=lambda: now[0])
    for step in range(100):
        channel.write(step, {})
        now[0] += 30
    assert attempts == [0.0, 660.0, 1320.0, 1980.0, 2640.0][: len(attempts)] and 4 <= len(attempts) <= 6


def test_a_metrics_file_that_was_renamed_or_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, 0)
    writer.write(1, {"loss": 1.0})
    path.rename(tmp_path / "old.jsonl")
    writer.write(2, {"loss": 2.0})
    assert [record["step"] for record in read_metrics(path)] == [2]
    path.unlink()
    writer.write(3, {"loss": 3.0})
    path.unlink()
    path.write_text('{"step": 0}\n')  # somebody else's file
    writer.write(4, {"loss": 4.0})
    assert [record["step"] for record in read_metrics(path)] == [0, 4]
    assert [record["step"] for record in read_metrics(tmp_path / "old.jsonl")] == [1]


def test_a_line_that_was_cut_off_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for before in ("", "one\n", "one\ntw", "cut"):
        path.write_text(before)
        append_line(path, "three")
        assert path.read_text() == before[: before.rfind("\n") + 1] + "three\n"


def test_tensorboard_goes_on_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own writer has a thread that dies of an error, and a queue that is then full for ever."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines: list[str] = []
    writer = TensorBoardWriter(tmp_path, 0)
    channel = SideChannel("TensorBoard", writer, lines.append, clock=float)
    for step in range(1, 60):
        with monkeypatch.context() as patch:
            if 20 <= step < 40:
                patch.setattr(writer._events or writer, "flush" if writer._events else "_open", _raise_stale)
            channel.write(step, {"loss": float(step)})
    channel.close()
    assert len(lines) == 2 and lines[-1] == "TensorBoard can be written again; no record is missing"
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert sorted(set(steps)) == list(range(1, 60)) and len(list(tmp_path.iterdir())) == 2


def _raise_stale(*_: Any) -> None:
    raise STALE


def test_a_console_that_cannot_be_written_is_told_once() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise STALE

    lines: list[str] = []
    console = ConsoleWriter(Closed(), 5, lines.append)
    for step in range(1, 6):
        console.write(step, {"loss": 1.0})
    assert lines == ["warning: lines of steps cannot be shown (Stale file handle); the run goes on"]
    ConsoleWriter(None, 5, lines.append).write(1, {"loss": 1.0})  # a program that was started with it closed
    assert len(lines) == 1


def test_what_cannot_be_opened_at_the_start_is_refused_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "WAITS_S", ())

    def open_with(error: OSError, patch: pytest.MonkeyPatch) -> None:
        opened = Path.open

        def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self.name == "metrics.jsonl":
                raise error
            return opened(self, *args, **kwargs)

        patch.setattr(Path, "open", refuse)
        make_metric_writers(tmp_path, num_steps=1, start_step=0, process_index=0, report=lambda line: None)

    for error, kind in ((FULL, UserError), (STALE, PassingError)):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write metrics") as caught:
            open_with(error, patch)
        assert type(caught.value) is kind


def test_a_block_that_ends_nothing() -> None:
    lines: list[str] = []
    with ending_nothing("no trace can be made", lines.append):
        raise ZeroDivisionError("by what")
    assert lines == ["warning: no trace can be made (by what); the run goes on"]
    with pytest.raises(KeyboardInterrupt), ending_nothing("x", lines.append):
        raise KeyboardInterrupt
