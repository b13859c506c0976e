"""Runs the packed cases on rows that are cut over devices and prints how far every result is from one device, as JSON.

A process of its own because the number of CPU devices is fixed when JAX starts. The distances of planted faults come
last, each on one case that it must spoil.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.core.config import MeshConfig
from intttrain.core.mesh import make_mesh
from intttrain.core.sharding import using_mesh
from intttrain.ttt import shards
from tests.ttt.cases import BY_NAME, CASES, Case, T, cotangents, gradients, leaves_of, loss_function, shape_of

# One to all shards hold a document; rows beside, and feed-forward width beside, where they divide. The first two cut no
# row: what carries no state there runs as one long row.
MESHES = {
    "fsdp2_tensor2": {"fsdp": 2, "tensor": 2},
    "data2_fsdp2": {"data": 2, "fsdp": 2},
    "context4": {"context": 4},
    "context2_tensor2": {"context": 2, "tensor": 2},
    "fsdp2_context4": {"fsdp": 2, "context": 4},
    "context8": {"context": 8},
}
FAULTS = ("restart", "inclusive", "forgets_documents", "no_sum_of_eta", "forward_order_backward")


def runs_on(case: Case, sizes: dict[str, int], *, fresh: bool) -> bool:
    """Whether every shard gets whole chunks and whole rows, and ``fresh`` rows bring no state."""
    chunks, rows = T // case.chunk_tokens, len(case.rows)
    whole = chunks % sizes.get("context", 1) == 0 and rows % (sizes.get("data", 1) * sizes.get("fsdp", 1)) == 0
    return whole and not (fresh and case.carried)


def name_of(mesh_name: str, case: Case, *, fresh: bool) -> str:
    """Returns the name of a comparison."""
    return f"{mesh_name} {case.name}{' fresh' if fresh else ''}"


def sharded_program(case: Case, mesh: jax.sharding.Mesh, *, fresh: bool = False) -> Callable[..., Any]:
    """``cases.gradients`` of the shape of this case, on a mesh."""

    loss = loss_function(shape_of(case), "chunked", fresh=fresh)

    def on_mesh(*inputs: Any) -> Any:
        with using_mesh(mesh):
            return loss(*inputs)

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(jax.grad(on_mesh, has_aux=True), in_shardings=everywhere, out_shardings=everywhere)


def distances(case: Case, program: Callable[..., Any], *, fresh: bool = False) -> dict[str, float]:
    wanted, one = gradients(case, "chunked", fresh=fresh)
    actual, many = program(leaves_of(case), case.segments_BT, case.document_B, cotangents(case))
    pairs = {name: (wanted[name], actual[name]) for name in wanted}
    pairs |= {name: (getattr(one, name), getattr(many, name)) for name in ("o_BTD", "delta_norm_BM", "state_norm_BM")}
    if not fresh:
        pairs["state"] = (one.state.s_BDF, many.state.s_BDF)
    return {
        name: float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / max(float(np.max(np.abs(a))), 1e-3))
        for name, (a, b) in pairs.items()
    }


@contextmanager
def planted(fault: str) -> Any:
    """Makes one mistake in ``shards`` that public code has made."""
    scan, add = shards.exclusive_scan, shards.sum_over

    def restart(keep_B: Any, own_BDF: Any, first_BDF: Any, **options: Any) -> Any:
        received, last = scan(keep_B, own_BDF, first_BDF, **options)
        return jnp.zeros_like(received), last

    def inclusive(keep_B: Any, own_BDF: Any, first_BDF: Any, **options: Any) -> Any:
        received, last = scan(keep_B, own_BDF, first_BDF, **options)
        return keep_B[:, None, None] * received + own_BDF, last

    faulty = {
        "restart": restart,
        "inclusive": inclusive,
        "forgets_documents": lambda keep, own, first, **options: scan(jnp.ones_like(keep), own, first, **options),
        "forward_order_backward": lambda keep, own, first, *, reverse=False: scan(keep, own, first),
    }
    shards.exclusive_scan = faulty.get(fault, scan)
    shards.sum_over = (lambda x, *axes: x) if fault == "no_sum_of_eta" else add
    try:
        yield
    finally:
        shards.exclusive_scan, shards.sum_over = scan, add


def main() -> None:
    devices = jax.devices()
    found: dict[str, dict[str, float]] = {}
    for mesh_name, sizes in MESHES.items():
        mesh = make_mesh(MeshConfig(**{"fsdp": 1} | sizes), devices[: int(np.prod(list(sizes.values())))])
        programs: dict[tuple[Case, bool], Callable[..., Any]] = {}
        for case in CASES:
            for fresh in (False, True):
                if runs_on(case, sizes, fresh=fresh):
                    program = programs.setdefault((shape_of(case), fresh), sharded_program(case, mesh, fresh=fresh))
                    found[name_of(mesh_name, case, fresh=fresh)] = distances(case, program, fresh=fresh)
    mesh = make_mesh(MeshConfig(fsdp=1, context=4), devices[:4])
    case = BY_NAME["state_in"]
    for fault in FAULTS:
        with planted(fault):
            found[f"fault {fault}"] = distances(case, sharded_program(case, mesh))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
