"""Runs the layers of a model for training: ``layer_groups.scan_layers`` with a backward pass of our own.

The layers are a scan over groups with a scan over the layers of each run inside (``model/layer_groups.py``). JAX's own
gradient of that stacks what each layer keeps for the backward pass within the inner scan, then copies the stack into
that of the outer scan, and reads it back in the same two steps. With few TTT layers among many dense ones most of what
is kept goes that way: about 3 % of a step of Qwen3-4B at 8k (``docs/decisions/0008``). Here every run has one buffer
that lies outside of both loops, and each layer writes what it keeps straight to its own place.
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
from intttrain.model.residuals import Pullback, Residual, split_residuals

Tree = Any
# block(carry, shared, layer inputs, TTT inputs or None) -> carry, TTT outputs (without gradient) or None
Block = Callable[[Tree, Tree, Tree, Tree | None], tuple[Tree, Tree | None]]


def apply_layers(
    groups: tuple[Group, ...], block: Block, carry: Tree, shared: Tree, layer_inputs: Tree, ttt_inputs: Tree
) -> tuple[Tree, Tree]:
    """Applies ``block`` to every layer in order, differentiated by JAX.

    ``train_layers`` does the same with our own backward pass. This one remains for ``model.remat="offload"``, whose
    policy moves activations to the memory of the host, which only JAX's own gradient can do.

    Args:
      groups: from ``plan_groups``.
      block: one layer. Wrapped in ``jax.checkpoint`` it keeps what the remat policy saves, otherwise all that its
        gradient needs. It must use no traced values but its arguments.
      carry: what passes from layer to layer, the residual stream.
      shared: what every layer sees, such as RoPE tables and segment ids; integers may be among it.
      layer_inputs: pytree with one leading entry per layer, its weights.
      ttt_inputs: the same with one entry per TTT layer.

    Returns:
      The last carry, and the TTT outputs stacked over TTT layers (``None`` if there are none).
    """

    def step(carry: Tree, layer: Tree, ttt: Tree | None) -> tuple[Tree, None, Tree | None]:
        carry, output = block(carry, shared, layer, ttt)
        return carry, None, output

    carry, _, outputs = scan_layers(groups, step, carry, layer_inputs, ttt_inputs)
    return carry, outputs


def train_layers(
    groups: tuple[Group, ...], block: Block, carry: Tree, shared: Tree, layer_inputs: Tree, ttt_inputs: Tree
) -> tuple[Tree, Tree]:
    """Applies ``block`` to every layer in order with our own backward pass; arguments and results of ``apply_layers``.

    There is no gradient through the TTT outputs.
    """
    # Outside of a jit, JAX would take arguments that are known numbers for constants, and ``jax.vjp`` of a layer would
    # keep other arrays in one trace than in the next. As a jitted function all of its arguments are unknown.
    apply = jax.jit(functools.partial(_train_layers, groups, block), inline=True)
    return apply(carry, shared, layer_inputs, ttt_inputs)


_train_layers = jax.custom_vjp(apply_layers, nondiff_argnums=(0, 1))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("carries", "residuals"), meta_fields=("pullback",))
@dataclasses.dataclass(frozen=True)
class _Room:
    """The buffers into which all layers of a run, in all repetitions of its group, write what they keep.

    Attributes:
      carries: what came into each layer; leading axis: repeats x length of the run.
      residuals: everything else that the backward pass of each layer needs, but for its weights and shared values.
      pullback: how a layer's gradient is computed from these.
    """

    carries: Tree
    residuals: list[Residual]
    pullback: Pullback

    def put(self, at: jax.Array, carry: Tree, residuals: list[Residual]) -> _Room:
        """Returns the buffers with what layer number ``at`` keeps written into its place."""
        self.pullback.check(residuals)
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=at, axis=0)
        carries, stacked = jax.tree.map(write, (self.carries, self.residuals), (carry, residuals))
        return _Room(carries, stacked, self.pullback)

    def take(self, at: jax.Array) -> tuple[Tree, list[Residual]]:
        """Returns the carry that came into layer number ``at``, and its residuals."""
        read = functools.partial(jax.lax.dynamic_index_in_dim, index=at, keepdims=False)
        carry, residuals = jax.tree.map(read, (self.carries, self.residuals))
        return carry, residuals


def _empty_room(block: Block, run: Run, repeats: int, carry: Tree, shared: Tree, layers: Tree, ttts: Tree) -> _Room:
    """Returns the buffers of a run, not written yet; the layer is traced once, for the shapes of what it keeps."""
    found: list[Pullback] = []

    def residuals_of(*arguments: Tree) -> list[Residual]:
        _, pull, _ = jax.vjp(block, *arguments, has_aux=True)
        pullback, residuals = split_residuals(pull, arguments)
        found.append(pullback)
        return residuals

    first_layer = jax.tree.map(lambda x: x[0], (layers, ttts))
    shapes = carry, jax.eval_shape(residuals_of, carry, shared, *first_layer)
    carries, stacked = jax.tree.map(lambda x: jax.lax.empty((repeats * run.length, *x.shape), x.dtype), shapes)
    return _Room(carries, stacked, found[0])


def _places(run: Run, repetition: jax.Array) -> jax.Array:
    """Returns the numbers, in its room, of the layers of a run in one repetition."""
    return repetition * run.length + jnp.arange(run.length)


# --- forward: group, repetition of its runs, layer --------------------------------------------------------------------


def _forward(
    groups: tuple[Group, ...], block: Block, carry: Tree, shared: Tree, layer_inputs: Tree, ttt_inputs: Tree
) -> tuple[tuple[Tree, Tree], tuple[Any, ...]]:
    """Returns what ``apply_layers`` does, and what the backward pass needs: the rooms of each group, and all inputs."""
    all_rooms, outputs = [], []
    for group, layers, ttts in group_inputs(groups, layer_inputs, ttt_inputs):
        # The layers of the first repetition, for their shapes.
        first = run_inputs(group.runs, *jax.tree.map(lambda x: x[0], (layers, ttts)))
        rooms = [
            _empty_room(block, run, group.repeats, carry, shared, *inputs)
            for run, inputs in zip(group.runs, first, strict=True)
        ]
        repetition = functools.partial(_repetition_forward, group, block, shared)
        inputs = layers, ttts, jnp.arange(group.repeats)
        (carry, rooms), output = scan(repetition, (carry, rooms), inputs, group.repeats)
        all_rooms.append(rooms)
        if group.ttt_layers:
            outputs.append(unfold(output))
    return (carry, join(outputs)), (all_rooms, shared, layer_inputs, ttt_inputs)


def _repetition_forward(
    group: Group, block: Block, shared: Tree, state: tuple[Tree, list[_Room]], inputs: Tree
) -> tuple[Tree, Tree]:
    """Runs one repetition of a group: its runs one after the other, each a scan over its layers."""
    (carry, rooms), (layers, ttts, number) = state, inputs
    filled, outputs = [], []
    for run, room, (run_layers, run_ttts) in zip(group.runs, rooms, run_inputs(group.runs, layers, ttts), strict=True):
        layer = functools.partial(_layer_forward, block, shared)
        (carry, room), output = scan(layer, (carry, room), (run_layers, run_ttts, _places(run, number)), run.length)
        filled.append(room)
        if run.has_ttt:
            outputs.append(output)
    return (carry, filled), join(outputs)


def _layer_forward(block: Block, shared: Tree, state: tuple[Tree, _Room], inputs: Tree) -> tuple[Tree, Tree]:
    """Runs one layer and writes what its backward pass needs."""
    (carry, room), (layer, ttt, at) = state, inputs
    arguments = carry, shared, layer, ttt
    after, pull, output = jax.vjp(block, *arguments, has_aux=True)
    _, residuals = split_residuals(pull, arguments)
    return (after, room.put(at, carry, residuals)), output


# --- backward: the same, from the last layer to the first -------------------------------------------------------------


def _backward(
    groups: tuple[Group, ...], block: Block, kept: tuple[Any, ...], cotangents: tuple[Tree, Tree]
) -> tuple[Tree, ...]:
    """Returns the gradients of the carry, the shared values, and the inputs of layers and of TTT layers."""
    del block  # its gradient is in the rooms
    all_rooms, shared, layer_inputs, ttt_inputs = kept
    dcarry, _ = cotangents  # TTT outputs are reports without a gradient
    dshared = jax.tree.map(lambda x: jnp.zeros_like(x) if _differentiable(x) else None, shared)
    parts = []
    per_group = list(zip(group_inputs(groups, layer_inputs, ttt_inputs), all_rooms, strict=True))
    for (group, layers, ttts), rooms in reversed(per_group):
        repetition = functools.partial(_repetition_backward, group, rooms, shared)
        inputs = layers, ttts, jnp.arange(group.repeats)
        (dcarry, dshared), gradients = scan(repetition, (dcarry, dshared), inputs, group.repeats, reverse=True)
        parts.append(unfold(gradients))
    return dcarry, dshared, *_join_reversed(parts)


def _repetition_backward(
    group: Group, rooms: list[_Room], shared: Tree, state: tuple[Tree, Tree], inputs: Tree
) -> tuple[Tree, Tree]:
    """Pulls the gradient back through one repetition of a group: its runs from the last to the first."""
    layers, ttts, number = inputs
    parts = []
    runs = list(zip(group.runs, rooms, run_inputs(group.runs, layers, ttts), strict=True))
    for run, room, (run_layers, run_ttts) in reversed(runs):
        layer = functools.partial(_layer_backward, room, shared)
        state, gradients = scan(layer, state, (run_layers, run_ttts, _places(run, number)), run.length, reverse=True)
        parts.append(gradients)
    return state, _join_reversed(parts)


def _layer_backward(room: _Room, shared: Tree, state: tuple[Tree, Tree], inputs: Tree) -> tuple[Tree, Tree]:
    """Pulls the gradient back through one layer."""
    (dcarry, dshared), (layer, ttt, at) = state, inputs
    # Under remat a layer is computed again here, from inputs that are there long before its turn. XLA would begin that
    # for a TTT layer while the dense layers behind it still run, and hold z, gate, up and v meanwhile: 1.6 to 2.0 GiB
    # for Qwen3-4B on v5p, at the same step time (``docs/decisions/0008``). A barrier over them and the gradient that
    # comes in makes the work wait for its turn.
    dcarry, ttt, at = jax.lax.optimization_barrier((dcarry, ttt, at))
    carry, residuals = room.take(at)
    dcarry, more, dlayer, dttt = room.pullback((carry, shared, layer, ttt), residuals, dcarry)
    return (dcarry, _add(dshared, more)), (dlayer, dttt)


def _join_reversed(parts: list[tuple[Tree, Tree]]) -> tuple[Tree, Tree]:
    """Joins gradients of layers and of TTT layers that were found from the last part to the first.

    A part without TTT layers has no arrays in the second place.
    """
    dlayers, dttts = zip(*reversed(parts), strict=True)
    return join(list(dlayers)), join([dttt for dttt in dttts if jax.tree.leaves(dttt)])


_train_layers.defvjp(_forward, _backward)


def _differentiable(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _add(total: Tree, more: Tree) -> Tree:
    """Returns the sum of two gradients; ``None`` stands in ``total`` for leaves without one, such as segment ids."""
    return jax.tree.map(lambda x, y: None if x is None else x + y, total, more, is_leaf=lambda x: x is None)
