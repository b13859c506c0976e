"""A small sharded step, clean or with an activation that every device holds as a whole.

As a program it compiles one for eight CPU devices and prints what ``replicated_activations`` says.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intttrain.planner.replication import Replicated, replicated_activations
from intttrain.planner.xla.hlo import parse_module
from intttrain.planner.xla.loops import execution_counts

ROWS, TOKENS, WIDTH, LAYERS, VOCAB = 16, 256, 128, 3, 384
MIN_BYTES = 2**18  # a device's own part of an activation has 2^18 bytes on eight devices in fp32
BATCH = ("data", "fsdp")
# Where an activation loses its sharding: nowhere; rows and tokens whole; tokens whole, in and outside of attention.
FAULTS = {
    "clean": None,
    "everything": PartitionSpec(),
    "rows": PartitionSpec(None, "context"),
    "tokens": PartitionSpec(BATCH),
    "tokens in attention": PartitionSpec(BATCH),
}


def _attend(x, whole):
    scores = jnp.einsum("btd,bsd->bts", x, whole) / TOKENS
    return jnp.einsum("bts,bsd->btd", scores, whole)


def _loss(params, batch, *, mesh, fault):
    def pin(x, spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def body(x, w):
        x = pin(jnp.tanh(x @ pin(w, PartitionSpec())), PartitionSpec(BATCH, "context"))
        if FAULTS[fault] is not None:
            with jax.named_scope("attention" if "attention" in fault else "mlp"):
                whole = pin(x, FAULTS[fault])
                x = _attend(x, whole) if "attention" in fault else jnp.sin(whole) * 2
        return pin(x, PartitionSpec(BATCH, "context")), None

    tokens = batch["tokens"]
    x = pin(jnp.take(params["embed"], tokens, axis=0), PartitionSpec(BATCH, "context"))
    x, _ = jax.lax.scan(jax.checkpoint(body), x, params["w"])
    return jnp.mean(x**2)


@functools.cache
def found(fault: str, mesh: Mesh) -> tuple[Replicated, ...]:
    """What the planner finds in the gradient of a planted step."""

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    params = {
        "embed": abstract((VOCAB, WIDTH), jnp.float32, None, "fsdp"),
        "w": abstract((LAYERS, WIDTH, WIDTH), jnp.float32, None, "fsdp"),
    }
    batch = {"tokens": abstract((ROWS, TOKENS), jnp.int32, BATCH, "context")}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)

    def step(params, batch):
        return jax.grad(functools.partial(_loss, mesh=mesh, fault=fault))(params, batch)

    text = jax.jit(step, out_shardings=shardings).lower(params, batch).compile().as_text()
    module = parse_module(text)
    return replicated_activations(module, execution_counts(module), mesh, rows=ROWS, tokens=TOKENS, min_bytes=MIN_BYTES)


def main() -> None:
    """Prints the findings on eight CPU devices as JSON."""
    from intttrain.config import MeshConfig
    from intttrain.layout.mesh import make_mesh

    mesh = make_mesh(MeshConfig(context=int(sys.argv[1])))
    print(json.dumps({fault: [r.to_json() for r in found(fault, mesh)] for fault in FAULTS}))


if __name__ == "__main__":
    main()
