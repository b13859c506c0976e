"""Takes one step without and with a mesh axis that the package does not have, and prints what came out, as JSON.

The axis is added as a person would add it: to the table (here before anything else is imported) and to the
configuration. Then the sums of gradients forget it.

A process of its own because the table is read when modules are imported.
"""

from __future__ import annotations

import json
import types
from unittest import mock

from intttrain.layout import axes

axes.AXES = ("replica", *axes.AXES)
axes.RULES = types.MappingProxyType(axes.RULES | {"batch": ("replica", *axes.RULES["batch"])})
axes.TOKEN_AXES = axes.RULES["batch"] + axes.RULES["tokens"]
axes.COPY_AXES = ("replica", *axes.COPY_AXES)

import dataclasses  # noqa: E402

import jax  # noqa: E402
from pydantic.dataclasses import dataclass  # noqa: E402

from intttrain.config import Config, MeshConfig  # noqa: E402
from intttrain.layout import sharding  # noqa: E402
from intttrain.planner.plan import lower  # noqa: E402
from intttrain.train import make_program  # noqa: E402
from tests.devices.equality import distance, take_step, tiny  # noqa: E402


@dataclass(frozen=True)
class WithReplica(MeshConfig):
    """The mesh with one more axis."""

    replica: int = 1


def config(**sizes: int) -> Config:
    plain = tiny(True)
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, remat="none", num_layers=1),
        mesh=WithReplica(**{"fsdp": 1} | sizes),
    )


def refusal(devices: list[jax.Device]) -> str:
    """Returns what JAX says of a step whose gradients are not summed over the new axis."""
    rest = tuple(axis for axis in axes.TOKEN_AXES if axis != "replica")
    with mock.patch.object(sharding, "TOKEN_AXES", rest):
        try:
            lower(make_program(config(replica=2, fsdp=2), devices))
        except ValueError as error:
            return str(error)
    return "nothing"


def main() -> None:
    devices = jax.devices()
    assert len(devices) == 4
    one, many = take_step(config(), devices[:1]), take_step(config(replica=2, fsdp=2), devices)
    step = {leaf: distance(one[leaf], many[leaf]) for leaf in one}
    print(json.dumps({"step": step, "refusal": refusal(devices)}))


if __name__ == "__main__":
    main()
