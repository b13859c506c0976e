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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from intttrain.core.errors import UserError
from intttrain.core.goodput import GOODPUT_FILE, GoodputWriter, Stopwatch
from intttrain.core.progress import Number, Stream, human_count, human_duration
from intttrain.core.weights_and_biases import WandbWriter
from intttrain.core.workdir import Place

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


@runtime_checkable
class Writer(Protocol):
    """A destination of metrics."""

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Records ``scalars`` as the state after ``step`` completed steps."""

    def flush(self) -> None:
        """Makes everything written so far visible to other programs."""

    def close(self) -> None:
        """Flushes and releases the destination; harmless when repeated."""


class MetricWriters:
    """Sends every record to all writers; a context manager that closes them."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Records numbers (Python, NumPy or one-element arrays) for ``step``.

        Raises:
          UserError: a destination cannot be written.
          TypeError: a value is not a scalar.
        """
        plain = {key: _plain(key, value) for key, value in scalars.items()}
        for writer in self._writers:
            writer.write(step, plain)

    def flush(self) -> None:
        """Flushes every writer."""
        for writer in self._writers:
            writer.flush()

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
    stopwatch: Stopwatch | None = None, wandb_project: str | None = None, name: str = "",
    place: Place | None = None,
) -> MetricWriters:  # fmt: skip
    """Returns the writers of one training run.

    Args:
      workdir: receives ``metrics.jsonl`` and ``tensorboard/``; created if missing.
      num_steps: total steps of the run, for the console line.
      start_step: completed steps at the start, 0 for a new run; records of an aborted run after it are dropped.
      process_index: anything but 0 gives writers that write nowhere.
      stream: console, standard output by default.
      stopwatch: of the process, whose times then go to ``goodput.jsonl``.
      wandb_project, name: project of Weights & Biases, and the name of the run there.
      place: of the run, if its files are copied from ``workdir`` to another one.

    Raises:
      UserError: ``workdir`` cannot be written, or Weights & Biases does not start.
    """
    if process_index != 0:
        return MetricWriters(())
    with _as_user_error(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    writers: list[Writer] = []
    if wandb_project is not None:
        # First: it may refuse, and the others open files.
        writers.append(WandbWriter(wandb_project, name, workdir, workdir if place is None else place))
    writers += [
        ConsoleWriter(sys.stdout if stream is None else stream, num_steps),
        JsonlWriter(workdir / METRICS_FILE, start_step),
        TensorBoardWriter(workdir / TENSORBOARD_FOLDER, start_step),
    ]
    if stopwatch is not None:
        writers.append(GoodputWriter(workdir / GOODPUT_FILE, stopwatch, start_step))
    return MetricWriters(writers)


class ConsoleWriter:
    """One compact line per record; records without any console column (an evaluation) print nothing."""

    def __init__(self, stream: Stream, num_steps: int) -> None:
        self._stream, self._num_steps = stream, num_steps

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Prints the line of this record, if it has one."""
        line = console_line(step, self._num_steps, scalars)
        if line:
            print(line, file=self._stream, flush=True)

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()

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
            if path.exists():
                _keep_records_until(path, start_step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Appends one line. Raises ``UserError`` when the disk refuses it."""
        record = {"step": int(step)} | {key: _json_value(value) for key, value in scalars.items()}
        with _as_user_error(self._path):
            # One write of one whole line, handed to the system at once: an interruption costs at most that line.
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def flush(self) -> None:
        """Hands everything to the system."""
        with _as_user_error(self._path):
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with _as_user_error(self._path):
            self._file.close()


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

    NaN and infinities are left out: they have no place in a chart, and ``metrics.jsonl`` has them.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        # Imported here: only the one process that writes pays for it.
        import tensorboardX

        self._folder = folder
        with _as_user_error(folder):
            # The suffix keeps two starts within one second from writing over the same file.
            suffix = f".{start_step}.{os.getpid()}"
            self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start_step + 1, filename_suffix=suffix)

    def write(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Adds one point per finite value."""
        with _as_user_error(self._folder):
            for key, value in scalars.items():
                if math.isfinite(value):
                    self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        """Makes the points visible to TensorBoard."""
        with _as_user_error(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        with _as_user_error(self._folder):
            self._writer.close()


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
        reason = error.strerror or str(error)
        raise UserError(f"cannot write metrics to {path}: {reason}; free the path or use another --workdir") from error
