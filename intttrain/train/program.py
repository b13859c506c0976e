"""The programs of a run, compiled for a mesh: what training calls and what the planner compiles are made here.

A batch is cut over ``data`` and ``fsdp`` by rows and over ``context`` by tokens; parameters and both moments of the
optimizer by the logical names of their dims (``core.sharding``); metrics are the same on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intttrain.core.compiler import compiler_options
from intttrain.core.config import Config
from intttrain.core.mesh import make_mesh
from intttrain.core.sharding import check_batch, named_shardings, partition_spec, using_mesh, with_sharding
from intttrain.data import Batch
from intttrain.model import logical_axes
from intttrain.train.optimizer import make_optimizer
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
    """

    mesh: Mesh
    init: Any
    step: Any
    state: TrainState
    batch: Batch

    @functools.cached_property  # every batch is placed by it
    def local_rows(self) -> tuple[int, ...]:
        """Returns the rows of a batch, increasing, that the devices of this process hold a part of.

        On a torus they need not be consecutive.
        """
        sharding, shape = self.batch.tokens_BT.sharding, self.batch.tokens_BT.shape
        held = {index[0].indices(shape[0])[:2] for index in sharding.addressable_devices_indices_map(shape).values()}
        return tuple(sorted(row for start, stop in held for row in range(start, stop)))

    def place(self, local_batch: Batch) -> Batch:
        """Returns the global batch, of which ``local_batch`` holds ``local_rows`` (all tokens of each)."""

        def globally(local: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
            def piece(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(target.shape[0])
                first = self.local_rows.index(start)
                return local[(slice(first, first + stop - start), *index[1:])]

            return jax.make_array_from_callback(target.shape, target.sharding, piece)

        return cast(Batch, jax.tree.map(globally, local_batch, self.batch))


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
    )  # fmt: skip


def _state_shardings(config: Config, mesh: Mesh, state: TrainState) -> dict[str, Any]:
    """Returns the sharding of every leaf of the state; both moments lie like their parameter."""
    by_param = named_shardings(mesh, logical_axes(config.model), state["params"])
    replicated = NamedSharding(mesh, PartitionSpec())
    optimizer = make_optimizer(config.train, state["params"])
    opt_state = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state["opt_state"], by_param,
        transform_non_params=lambda _: replicated,
    )  # fmt: skip
    return {"params": by_param, "opt_state": opt_state} | dict.fromkeys(("step", "healthy", "rng"), replicated)
