"""Takes one step of a tiny model on one device and on meshes of eight, and prints how far they are apart, as JSON.

Also the texts of what the planner lowers and of what training does.

A process of its own because the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.core.config import Config, MeshConfig, default_config, resolve
from intttrain.core.mesh import make_mesh
from intttrain.core.sharding import using_mesh
from intttrain.data import Batch
from intttrain.model.attention import causal_mask, dense_attention
from intttrain.model.splash import splash_attention
from intttrain.planner.plan import lower
from intttrain.train import make_program

ROWS, T, C = 8, 32, 8
MESHES = {
    "fsdp8": {"fsdp": 8},
    "tensor4": {"tensor": 4, "fsdp": 2},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "slices2": {"data": 2, "fsdp": 4, "slices": 2},
    "context2": {"fsdp": 2, "context": 2, "tensor": 2},
    "context4": {"fsdp": 2, "context": 4},
    "microbatches2": {"data": 2, "fsdp": 2, "tensor": 2, "microbatches": 2},
}


def tiny(ttt: bool, **changes: Any) -> Config:
    config = default_config()
    model, train = config.model, config.train
    model.vocab_size, model.d_model, model.d_ff, model.num_layers = 64, 32, 48, 2
    model.num_heads, model.num_kv_heads, model.head_dim = 8, 4, 8
    model.compute_dtype, model.loss_chunk_tokens, model.initializer_range = "float32", 8, 0.2
    model.ttt.layers, model.ttt.chunk_tokens, model.ttt.eta = (0,), C, 0.5
    if not ttt:
        model.ttt = None
    config.data.seq_len = config.eval.seq_len = T
    config.eval.position_edges = (T,)
    train.batch_rows, train.num_steps, train.microbatches = ROWS, 10, changes.pop("microbatches", 1)
    train.schedule.warmup_steps = 0
    train.optimizer.clip_norm = 1e9  # the first moment is then the gradient
    train.optimizer.eps = 1e-2  # or Adam's first update, g / |g|, is the rounding of the smallest gradients
    return dataclasses.replace(resolve(config), mesh=MeshConfig(**changes))


def batch() -> Batch:
    """Packed rows: documents end inside and on chunks, the last row is half padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (ROWS, T + 1)).astype(np.int32)
    segments = np.ones((ROWS, T), np.int32)
    for row in range(ROWS):
        for edge in (5 + row, 16, 27):
            segments[row, edge:] += 1
    segments[-1, T // 2 :] = 0
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    weights = (segments > 0) & (np.roll(segments, -1, axis=1) == segments)
    weights[:, -1] = False
    positions = (np.arange(T) - first).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), segments, positions)


def take_step(config: Config, devices: list[jax.Device]) -> dict[str, np.ndarray]:
    """Returns loss, gradients and new parameters of one step from parameters in which every update is at work."""
    program = make_program(config, devices)
    state = program.init()
    if config.model.ttt is not None:
        conv = np.random.default_rng(1).normal(0, 0.3, state["params"]["ttt"]["conv"].shape).astype(np.float32)
        state["params"]["ttt"]["conv"] = jax.device_put(conv, program.state["params"]["ttt"]["conv"].sharding)
    state, metrics = program.step(state, program.place(batch()))
    b1 = config.train.optimizer.b1
    trees = {"params": state["params"], "gradient": jax.tree.map(lambda m: m / (1 - b1), state["opt_state"][0].mu)}
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }
    return leaves | {"loss": np.asarray(metrics.loss), "row_loss": np.asarray(metrics.row_loss_B)}


def lowerings(config: Config, devices: list[jax.Device]) -> tuple[str, str]:
    """Returns what the planner lowers, from shapes alone, and what training lowers, from its arrays."""
    planned = lower(make_program(config, devices)).as_text()
    program = make_program(config)
    state = program.init()
    state, _ = program.step(state, program.place(batch()))
    return planned, program.step.lower(state, program.place(batch())).as_text()


def splash_distances(devices: list[jax.Device]) -> dict[str, float]:
    """Distances of the interpreted TPU kernel on a mesh from dense attention on one device: value, then gradients.

    Four context shards divide the eight query heads but not the two key/value heads.
    """
    config = MeshConfig(fsdp=2, context=4)
    q, k, v, do = (
        jax.random.normal(key, (2, 128, heads, 128))
        for key, heads in zip(jax.random.split(jax.random.key(0), 4), (8, 2, 2, 8), strict=True)
    )
    segments = jnp.asarray(np.repeat([[1, 2, 3]], 2, axis=0).repeat([40, 60, 28], axis=1), jnp.int32)
    dense = lambda q, k, v: dense_attention(q, k, v, causal_mask(segments, None))  # noqa: E731
    splash = lambda q, k, v: splash_attention(q, k, v, segments, None, interpret=True)  # noqa: E731
    wanted, pull = jax.vjp(dense, q, k, v)
    mesh = make_mesh(config, devices)

    def spread(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        with using_mesh(mesh):
            value, pull = jax.vjp(splash, q, k, v)
            return value, *pull(do)

    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    pulled = jax.jit(spread, in_shardings=rows, out_shardings=rows)(q, k, v, do)
    names = ("value", "dq", "dk", "dv")
    return {n: distance(a, b) for n, a, b in zip(names, (wanted, *pull(do)), jax.device_get(pulled), strict=True)}


def distance(one: np.ndarray, many: np.ndarray) -> float:
    """Returns the largest difference relative to the largest entry."""
    return float(np.max(np.abs(one - many)) / max(np.max(np.abs(one)), 1e-30))


def main() -> None:
    result: dict[str, dict[str, float]] = {}
    devices = jax.devices()
    assert len(devices) == 8
    for ttt in (True, False):
        kind = "ttt" if ttt else "dense"
        one = take_step(tiny(ttt), devices[:1])
        for name, changes in MESHES.items():
            many = take_step(tiny(ttt, **changes), devices)
            result[f"{kind} {name}"] = {leaf: distance(one[leaf], many[leaf]) for leaf in one}
    texts = {kind: lowerings(tiny(kind == "ttt", data=2, fsdp=2, tensor=2), devices) for kind in ("ttt", "dense")}
    print(json.dumps({"distances": result, "lowerings": texts, "splash": splash_distances(devices)}))


if __name__ == "__main__":
    main()
