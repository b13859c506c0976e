"""The numbers of every step: read one step late, checked, and written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

from intttrain.app.observe import peak_memory_gib, utilisation
from intttrain.app.skips import BadStep, find_bad_step
from intttrain.config.run_stages import Stage
from intttrain.logs.metrics import MetricWriters
from intttrain.logs.progress import StepTimer
from intttrain.pod.step_times import StepTimes
from intttrain.train import StepMetrics, scalars

STATE_WARNING = 10.0  # |S| / |W0|; healthy runs stay below about 4


class StepLog:
    """Reads metrics one step late, so that the device never waits for the host, and writes them."""

    def __init__(self, stage: Stage, writers: MetricWriters, times: StepTimes, report: Callable[[str], None]):
        self._stage, self._writers, self._report = stage, writers, report
        self._timer, self.times = StepTimer(), times
        self._pending: tuple[int, int, StepMetrics] | None = None
        self._warned = False
        self.last: dict[str, float] = {}

    def begin(self, stage: Stage) -> None:
        """Goes on with another stage, whose steps take another time."""
        self._stage, self._timer = stage, StepTimer()
        self.times.restart()
        self._report(f"{stage}; compiling")

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside this block (evaluation, a blocking save) is not counted as steps."""
        with self._timer.excluded():
            yield
        self.times.restart()

    def read_one_late(self, step: int, cursor: int, metrics: StepMetrics) -> BadStep | None:
        """Takes the metrics of ``step``, which began at ``cursor``, and reads those before.

        Returns a step that was not applied if it met one; the step after it was not either.
        """
        bad = self.read_rest()
        self._pending = None if bad else (step, cursor, metrics)
        return bad

    def read_rest(self) -> BadStep | None:
        """Waits for the step that is still pending and reads it."""
        if self._pending is None:
            return None
        (step, cursor, metrics), self._pending = self._pending, None
        with self.times.waiting():
            numbers = scalars(self._stage.config, metrics)
        if bad := find_bad_step(self._stage, step, cursor, metrics):
            return bad
        self._timer.tick(step)
        self.times.tick()
        self.last = numbers
        self._warn(step, numbers)
        train = self._stage.config.train
        if step % train.log_every_steps == 0 or step == train.num_steps or step == 1:
            hosts, warning = self.times.publish()
            self._writers.write(step, numbers | self._rates() | hosts)
            if warning:
                self._report(warning)
        return None

    def _rates(self) -> dict[str, float]:
        train, tokens = self._stage.config.train, self._stage.tokens_per_step
        rate, left = self._timer.rate(tokens), self._timer.eta_seconds(train.num_steps)
        mfu, memory = utilisation(self._stage.config, rate), peak_memory_gib()
        known = {"tokens_per_second": rate, "mfu": mfu, "eta_seconds": left, "peak_memory_gib": memory}
        return {name: value for name, value in known.items() if value is not None}

    def _warn(self, step: int, numbers: dict[str, float]) -> None:
        """Says once that a fast weight outgrew its base: too large an eta fails silently."""
        largest = max((v for name, v in numbers.items() if name.startswith("ttt/state")), default=0.0)
        if largest > STATE_WARNING and not self._warned and math.isfinite(largest):
            self._warned = True
            self._report(
                f"warning: step {step}: the fast-weight state is {largest:.3g} times W0 (healthy: up to about 4); "
                "model.ttt.eta may be too large"
            )
