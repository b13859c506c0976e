"""Runs a stack of layers as few scans, whatever the set of TTT layers.

The layers are written as runs of equal kind and repeated groups of runs are found, so "every sixth of 36" is
one scan over six groups of (one TTT layer, a scan over five dense ones). The compiled program does not grow with
depth (``docs/decisions/0004``).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from intttrain.layout.scan import scan

Tree = Any
# block(carry, layer inputs, TTT inputs or None) -> carry, layer outputs, TTT outputs or None
Block = Callable[[Tree, Tree, Tree | None], tuple[Tree, Tree, Tree | None]]


@dataclasses.dataclass(frozen=True)
class Run:
    """``length`` consecutive layers of one kind."""

    has_ttt: bool
    length: int


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of runs that occurs ``repeats`` times in a row."""

    runs: tuple[Run, ...]
    repeats: int

    @property
    def layers(self) -> int:
        """Layers in one repetition."""
        return sum(run.length for run in self.runs)

    @property
    def ttt_layers(self) -> int:
        """TTT layers in one repetition."""
        return sum(run.length for run in self.runs if run.has_ttt)


def plan_groups(num_layers: int, ttt_layers: tuple[int, ...]) -> tuple[Group, ...]:
    """Returns the groups that cover layers 0 to ``num_layers - 1`` in order."""
    kinds = [layer in set(ttt_layers) for layer in range(num_layers)]
    runs = [Run(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
    groups: list[Group] = []
    start = 0
    while start < len(runs):
        period, repeats = _longest_repetition(runs[start:])
        groups.append(Group(tuple(runs[start : start + period]), repeats))
        start += period * repeats
    return tuple(groups)


def _longest_repetition(runs: list[Run]) -> tuple[int, int]:
    """Returns (period, repeats >= 2) of the prefix repetition that covers most runs, else (1, 1)."""
    best = (1, 1)
    for period in range(1, len(runs) // 2 + 1):
        repeats = 1
        while runs[repeats * period : (repeats + 1) * period] == runs[:period]:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def scan_layers(
    groups: tuple[Group, ...], block: Block, carry: Tree, layer_inputs: Tree, ttt_inputs: Tree
) -> tuple[Tree, Tree, Tree]:
    """Applies ``block`` to every layer in order.

    Args:
      groups: from ``plan_groups``.
      block: one layer. Its TTT inputs are ``None`` in a dense layer, and it must return ``None`` TTT outputs there.
      carry: what passes from layer to layer.
      layer_inputs: pytree with one leading entry per layer.
      ttt_inputs: pytree with one leading entry per TTT layer.

    Returns:
      The last carry and the stacked layer and TTT outputs (``None`` where a block returned none).
    """
    layer_parts, ttt_parts = [], []
    for group, *inputs in group_inputs(groups, layer_inputs, ttt_inputs):
        body = _group_body(group.runs, block)
        carry, (layer_out, ttt_out) = scan(body, carry, tuple(inputs), group.repeats)
        layer_parts.append(unfold(layer_out))
        if group.ttt_layers:
            ttt_parts.append(unfold(ttt_out))
    return carry, join(layer_parts), join(ttt_parts)


def group_inputs(groups: tuple[Group, ...], layer_inputs: Tree, ttt_inputs: Tree) -> Iterator[tuple[Group, Tree, Tree]]:
    """Yields each group with its inputs, leading axes: repeats, layers of one repetition."""
    layer_at = ttt_at = 0
    for group in groups:
        layers, ttts = group.repeats * group.layers, group.repeats * group.ttt_layers
        yield (
            group,
            _fold(_cut(layer_inputs, layer_at, layers), group.repeats),
            _fold(_cut(ttt_inputs, ttt_at, ttts), group.repeats),
        )
        layer_at, ttt_at = layer_at + layers, ttt_at + ttts


def run_inputs(runs: tuple[Run, ...], layer_inputs: Tree, ttt_inputs: Tree) -> list[tuple[Tree, Tree | None]]:
    """Returns the inputs of each run of one repetition."""
    found = []
    layer_at = ttt_at = 0
    for run in runs:
        ttts = _cut(ttt_inputs, ttt_at, run.length) if run.has_ttt else None
        found.append((_cut(layer_inputs, layer_at, run.length), ttts))
        layer_at, ttt_at = layer_at + run.length, ttt_at + run.length * run.has_ttt
    return found


def _group_body(runs: tuple[Run, ...], block: Block) -> Callable[[Tree, Tree], tuple[Tree, Tree]]:
    """Returns the scan body of one group: its runs one after the other, each a scan over its layers."""

    def step(carry: Tree, pair: Tree) -> tuple[Tree, Tree]:
        carry, layer_out, ttt_out = block(carry, *pair)
        return carry, (layer_out, ttt_out)

    def body(carry: Tree, inputs: Tree) -> tuple[Tree, Tree]:
        layer_parts, ttt_parts = [], []
        for run, pair in zip(runs, run_inputs(runs, *inputs), strict=True):
            carry, (layer_out, ttt_out) = scan(step, carry, pair, run.length)
            layer_parts.append(layer_out)
            if run.has_ttt:
                ttt_parts.append(ttt_out)
        return carry, (join(layer_parts), join(ttt_parts))

    return body


def _cut(tree: Tree, start: int, count: int) -> Tree:
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, start + count), tree)


def _fold(tree: Tree, repeats: int) -> Tree:
    return jax.tree.map(lambda x: x.reshape(repeats, x.shape[0] // repeats, *x.shape[1:]), tree)


def unfold(tree: Tree) -> Tree:
    """Merges the two leading axes."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def join(parts: list[Tree]) -> Tree:
    """Concatenates along the leading axis; no parts give ``None``."""
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
