"""Runs the packed cases on rows that are cut over devices and prints how far every result is from one device, as JSON.

    python -m tests.ttt.sharded MESH ... [faults]

A process of its own because the number of CPU devices is fixed when JAX starts. The distances of planted faults are
each those of one case that it must spoil.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.config import MeshConfig
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import using_mesh
from intttrain.ttt import shards
from tests.ttt.cases import BY_NAME, CASES, Case, T, cotangents, gradients, leaves_of, loss_function, shape_of

# One to all shards hold a document; rows beside, and feed-forward width beside, where they divide. The first one cuts
# no row: what carries no state there runs as one long row.
MESHES = {
    "data2_tensor2": {"data": 2, "tensor": 2},
    "context4_tensor2": {"context": 4, "tensor": 2},
    "fsdp2_context4": {"fsdp": 2, "context": 4},
    "context8": {"context": 8},
    "balanced4": {"context": 4},
    "fsdp2_balanced2_tensor2": {"fsdp": 2, "context": 2, "tensor": 2},
}
# Every way of cutting a row once; the others are left to the slow tests.
FEW = ("context4_tensor2", "balanced4")
FAULTS = ("restart", "inclusive", "forgets_documents", "no_sum_of_eta", "forward_order_backward", "stored_order")


def runs_on(case: Case, mesh_name: str, *, fresh: bool) -> bool:
    """Whether every piece is whole chunks, every shard gets whole rows, and ``fresh`` rows bring no state."""
    chunks, rows, sizes = T // case.chunk_tokens, len(case.rows), MESHES[mesh_name]
    pieces = sizes.get("context", 1) * (2 if is_balanced(mesh_name) else 1)
    whole = chunks % pieces == 0 and rows % (sizes.get("data", 1) * sizes.get("fsdp", 1)) == 0
    return whole and not (fresh and case.carried)


def is_balanced(mesh_name: str) -> bool:
    return "balanced" in mesh_name


def name_of(mesh_name: str, case: Case, *, fresh: bool) -> str:
    """Returns the name of a comparison."""
    return f"{mesh_name} {case.name}{' fresh' if fresh else ''}"


def sharded_program(
    case: Case, mesh: jax.sharding.Mesh, *, fresh: bool = False, balanced: bool = False
) -> Callable[..., Any]:
    """``cases.gradients`` of the shape of this case, on a mesh."""

    balanced_over = mesh.shape["context"] if balanced else None
    loss = loss_function(shape_of(case), "chunked", fresh=fresh, balanced_over=balanced_over)

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
    scan, add, order = shards.exclusive_scan, shards.sum_gradient, shards._in_row_order

    def restart(options: Any, keep_R: Any, own_RDF: Any, first_BDF: Any, **direction: Any) -> Any:
        received, last = scan(options, keep_R, own_RDF, first_BDF, **direction)
        return jnp.zeros_like(received), last

    def inclusive(options: Any, keep_R: Any, own_RDF: Any, first_BDF: Any, **direction: Any) -> Any:
        received, last = scan(options, keep_R, own_RDF, first_BDF, **direction)
        return keep_R[:, None, None] * received + own_RDF, last

    def forgets_documents(options: Any, keep_R: Any, *states: Any, **direction: Any) -> Any:
        return scan(options, jnp.ones_like(keep_R), *states, **direction)

    faulty = {
        "restart": restart,
        "inclusive": inclusive,
        "forgets_documents": forgets_documents,
        "forward_order_backward": lambda *inputs, reverse=False: scan(*inputs),
    }
    shards.exclusive_scan = faulty.get(fault, scan)
    if fault == "stored_order":  # two pieces of a shard taken for neighbours
        shards._in_row_order = lambda x_nP: x_nP.reshape(-1, *x_nP.shape[2:])
    shards.sum_gradient = (lambda x, *names: add(x, *names) if names else x) if fault == "no_sum_of_eta" else add
    try:
        yield
    finally:
        shards.exclusive_scan, shards.sum_gradient, shards._in_row_order = scan, add, order


def main() -> None:
    devices = jax.devices()
    found: dict[str, dict[str, float]] = {}
    asked = sys.argv[1:]
    for mesh_name, sizes in ((name, MESHES[name]) for name in asked if name != "faults"):
        mesh = make_mesh(MeshConfig(**{"fsdp": 1} | sizes), devices[: int(np.prod(list(sizes.values())))])
        programs: dict[tuple[Case, bool], Callable[..., Any]] = {}
        for case in CASES:
            for fresh in (False, True):
                if runs_on(case, mesh_name, fresh=fresh):
                    made = sharded_program(case, mesh, fresh=fresh, balanced=is_balanced(mesh_name))
                    program = programs.setdefault((shape_of(case), fresh), made)
                    found[name_of(mesh_name, case, fresh=fresh)] = distances(case, program, fresh=fresh)
    case = BY_NAME["state_in"]
    for fault in FAULTS if "faults" in asked else ():
        balanced = fault == "stored_order"
        mesh = make_mesh(MeshConfig(fsdp=1, context=2 if balanced else 4), devices[: 2 if balanced else 4])
        with planted(fault):
            found[f"fault {fault}"] = distances(case, sharded_program(case, mesh, balanced=balanced))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
