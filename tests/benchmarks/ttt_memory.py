"""Prints the memory of a TTT layer's forward and backward pass, planned for a TPU, by number of chunks.

    python -m tests.benchmarks.ttt_memory

One row on one device of v5p, Qwen3-4B's D and F, bf16. Nothing runs; it needs libtpu. What must grow is not counted:
the layer's inputs and their gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from intttrain import ttt
from intttrain.config import MeshConfig
from intttrain.layout import hardware
from intttrain.layout.compiler import compiler_options
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import using_mesh

D, F, C = 2560, 9728, 1024


def temporary_gib(chunks: int, implementation: str) -> float:
    """Returns the temporary memory of value and gradient of one row of ``chunks`` chunks."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[:1]
    mesh = make_mesh(MeshConfig(), devices)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def gradients(z: jax.Array, v: jax.Array, w: jax.Array, ids: jax.Array, do: jax.Array) -> object:
        def project(z: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
            return ttt.fast_weight_projection(
                z, v, w, ids, chunk_tokens=C, eta=jnp.float32(0.1), implementation=implementation
            ).o_BTD

        with using_mesh(mesh):
            o, pull = jax.vjp(project, z, v, w)
            return o, pull(do)

    wide, narrow = (jax.ShapeDtypeStruct((1, chunks * C, width), jnp.bfloat16) for width in (F, D))
    w, ids = jax.ShapeDtypeStruct((D, F), jnp.float32), jax.ShapeDtypeStruct((1, chunks * C), jnp.int32)
    step = jax.jit(gradients, in_shardings=everywhere, out_shardings=everywhere,
                   compiler_options=compiler_options(devices[0]))  # fmt: skip
    return float(step.lower(wide, narrow, w, ids, narrow).compile().memory_analysis().temp_size_in_bytes / 2**30)


def main() -> None:
    hardware.prepare_topology_compilation()
    print(f"{'chunks':>7}  XLA, GiB  kernels, GiB  (a state: {D * F * 4 / 2**30:.3f})")
    for chunks in (4, 16, 64, 256):
        xla, kernels = (temporary_gib(chunks, implementation) for implementation in ("chunked", "pallas"))
        print(f"{chunks:>7}{xla:>10.3f}{kernels:>14.3f}", flush=True)


if __name__ == "__main__":
    main()
