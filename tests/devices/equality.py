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

from intttrain.config import Config, MeshConfig, default_config, resolve
from intttrain.data import Batch
from intttrain.layout.mesh import make_mesh
from intttrain.layout.row_order import stored_units
from intttrain.layout.sharding import using_mesh
from intttrain.model.attention import causal_mask, dense_attention
from intttrain.model.context_attention import attend
from intttrain.planner.plan import lower
from intttrain.train import Program, make_program

ROWS, T, C, WINDOW = 8, 32, 4, 6
MESHES = {
    "fsdp8": {"fsdp": 8},
    "tensor4": {"tensor": 4, "fsdp": 2},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "slices2": {"data": 2, "fsdp": 4, "slices": 2},
    "context2": {"fsdp": 2, "context": 2, "tensor": 2},
    "context4": {"fsdp": 2, "context": 4},
    "context2_tensor2_gathered": {"fsdp": 2, "context": 2, "tensor": 2, "context_attention": "all_gather"},
    "context4_gathered": {"fsdp": 2, "context": 4, "context_attention": "all_gather"},
    "context4_halo": {"fsdp": 2, "context": 4, "sliding_window": WINDOW},
    "microbatches2": {"data": 2, "fsdp": 2, "tensor": 2, "microbatches": 2},
}


def meshes(ttt: bool) -> dict[str, dict[str, Any]]:
    """Returns what is compared; a dense model attends as one with TTT does, so not every way is."""
    return {name: changes for name, changes in MESHES.items() if ttt or not name.endswith(("_gathered", "_halo"))}


def tiny(ttt: bool, **changes: Any) -> Config:
    config = default_config()
    model, train = config.model, config.train
    model.vocab_size, model.d_model, model.d_ff, model.num_layers = 64, 32, 48, 2
    model.num_heads, model.num_kv_heads, model.head_dim = 8, 4, 8
    model.compute_dtype, model.loss_chunk_tokens, model.initializer_range = "float32", 8, 0.2
    model.ttt.layers, model.ttt.chunk_tokens, model.ttt.eta = (0,), C, 0.5
    for name in ("context_attention", "sliding_window"):
        if name in changes:
            model[name] = changes.pop(name)
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


def stored(program: Program) -> Batch:
    """Returns the batch with the tokens of its rows in the order in which the program stores them."""
    order = np.concatenate([np.arange(*piece) for piece in program.local_ranges])
    return jax.tree.map(lambda x: x[:, order], batch())


def take_step(config: Config, devices: list[jax.Device]) -> dict[str, np.ndarray]:
    """Returns loss, gradients and new parameters of one step from parameters in which every update is at work."""
    program = make_program(config, devices)
    state = program.init()
    if config.model.ttt is not None:
        conv = np.random.default_rng(1).normal(0, 0.3, state["params"]["ttt"]["conv"].shape).astype(np.float32)
        state["params"]["ttt"]["conv"] = jax.device_put(conv, program.state["params"]["ttt"]["conv"].sharding)
    state, metrics = program.step(state, program.place(stored(program)))
    b1 = config.train.optimizer.b1
    trees = {"params": state["params"], "gradient": jax.tree.map(lambda m: m / (1 - b1), state["opt_state"][0].mu)}
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }
    scalars = {"loss": metrics.loss, "row_loss": metrics.row_loss_B, "grad_norm": metrics.grad_norm}
    return leaves | {name: np.asarray(value) for name, value in scalars.items()}


def lowerings(config: Config, devices: list[jax.Device]) -> tuple[str, str]:
    """Returns what the planner lowers, from shapes alone, and what training lowers, from its arrays."""
    planned = lower(make_program(config, devices)).as_text()
    program = make_program(config)
    state = program.init()
    state, _ = program.step(state, program.place(batch()))
    return planned, program.step.lower(state, program.place(batch())).as_text()


# mesh, tokens, heads, key/value heads and window of a case
ATTENTION = {
    # four context shards divide the eight query heads but not the two key/value heads
    "all_to_all": ({"fsdp": 2, "context": 4}, 128, 8, 2, None),
    "all_gather": ({"fsdp": 2, "context": 2, "tensor": 2}, 512, 2, 2, None),
    "all_gather, splash, of a row": ({"fsdp": 4, "context": 2}, 512, 2, 1, None),
    "halo": ({"fsdp": 4, "context": 2}, 256, 2, 1, 100),
    "halo, banded": ({"fsdp": 2, "context": 4}, 32, 2, 1, 6),
    "halo, dense": ({"fsdp": 2, "context": 4}, 32, 2, 2, 9),
    "halo, dense, of one": ({"fsdp": 4, "context": 2}, 32, 2, 2, 1),
}


def attention_distances(devices: list[jax.Device], name: str) -> dict[str, float]:
    """Distances of attention on a mesh (the interpreted TPU kernel if the name says nothing else) from dense attention
    on one device: value, then gradients."""
    mesh_sizes, tokens, heads, kv_heads, window = ATTENTION[name]
    way, *by = name.split(", ")
    model = dataclasses.replace(
        tiny(False).model,
        attention=by[0] if by else "splash",
        context_attention=way,
        sliding_window=window,
        head_dim=128,
    )
    rows = 2 * mesh_sizes["fsdp"] if name == "all_gather" else mesh_sizes["fsdp"]
    q, k, v, do = (
        jax.random.normal(key, (rows, tokens, n, 128))
        for key, n in zip(jax.random.split(jax.random.key(0), 4), (heads, kv_heads, kv_heads, heads), strict=True)
    )
    lengths = [tokens // 4 + 8, tokens // 2, tokens // 4 - 8]
    segments = jnp.asarray(np.repeat(np.repeat([[1, 2, 3]], lengths, axis=1), rows, axis=0), jnp.int32)
    wanted, pull = jax.vjp(lambda q, k, v: dense_attention(q, k, v, causal_mask(segments, window)), q, k, v)
    order = stored_units(tokens, mesh_sizes["context"], 1, balanced=way == "all_gather")
    mesh = make_mesh(MeshConfig(**mesh_sizes), devices)

    def spread(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        with using_mesh(mesh):
            value, pull = jax.vjp(lambda q, k, v: attend(model, q, k, v, segments[:, order]), q, k, v)
            return value, *pull(do)

    by_rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    spread = jax.jit(spread, in_shardings=by_rows, out_shardings=by_rows)
    pulled = [np.asarray(x)[:, np.argsort(order)] for x in spread(*(x[:, order] for x in (q, k, v, do)))]
    return {n: distance(a, b) for n, a, b in zip(("value", "dq", "dk", "dv"), (wanted, *pull(do)), pulled, strict=True)}


def distance(one: np.ndarray, many: np.ndarray) -> float:
    """Returns the largest difference relative to the largest entry."""
    return float(np.max(np.abs(one - many)) / max(np.max(np.abs(one)), 1e-30))


def main() -> None:
    result: dict[str, dict[str, float]] = {}
    devices = jax.devices()
    assert len(devices) == 8
    for ttt in (True, False):
        kind = "ttt" if ttt else "dense"
        ones = {
            window: take_step(tiny(ttt, sliding_window=window), devices[:1])
            for window in ((None, WINDOW) if ttt else (None,))
        }
        for name, changes in meshes(ttt).items():
            one, many = ones[changes.get("sliding_window")], take_step(tiny(ttt, **changes), devices)
            result[f"{kind} {name}"] = {leaf: distance(one[leaf], many[leaf]) for leaf in one}
    texts = {kind: lowerings(tiny(kind == "ttt", data=2, fsdp=2, tensor=2), devices) for kind in ("ttt", "dense")}
    attention = {f"{case} {name}": d for case in ATTENTION for name, d in attention_distances(devices, case).items()}
    print(json.dumps({"distances": result, "lowerings": texts, "attention": attention}))


if __name__ == "__main__":
    main()
