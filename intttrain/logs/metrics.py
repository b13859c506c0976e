"""Where training numbers go: the console, ``metrics.jsonl`` and TensorBoard, all behind one ``write``.

Only process 0 writes; on every other process the fan-out is empty, so callers never branch. Values are plain numbers
on the host: reading them off the device (one step late) is the caller's business.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intttrain.config.errors import UserError, reason_of, user_error
from intttrain.logs.goodput import GOODPUT_FILE, GoodputWriter, Stopwatch
from intttrain.logs.progress import Number, Stream, human_count, human_duration
from intttrain.logs.side_channels import KEPT_RECORDS, SideChannel, Writer
from intttrain.logs.streams import print_line, say
from intttrain.logs.weights_and_biases import WandbRun, start_wandb
from intttrain.storage.files import append_line
from intttrain.storage.retries import retried

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# What the console shows, in this order: key, label, how the value is written. Other keys go to the files only,
# except those starting with TTT_PREFIX, which are appended without the prefix.
CONSOLE_COLUMNS: tuple[tuple[str, str, Callable[[Number], str]], ...] = (
    ("loss", "loss", lambda value: f"{value:.4f}"),
    ("grad_norm", "grad", lambda value: f"{value:.3g}"),
    ("learning_rate", "lr", lambda value: f"{value:.2e}"),
    ("tokens_per_second", "tok/s", human_count),
    ("mfu", "mfu", lambda value: f"{value:.1%}"),
    ("eta_seconds", "ETA", human_duration),
)
TTT_PREFIX = "ttt/"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricWriters:
    """Sends every record to all writers; a context manager that closes them."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Records numbers (Python, NumPy or one-element arrays) for ``step``. Raises ``TypeError`` for others."""
        plain = {key: _plain(key, value) for key, value in scalars.items()}
        for writer in self._writers:
            writer.write(step, plain)

    def close(self) -> None:
        """Closes every writer, also when one of them fails; the first failure is raised at the end."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close)

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def make_metric_writers(
    workdir: Path, *, num_steps: int, start_step: int, process_index: int, stream: Stream | None = None,
    stopwatch: Stopwatch | None = None, wandb_run: WandbRun | None = None, report: Callable[[str], None] = say,
) -> MetricWriters:  # fmt: skip
    """Returns the writers of one training run. None of them ends it when it fails later (``SideChannel``).

    Args:
      workdir: receives ``metrics.jsonl`` and ``tensorboard/``; created if missing.
      num_steps: total steps of the run, for the console line.
      start_step: completed steps at the start, 0 for a new run; records of an aborted run after it are dropped.
      process_index: anything but 0 gives writers that write nowhere.
      stream: console, standard output by default.
      stopwatch: of the process, whose times then go to ``goodput.jsonl``.
      wandb_run: names the entry on Weights & Biases, if it is to receive the records too.
      report: receives a line when a writer fails and when it works again.

    Raises:
      UserError: ``workdir`` cannot be written, or Weights & Biases cannot be used; ``PassingError`` if that passes.
    """
    if process_index != 0:
        return MetricWriters(())

    def start(name: str, make: Callable[[], Writer], kept: int = KEPT_RECORDS) -> None:
        writers.append(SideChannel(name, retried(make, f"{name} cannot be opened", report), report, kept=kept))

    writers: list[Writer] = []
    if wandb_run is not None and (entry := start_wandb(wandb_run, workdir, report)) is not None:
        # First: it may refuse, and the others open files.
        writers.append(SideChannel("Weights & Biases", entry, report))
    writers.append(ConsoleWriter(sys.stdout if stream is None else stream, num_steps, report))
    start(METRICS_FILE, lambda: JsonlWriter(workdir / METRICS_FILE, start_step))
    start("TensorBoard's file", lambda: TensorBoardWriter(workdir / TENSORBOARD_FOLDER, start_step))
    if stopwatch is not None:  # its records are cumulative: the newest is enough
        start(GOODPUT_FILE, lambda: GoodputWriter(workdir / GOODPUT_FILE, stopwatch, start_step), kept=1)
    return MetricWriters(writers)


class ConsoleWriter:
    """One compact line per record; records without any console column (an evaluation) print nothing."""

    def __init__(self, stream: Stream | None, num_steps: int, report: Callable[[str], None] = say) -> None:
        self._stream, self._num_steps, self._report = stream, num_steps, report
        self._told = False

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Prints the line of this record, if it has one; says once that nobody sees it."""
        line = console_line(step, self._num_steps, scalars)
        if not line:
            return
        try:
            print_line(line, self._stream)
        except (OSError, ValueError) as error:
            if not self._told:
                self._report(f"warning: lines of steps cannot be shown ({reason_of(error)}); the run goes on")
            self._told = True

    def close(self) -> None:
        """Leaves the stream open: it belongs to whoever passed it."""


def console_line(step: int, num_steps: int, scalars: Mapping[str, Number]) -> str:
    """Returns ``step  20/600  loss 2.3412  grad 0.84  lr 3.00e-03  tok/s 41.2k  ETA 3m12s  delta_ratio 0.31``.

    Columns that are not in ``scalars`` are left out; with none at all the line is empty.
    """
    shown = [f"{label} {text(scalars[key])}" for key, label, text in CONSOLE_COLUMNS if key in scalars]
    ttt_keys = sorted(key for key in scalars if key.startswith(TTT_PREFIX))
    shown += [f"{key.removeprefix(TTT_PREFIX)} {scalars[key]:.3g}" for key in ttt_keys]
    if not shown:
        return ""
    return "  ".join([f"step {step:>{len(str(num_steps))}}/{num_steps}", *shown])


class JsonlWriter:
    """One JSON object per record, appended to a file that survives interruptions.

    Opening it drops, atomically, what an aborted run wrote after ``start_step`` and a half-written last line, so the
    file reads as if the run had never stopped. NaN and infinities, which JSON does not have, become the strings
    "NaN", "Infinity" and "-Infinity"; ``read_metrics`` turns them back.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        with _as_user_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _keep_records_until(path, start_step)
            path.open("a").close()

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Appends one line. Raises ``OSError`` when the disk refuses it."""
        record = {"step": int(step)} | {key: _json_value(value) for key, value in scalars.items()}
        append_line(self._path, json.dumps(record, allow_nan=False))

    def close(self) -> None:
        """Nothing is held open."""


def read_metrics(path: Path) -> list[dict[str, Number]]:
    """Returns the records of a ``metrics.jsonl``, a half-written last line left out.

    Raises:
      UserError: the file cannot be read, or a line before the last one is not a record.
    """
    with _as_user_error(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            if number < len(lines):
                raise UserError(f"{path}:{number} is not a metrics record; delete that line")
            break
        records.append({key: _NON_FINITE[v] if isinstance(v, str) else v for key, v in record.items()})
    return records


class TensorBoardWriter:
    """Scalars for TensorBoard. After a resume TensorBoard itself hides the steps that are written again.

    NaN and infinities are left out: they have no place in a chart, and ``metrics.jsonl`` has them. Points are written
    here and now: the thread of tensorboardX's own writer dies of an error, and training would then wait for it forever.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder, self._start_step, self._files = folder, start_step, 0
        self._events: Any = None
        with _as_user_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._open()

    def _open(self) -> None:
        # Imported here: only the one process that writes pays for it.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        # The suffix keeps two starts, or two files of one start, within one second from having the same name.
        suffix = f".{self._start_step}.{os.getpid()}.{self._files}"
        events = event_file_writer.EventsWriter(str(self._folder / "events"), suffix)
        if self._files == 0:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            events.write_event(event_pb2.Event(wall_time=time.time(), step=self._start_step + 1, session_log=start))
        events.flush()
        self._events, self._files = events, self._files + 1

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Adds one point per finite value, into a new file if the last one failed. Raises ``OSError``."""
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2

        if self._events is None:
            self._open()
        try:
            for key, value in scalars.items():
                if math.isfinite(value):
                    point = summary.scalar(key, value)
                    self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=point))
            self._events.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self.close()
            raise

    def close(self) -> None:
        """Closes the event file."""
        events, self._events = self._events, None
        if events is not None:
            events.close()


def _keep_records_until(path: Path, start_step: int) -> None:
    """Rewrites ``path`` without later or unreadable records; the old file stays until the new one is complete."""
    old = path.read_bytes()
    kept = []
    for line in old.decode("utf-8", errors="replace").splitlines():
        record = _parse(line)
        if record is not None and record["step"] <= start_step:
            kept.append(line + "\n")
    new = "".join(kept).encode("utf-8")
    if new == old:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(new)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _parse(line: str) -> dict[str, Any] | None:
    """Returns the record on ``line``, or ``None`` if it is cut off or something else."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _plain(key: str, value: Any) -> Number:
    """Returns a Python number; ints stay ints. Raises ``TypeError`` for anything with more than one element."""
    if isinstance(value, (bool, int, np.integer)):
        return int(value)
    if np.ndim(value) != 0:
        raise TypeError(f"metric {key!r} has shape {np.shape(value)}; metrics are scalars")
    return float(value)


def _json_value(value: Number) -> Number | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot write metrics to {path}: {reason_of(error)}; free the path or use another --workdir"
        raise user_error(message, error) from error
