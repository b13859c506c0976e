"""The programs of a run, compiled for a mesh: what training calls and what the planner compiles are made here.

A batch is cut over ``data`` and ``fsdp`` by rows and over ``context`` by tokens, stored as ``layout/row_order.py``
says; parameters and both moments of the optimizer by the logical names of their dims (``layout/sharding.py``); metrics
are the same on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intttrain.config import Config
from intttrain.data import Batch
from intttrain.layout.compiler import compiler_options
from intttrain.layout.mesh import make_mesh
from intttrain.layout.row_order import Ranges, is_balanced, stored_ranges
from intttrain.layout.sharding import (
    check_batch,
    named_shardings,
    partition_spec,
    pieces_of,
    using_mesh,
    with_sharding,
)
from intttrain.model import logical_axes
from intttrain.train.step import StepMetrics, TrainState, abstract_state, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's jitted functions and the shapes and shardings that go in and out.

    Attributes:
      mesh: all devices of the run.
      init: () -> state before the first step.
      step: (state, batch) -> (state, metrics); the old state is donated.
      state: shapes, dtypes and shardings of the state.
      batch: the same of a batch, all rows of all processes.
      balanced: whether rows are stored balanced (``layout/row_order.py``).
    """

    mesh: Mesh
    init: Any
    step: Any
    state: TrainState
    batch: Batch
    balanced: bool

    @functools.cached_property  # every batch is placed by it
    def _held(self) -> tuple[Ranges, Ranges]:
        """The pieces of the rows, and of the stored tokens of a row, that lie on devices of this process, increasing.

        On a torus they need not be consecutive.
        """
        sharding, shape = self.batch.tokens_BT.sharding, self.batch.tokens_BT.shape
        indices = sharding.addressable_devices_indices_map(shape).values()
        rows, tokens = (tuple(sorted({index[dim].indices(shape[dim])[:2] for index in indices})) for dim in (0, 1))
        return rows, tokens

    @property
    def local_rows(self) -> tuple[int, ...]:
        """The rows of a batch, increasing, that this process reads."""
        return tuple(row for start, stop in self._held[0] for row in range(start, stop))

    @property
    def local_ranges(self) -> Ranges:
        """The tokens that this process reads of each of its rows, in the order in which they are stored."""
        seq_len = self.batch.tokens_BT.shape[1]
        pieces = stored_ranges(seq_len, pieces_of(self.mesh, "tokens"), balanced=self.balanced)
        length = seq_len // len(pieces)
        return tuple(piece for start, stop in self._held[1] for piece in pieces[start // length : stop // length])

    def place(self, local_batch: Batch) -> Batch:
        """Returns the global batch, of which ``local_batch`` holds the ``local_ranges`` of the ``local_rows``."""

        def globally(local: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
            def piece(index: Any) -> np.ndarray:
                return local[tuple(map(_find, self._held, index, target.shape))]

            return jax.make_array_from_callback(target.shape, target.sharding, piece)

        return cast(Batch, jax.tree.map(globally, local_batch, self.batch))

    def take(self, state: TrainState) -> TrainState:
        """Returns the state of another program laid out for this one, the bits unchanged; the old one is deleted.

        One array after the other, so a device need not hold two states.
        """

        def move(leaf: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
            moved = jax.device_put(leaf, target.sharding, may_alias=False)
            leaf.delete()  # donation would keep every buffer whose pieces change their shape
            return moved

        return cast(TrainState, jax.tree.map(move, state, self.state))


def _find(held: Ranges, index: slice, size: int) -> slice:
    """Returns where a piece of a dim of ``size`` stands among the pieces that are held, which are equally long."""
    start, stop, _ = index.indices(size)
    first = held.index((start, stop)) * (stop - start)
    return slice(first, first + stop - start)


def make_program(config: Config, devices: Sequence[jax.Device] | None = None) -> Program:
    """Returns the programs of a run on ``devices`` (default: all of all processes). Compiles nothing yet.

    Raises:
      UserError: the mesh does not fit the devices, or a dim does not fit the mesh.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch(config, mesh)
    state = abstract_state(config)
    shardings = _state_shardings(config, mesh, state)
    rows = NamedSharding(mesh, partition_spec(("batch", "tokens")))
    replicated = NamedSharding(mesh, PartitionSpec())
    step = make_train_step(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with using_mesh(mesh):
            return step(state, batch)

    batch = Batch.abstract(config.train.batch_rows, config.data.seq_len)
    return Program(
        mesh=mesh,
        init=jax.jit(lambda: init_state(config), out_shardings=shardings),
        step=jax.jit(
            train_step, donate_argnums=0, in_shardings=(shardings, rows), out_shardings=(shardings, replicated),
            compiler_options=compiler_options(mesh.devices.flat[0]),
        ),
        state=jax.tree.map(with_sharding, state, shardings),
        batch=jax.tree.map(lambda leaf: with_sharding(leaf, rows), batch),
        balanced=is_balanced(config.model, config.data.seq_len, pieces_of(mesh, "tokens"), pieces_of(mesh, "heads")),
    )  # fmt: skip


def _state_shardings(config: Config, mesh: Mesh, state: TrainState) -> dict[str, Any]:
    """Returns the sharding of every leaf of the state; what an optimizer keeps of a parameter lies like it.

    That is every array whose path ends in that of a parameter and that has its shape, whatever the optimizer.
    """
    by_param = named_shardings(mesh, logical_axes(config.model), state["params"])
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state["params"]), jax.tree.leaves(by_param), strict=True
        )
    }

    def like_its_parameter(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        found = (placed[path[start:]] for start in range(len(path)) if path[start:] in placed)
        return next((sharding for shape, sharding in found if shape == leaf.shape), replicated)

    opt_state = jax.tree_util.tree_map_with_path(like_its_parameter, state["opt_state"])
    rest = {name: leaf for name, leaf in state.items() if name not in ("params", "opt_state")}
    return {"params": by_param, "opt_state": opt_state} | jax.tree.map(lambda _: replicated, rest)
