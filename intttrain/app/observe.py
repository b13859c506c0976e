"""What a run says about the machine: model FLOPs utilisation, memory, and traces of chosen steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from intttrain.config import Config
from intttrain.layout.hardware import find_chip
from intttrain.logs.side_channels import ending_nothing
from intttrain.model import model_flops_per_token

PROFILE_FOLDER = "profile"
GIB = 2**30


def utilisation(config: Config, tokens_per_second: float | None) -> float | None:
    """Returns model FLOPs by ``model.FLOP_RULE`` over the bf16 peak of all devices; ``None`` if that is not known."""
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is None or tokens_per_second is None:
        return None
    flops = tokens_per_second * model_flops_per_token(config.model, config.data.seq_len)
    return flops / (chip.device_peak_flops * jax.device_count())


def peak_memory_gib() -> float | None:
    """Returns the most memory that a device of this process has used; ``None`` where devices do not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return max(peaks) / GIB if peaks else None


class StepProfile:
    """A trace of the steps FIRST to LAST of this process, in WORKDIR/profile, for XProf or Perfetto.

    Args:
      steps: (FIRST, LAST), or nothing for no trace.
      workdir: of the run.
      report: receives a line when the trace is there.
    """

    def __init__(self, steps: tuple[int, ...], workdir: Path, report: Callable[[str], None]) -> None:
        self._steps, self._folder, self._report = steps, workdir / PROFILE_FOLDER, report
        self._runs = False

    def before(self, step: int) -> None:
        """Called before ``step`` begins."""
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._runs:
            with ending_nothing("no trace can be made", self._report):
                jax.profiler.start_trace(str(self._folder))
                self._runs = True
            if not self._runs:
                self._steps = ()

    def after(self, step: int, result: jax.Array) -> None:
        """Called with something that ``step`` computes."""
        if self._runs and step >= self._steps[1]:
            result.block_until_ready()
            self.close()

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._runs:
            self._runs, self._steps = False, ()
            with ending_nothing("the trace cannot be written", self._report):
                jax.profiler.stop_trace()
                self._report(f"trace of the chosen steps in {self._folder}")
