"""Scores documents on one device and on meshes of eight and prints how far the sums are apart, as JSON.

A process of its own because the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np

from intttrain.config import MeshConfig
from intttrain.evals import PositionLosses, evaluate_positions
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import named_shardings
from intttrain.model import logical_axes
from tests.evals.cases import DENSE, EVAL, MODEL, make_params, make_rows, make_store

MESHES = {
    "fsdp2_context2": {"fsdp": 2, "context": 2},
    "data2_fsdp2_context2": {"data": 2, "fsdp": 2, "context": 2},
    "context4": {"fsdp": 1, "context": 4},
    "context2_gathered": {"fsdp": 2, "context": 2},
}


def distances(one: PositionLosses, many: PositionLosses) -> dict[str, float]:
    found = {"nll": float(np.max(np.abs(one.nll_NP - many.nll_NP) / np.maximum(one.weight_NP, 1.0)))}
    found["weight"] = float(np.max(np.abs(one.weight_NP - many.weight_NP)))
    if one.state_norm_NP is not None:
        assert many.state_norm_NP is not None
        found["state_norm"] = float(np.nanmax(np.abs(one.state_norm_NP - many.state_norm_NP)))
    return found


def main() -> None:
    found = {}
    eval_config = dataclasses.replace(EVAL, batch_rows=4)
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(make_store(Path(folder) / "heldout", [12, 16, 17, 31, 32, 33, 80]))
    for kind, config in (("ttt", MODEL), ("dense", DENSE)):
        params = make_params(dense=config.ttt is None)
        one = evaluate_positions(config, params, rows, eval_config)
        for name, sizes in MESHES.items():
            mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
            if name.endswith("gathered"):
                config = dataclasses.replace(config, context_attention="all_gather")
            placed = jax.device_put(params, named_shardings(mesh, logical_axes(config), params))
            found[f"{kind} {name}"] = distances(one, evaluate_positions(config, placed, rows, eval_config, mesh=mesh))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
