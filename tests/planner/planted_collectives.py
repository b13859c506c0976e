"""Programs with one collective each in a loop of five trips, and what it is known to move.

As a program it compiles them for eight CPU devices and prints what ``read_collectives`` says.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intttrain.planner.collectives import Collective, read_collectives
from intttrain.planner.xla.hlo import parse_module
from intttrain.planner.xla.loops import execution_counts

TRIPS = 5
ROWS, COLUMNS = 512, 1024  # on one device, fp32
OWN = ROWS * COLUMNS * 4
SPEC = PartitionSpec(("data", "fsdp"), "context")


class Planted(NamedTuple):
    """A collective on a device's own piece, its axes, and the bytes it moves as a fraction of ``OWN``."""

    step: Callable[[jax.Array], jax.Array]
    kind: str
    axes: tuple[str, ...]
    factor: float


def _gather(x):
    return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)[:ROWS] * 2 + 1


def _scatter(x):
    return jnp.tile(jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True), (4, 1))


def _all_to_all(x):
    return jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True).reshape(x.shape)


def _permute(x):
    return jax.lax.ppermute(x, "context", [(0, 1), (1, 0)])


# On fsdp 4 x context 2.
PLANTED = {
    "gather": Planted(_gather, "all-gather", ("fsdp",), 3),
    "reduce": Planted(lambda x: jax.lax.psum(x, "fsdp"), "all-reduce", ("fsdp",), 1.5),
    "scatter": Planted(_scatter, "reduce-scatter", ("fsdp",), 0.75),
    "all to all": Planted(_all_to_all, "all-to-all", ("fsdp",), 0.75),
    "permute": Planted(
        lambda x: jax.lax.ppermute(x, "context", [(0, 1), (1, 0)]), "collective-permute", ("context",), 1
    ),
    "two axes": Planted(lambda x: jax.lax.psum(x, ("fsdp", "context")), "all-reduce", ("fsdp", "context"), 1.75),
}


def compiled(step: Callable[[jax.Array], jax.Array], mesh: Mesh) -> str:
    """Optimised text of ``TRIPS`` steps, each followed by a tanh."""

    def steps(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(step(x)), None), x, None, length=TRIPS)[0]

    mapped = jax.jit(jax.shard_map(steps, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False))
    shape = (ROWS * mesh.shape["data"] * mesh.shape["fsdp"], COLUMNS * mesh.shape["context"])
    whole = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, SPEC))
    return mapped.lower(whole).compile().as_text()


def read(text: str, mesh: Mesh) -> tuple[Collective, ...]:
    """What the planner finds in a text."""
    module = parse_module(text)
    return read_collectives(module, execution_counts(module), mesh)


@functools.cache
def found(name: str, mesh: Mesh) -> tuple[Collective, ...]:
    """What the planner finds in a planted program."""
    return read(compiled(PLANTED[name].step, mesh), mesh)


def main() -> None:
    """Prints the findings on eight CPU devices as JSON."""
    from intttrain.config import MeshConfig
    from intttrain.layout.mesh import make_mesh

    mesh = make_mesh(MeshConfig(context=2))
    rows: dict[str, Any] = {name: [c.to_json() for c in found(name, mesh)] for name in PLANTED}
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
