"""The layers of a model for training: ``layer_groups.scan_layers`` with a gradient that stores each activation once.

JAX's gradient of a scan in a scan stacks what the inner one keeps for the backward pass, then copies that stack into
the one of the outer scan, and back again: with a few TTT layers among many dense ones, most of what is kept. Here one
buffer per run of layers lies outside of both loops, and every layer writes what it keeps to its own place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from intttrain.layout.scan import scan
from intttrain.model.layer_groups import Group, Run, group_inputs, join, run_inputs, scan_layers, unfold

Tree = Any
# block(carry, shared, layer inputs, TTT inputs or None) -> carry, TTT outputs (without gradient) or None
Block = Callable[[Tree, Tree, Tree, Tree | None], tuple[Tree, Tree | None]]


def apply_layers(
    groups: tuple[Group, ...], block: Block, carry: Tree, shared: Tree, layer_inputs: Tree, ttt_inputs: Tree
) -> tuple[Tree, Tree]:
    """Applies ``block`` to every layer in order.

    Args:
      groups: from ``plan_groups``.
      block: one layer, under ``jax.checkpoint`` if it shall keep less than everything. It must not refer to traced
        values other than its arguments.
      carry: what passes from layer to layer.
      shared: what every layer sees; leaves that are not floating point, and those that no layer differentiates, are
        welcome.
      layer_inputs, ttt_inputs: pytrees with one leading entry per layer, or per TTT layer.

    Returns:
      The last carry and the stacked TTT outputs (``None`` without TTT layers).

    This one has JAX's own gradient, which also keeps activations in the memory of the host; ``train_layers`` has ours.
    """

    def step(carry: Tree, layer: Tree, ttt: Tree | None) -> tuple[Tree, None, Tree | None]:
        carry, output = block(carry, shared, layer, ttt)
        return carry, None, output

    carry, _, outputs = scan_layers(groups, step, carry, layer_inputs, ttt_inputs)
    return carry, outputs


def train_layers(
    groups: tuple[Group, ...], block: Block, carry: Tree, shared: Tree, layer_inputs: Tree, ttt_inputs: Tree
) -> tuple[Tree, Tree]:
    """``apply_layers`` with a gradient of its own; arguments and results as there."""
    # Traced as one function: what ``jax.vjp`` keeps must not depend on which arguments happen to be known numbers.
    apply = jax.jit(functools.partial(_train_layers, groups, block), inline=True)
    return apply(carry, shared, layer_inputs, ttt_inputs)


_train_layers = jax.custom_vjp(apply_layers, nondiff_argnums=(0, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a run of layers keeps in all repetitions; leading axis: repeats x length.

    Attributes:
      carry: what came into each layer.
      pull: the function from ``jax.vjp`` without its arguments, and with stacks in the place of its other residuals.
    """

    carry: Tree
    pull: Any

    def put(self, carry: Tree, pull: Any, at: jax.Array) -> _Kept:
        """Writes what a layer keeps, its input and the residuals of its ``pull``."""
        stacks = (self.carry, self.pull.opaque_residuals)
        put = lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, at, axis=0)  # noqa: E731
        carries, stacked = jax.tree.map(put, stacks, (carry, pull.opaque_residuals))
        return _Kept(carries, dataclasses.replace(self.pull, opaque_residuals=stacked))

    def take(self, shared: Tree, layer: Tree, ttt: Tree | None, at: jax.Array) -> Callable[[Tree], tuple[Tree, ...]]:
        """Returns the function that pulls a layer's gradient back to its arguments."""
        take = lambda stack: jax.lax.dynamic_index_in_dim(stack, at, keepdims=False)  # noqa: E731
        carry, residuals = jax.tree.map(take, (self.carry, self.pull.opaque_residuals))
        return dataclasses.replace(self.pull, args_res=[carry, shared, layer, ttt], opaque_residuals=residuals)


def _room(block: Block, run: Run, repeats: int, carry: Tree, shared: Tree, layers: Tree, ttts: Tree | None) -> _Kept:
    """Returns the empty stacks of a run."""

    def bare_pull(*arguments: Tree) -> Any:
        _, pull, _ = jax.vjp(block, *arguments, has_aux=True)
        return dataclasses.replace(pull, args_res=[None] * len(arguments))  # type: ignore[type-var]

    first = jax.tree.map(lambda x: x[0], (layers, ttts))
    wanted = _Kept(carry, jax.eval_shape(bare_pull, carry, shared, *first))
    return jax.tree.map(lambda x: jax.lax.empty((repeats * run.length, *x.shape), x.dtype), wanted)


def _forward(
    groups: tuple[Group, ...], block: Block, carry: Tree, shared: Tree, layer_inputs: Tree, ttt_inputs: Tree
) -> tuple[tuple[Tree, Tree], tuple[Any, ...]]:
    all_kept, outputs = [], []
    for group, layers, ttts in group_inputs(groups, layer_inputs, ttt_inputs):
        one = jax.tree.map(lambda x: x[0], (layers, ttts))
        runs = run_inputs(group.runs, *one)
        kept = [
            _room(block, run, group.repeats, carry, shared, *inputs)
            for run, inputs in zip(group.runs, runs, strict=True)
        ]

        def repetition(state: Tree, inputs: Tree, group: Group = group) -> tuple[Tree, Tree]:
            carry, kept = state
            rep_layers, rep_ttts, number = inputs
            kept, found = list(kept), []
            for i, (run, (layers, ttts)) in enumerate(
                zip(group.runs, run_inputs(group.runs, rep_layers, rep_ttts), strict=True)
            ):

                def layer_step(state: Tree, inputs: Tree) -> tuple[Tree, Tree]:
                    carry, room = state
                    layer, ttt, at = inputs
                    after, pull, output = jax.vjp(block, carry, shared, layer, ttt, has_aux=True)
                    return (after, room.put(carry, pull, at)), output

                places = number * run.length + jnp.arange(run.length)
                (carry, kept[i]), output = scan(layer_step, (carry, kept[i]), (layers, ttts, places), run.length)
                if run.has_ttt:
                    found.append(output)
            return (carry, kept), join(found)

        (carry, kept), output = scan(
            repetition, (carry, kept), (layers, ttts, jnp.arange(group.repeats)), group.repeats
        )
        all_kept.append(kept)
        if group.ttt_layers:
            outputs.append(unfold(output))
    return (carry, join(outputs)), (all_kept, shared, layer_inputs, ttt_inputs)


def _backward(
    groups: tuple[Group, ...], block: Block, residuals: tuple[Any, ...], cotangents: tuple[Tree, Tree]
) -> tuple[Tree, ...]:
    all_kept, shared, layer_inputs, ttt_inputs = residuals
    dcarry, _ = cotangents
    dshared = jax.tree.map(lambda x: jnp.zeros_like(x) if _differentiable(x) else None, shared)
    parts = []
    per_group = list(zip(group_inputs(groups, layer_inputs, ttt_inputs), all_kept, strict=True))
    for (group, layers, ttts), kept in reversed(per_group):

        def repetition(state: Tree, inputs: Tree, group: Group = group, kept: Any = kept) -> tuple[Tree, Tree]:
            rep_layers, rep_ttts, number = inputs
            found = []
            runs = list(zip(group.runs, run_inputs(group.runs, rep_layers, rep_ttts), kept, strict=True))
            for run, (layers, ttts), room in reversed(runs):

                def layer_step(state: Tree, inputs: Tree, room: _Kept = room) -> tuple[Tree, Tree]:
                    dcarry, dshared = state
                    layer, ttt, at = inputs
                    # Nothing of this layer is computed again, and held, while the layers after it still run.
                    dcarry, ttt, at = jax.lax.optimization_barrier((dcarry, ttt, at))
                    dcarry, more, dlayer, dttt = room.take(shared, layer, ttt, at)(dcarry)
                    return (dcarry, _add(dshared, more)), (dlayer, dttt)

                places = number * run.length + jnp.arange(run.length)
                state, gradients = scan(layer_step, state, (layers, ttts, places), run.length, reverse=True)
                found.append(gradients)
            dlayers, dttts = zip(*reversed(found), strict=True)
            return state, (join(list(dlayers)), join([d for d in dttts if jax.tree.leaves(d)]))

        (dcarry, dshared), gradients = scan(
            repetition, (dcarry, dshared), (layers, ttts, jnp.arange(group.repeats)), group.repeats, reverse=True
        )
        parts.append(unfold(gradients))
    dlayers, dttts = zip(*reversed(parts), strict=True)
    return dcarry, dshared, join(list(dlayers)), join([d for d in dttts if jax.tree.leaves(d)])


_train_layers.defvjp(_forward, _backward)


def _differentiable(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _add(total: Tree, more: Tree) -> Tree:
    """Adds gradients; leaves that have none are ``None`` in ``total``."""
    return jax.tree.map(lambda x, y: None if x is None else x + y, total, more, is_leaf=lambda x: x is None)
