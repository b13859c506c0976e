"""Which checkpoints stay: the last ones, some forever, and the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from intttrain.config.training import CheckpointConfig


class KeepBest(policies.PreservationPolicy):
    """Preserves the ``n`` checkpoints with the lowest loss; one without a loss never is among them.

    ``losses`` are looked up, by step, at every decision. Orbax's own ``BestN`` takes them from a file of its own beside
    the arrays; one that is damaged would keep the directory from being opened.
    """

    def __init__(self, n: int, losses: Mapping[int, float | None]) -> None:
        self._n, self._losses = n, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: policies.PreservationContext) -> Sequence[bool]:
        """Returns a decision for each ``PolicyCheckpointInfo``; the earlier of two equally good ones wins."""
        ranked = sorted((loss, c.step) for c in checkpoints if (loss := self._losses.get(c.step)) is not None)
        best = {step for _, step in ranked[: self._n]}
        return [checkpoint.step in best for checkpoint in checkpoints]


def make_policy(config: CheckpointConfig, losses: Mapping[int, float | None]) -> policies.AnyPreservationPolicy:
    """Returns what to keep: whatever one of the rules keeps. ``losses`` may grow later."""
    keep: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_last)]
    if config.keep_every_steps is not None:
        keep.append(policies.EveryNSteps(config.keep_every_steps))
    if config.keep_best is not None:
        keep.append(KeepBest(config.keep_best, losses))
    return policies.AnyPreservationPolicy(keep)
