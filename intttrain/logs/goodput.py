"""Where the wall clock of a run goes, over all its starts: steps, compilation, reading, saving, and what was lost.

    with goodput.spent_on("reading"):
        batch = next(batches)

The first process measures and appends cumulative records to WORKDIR/goodput.jsonl. A run that is killed loses the time
since its last record; the summary counts that, and the time until the next start, as down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from intttrain.config.errors import reason_of, user_error
from intttrain.logs.progress import Clock, Number, human_duration
from intttrain.storage.files import append_line

GOODPUT_FILE = "goodput.jsonl"
# What a process does. Time that is given to nothing else belongs to steps, "training".
KINDS = ("training", "starting", "compiling", "reading", "saving", "evaluating")


class Stopwatch:
    """Seconds by kind since it was made; kinds nest, and the inner one gets the time."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._kind, self._since = "starting", clock()
        self._seconds = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as ``kind``."""
        before = self._kind
        self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, kind: str) -> None:
        """Counts the time from now on as ``kind``, one of ``KINDS``."""
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def seconds(self) -> dict[str, float]:
        """Returns what was counted so far."""
        self.switch(self._kind)
        return dict(self._seconds)


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the time of a run went.

    Attributes:
      starts: how often it was started.
      total_s: from its first start to its last record.
      seconds: by kind; besides ``KINDS`` there are ``lost``, steps that were made again after a start (not in
        ``training``), and ``down``, when no process ran.
    """

    starts: int
    total_s: float
    seconds: Mapping[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the total, which add up to 1; ``training`` is the goodput."""
        return {kind: s / self.total_s if self.total_s else 0.0 for kind, s in self.seconds.items()}

    def line(self) -> str:
        """Returns one line for people."""
        shares = {kind: share for kind, share in self.shares.items() if kind != "training" and share >= 0.0005}
        rest = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(shares.items(), key=lambda item: -item[1]))
        starts = "1 start" if self.starts == 1 else f"{self.starts} starts"
        return f"goodput {self.shares['training']:.1%} of {human_duration(self.total_s)} in {starts}" + (
            f"; {rest}" if rest else ""
        )


class GoodputWriter:
    """Appends records of one start of a run to ``path``; a record is cumulative, so the last one counts.

    Args:
      path: the file.
      stopwatch: of this process.
      step: completed steps at the start.

    Raises:
      UserError: the file cannot be written.
    """

    def __init__(self, path: Path, stopwatch: Stopwatch, step: int) -> None:
        self._path, self._stopwatch, self._step = path, stopwatch, step
        self._start = 1 + max((record["start"] for record in _read(path)), default=0)
        try:
            self.write(step, {})
        except OSError as error:
            raise user_error(f"cannot write {path}: {reason_of(error)}; free the path", error) from None

    def write(self, step: int, _: Mapping[str, Number]) -> None:
        """Appends what was counted when ``step`` was completed. Raises ``OSError`` if the disk refuses it."""
        self._step = step
        seconds = {kind: round(s, 3) for kind, s in self._stopwatch.seconds().items()}
        record = {"start": self._start, "step": step, "time": round(time.time(), 3), "seconds": seconds}
        append_line(self._path, json.dumps(record))

    def close(self) -> None:
        """Appends what came after the last record."""
        self.write(self._step, {})


def summarise_goodput(path: Path) -> Goodput | None:
    """Returns where the time of all starts went, ``None`` without a record."""
    by_start: dict[int, list[dict[str, Any]]] = {}
    for record in _read(path):
        by_start.setdefault(record["start"], []).append(record)
    if not by_start:
        return None
    starts = [by_start[number] for number in sorted(by_start)]
    seconds = dict.fromkeys((*KINDS, "lost", "down"), 0.0)
    for records, after in zip(starts, [*starts[1:], None], strict=True):
        last = records[-1]
        for kind, value in last["seconds"].items():
            seconds[kind] += value
        if after is not None:
            lost = last["seconds"]["training"] - _step_seconds(records, after[0]["step"])
            seconds["lost"] += lost
            seconds["training"] -= lost
            began = after[0]["time"] - sum(after[0]["seconds"].values())
            seconds["down"] += max(0.0, began - last["time"])
    return Goodput(len(starts), sum(seconds.values()), seconds)


def _step_seconds(records: Sequence[Mapping[str, Any]], step: int) -> float:
    """Returns the time that the steps up to ``step`` took in one start, between records in proportion."""
    before = records[0]
    for record in records:
        if record["step"] > step:
            here, there = record["seconds"]["training"], before["seconds"]["training"]
            share = max(0, step - before["step"]) / (record["step"] - before["step"])
            return float(there + share * (here - there))
        before = record
    return float(before["seconds"]["training"])


def _read(path: Path) -> list[dict[str, Any]]:
    """Returns the records; a line that is cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"start", "step", "time", "seconds"} <= record.keys():
                found.append(record)
    return found
