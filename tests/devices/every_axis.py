"""Takes one step on one device and on a mesh with all axes, and prints how far they are apart, as JSON.

What ``equality`` looks at on ten meshes for minutes comes together on one, so that it can be a test that always runs:
balanced rows, microbatches and random gates. Beside it, attention in rows that are one document under a halo.

A process of its own because the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.config import Config, MeshConfig
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import using_mesh
from intttrain.model.attention import causal_mask, dense_attention
from intttrain.model.context_attention import attend
from tests.devices.equality import distance, take_step, tiny

AXES = {"data": 2, "fsdp": 2, "context": 2, "tensor": 2}
HALO = {"fsdp": 2, "context": 4}
WINDOW = 6


def gated(config: Config) -> Config:
    """Writes half of the chunks; without remat the same numbers take half as long to compile."""
    model, train = config.model, config.train
    return dataclasses.replace(
        config, model=dataclasses.replace(model, remat="none"), train=dataclasses.replace(train, gate_rate=0.5)
    )


def halo_distance(devices: list[jax.Device]) -> float:
    """Returns the distance of attention over four shards from that on one device."""
    model = dataclasses.replace(
        tiny(False).model, attention="dense", context_attention="halo", sliding_window=WINDOW, head_dim=8
    )
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 32, 2, 8)).astype(np.float32)
    segments = jnp.ones((2, 32), jnp.int32)
    wanted = jax.jit(lambda q, k, v: dense_attention(q, k, v, causal_mask(segments, WINDOW)))(q, k, v)

    mesh = make_mesh(MeshConfig(**HALO), devices)

    def spread(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with using_mesh(mesh):
            return attend(model, q, k, v, segments)

    by_rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    found = jax.jit(spread, in_shardings=by_rows, out_shardings=by_rows)(q, k, v)
    return distance(np.asarray(wanted), np.asarray(found))


def main() -> None:
    devices = jax.devices()
    assert len(devices) == 16
    one = take_step(gated(tiny(True)), devices[:1])
    many = take_step(gated(tiny(True, **AXES, context_attention="all_gather", microbatches=2)), devices)
    step = {leaf: distance(one[leaf], many[leaf]) for leaf in one}
    print(json.dumps({"step": step, "halo": halo_distance(devices[:8])}))


if __name__ == "__main__":
    main()
