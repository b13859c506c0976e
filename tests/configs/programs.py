"""Makes the programs of every shipped configuration for every topology it names, and prints what came out, as JSON.

Nothing is compiled. With the argument ``tpu`` the devices are those that libtpu describes, otherwise CPU devices.
A process of its own because the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import jax

from intttrain.config import resolve
from intttrain.config.errors import UserError
from intttrain.layout.mesh import MeshShape
from intttrain.train import make_program

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = ("paper", "qwen3", "llama3")
MISFITS = ("qwen3:4b_32k v6e:16x16", "paper:1.5b v6e:16x16")  # fewer rows than devices: must be refused
DEVICES_PER_CHIP = {"tpu7x": 2}  # 1 for the others


def load(name: str) -> ModuleType:
    """Returns the module ``configs/NAME.py``."""
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def device_count(topology: str) -> int:
    """Returns the devices of, for example, ``v5p:4x4x4``."""
    kind, size = topology.split(":")
    return math.prod(map(int, size.split("x"))) * DEVICES_PER_CHIP.get(kind, 1)


def devices(topology: str, *, tpu: bool) -> list[jax.Device]:
    if not tpu:
        return jax.devices()[: device_count(topology)]
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def attempt(case: str, *, tpu: bool) -> dict[str, str | int]:
    """Returns the mesh and the number of devices of a case ``FILE:VARIANT TOPOLOGY``, or why it is refused."""
    name, variant, topology = case.replace(" ", ":", 1).split(":", 2)
    chosen = devices(topology, tpu=tpu)
    try:
        shape = make_program(resolve(load(name).get_config(variant)), chosen).mesh.shape
    except UserError as error:
        return {"error": str(error)}
    return {"mesh": str(MeshShape(shape)), "devices": len(chosen)}


def main(*, tpu: bool) -> None:
    cases = [
        f"{name}:{variant} {topology}"
        for name in FILES
        for variant, topologies in load(name).TOPOLOGIES.items()
        for topology in topologies
    ]
    print(json.dumps({case: attempt(case, tpu=tpu) for case in (*cases, *MISFITS)}))


if __name__ == "__main__":
    main(tpu=sys.argv[1:] == ["tpu"])
