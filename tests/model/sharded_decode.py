"""Generates and reads gated documents on one device and on meshes, and prints both, as JSON.

A process of its own because the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

from intttrain import ttt
from intttrain.config import MeshConfig
from intttrain.data.tokenizers import ByteTokenizer
from intttrain.evals.conditions import Condition
from intttrain.evals.gating.documents import GatedDocuments
from intttrain.evals.harness import Respondent
from intttrain.layout.mesh import make_mesh
from intttrain.layout.sharding import named_shardings
from intttrain.model import Generator, Request, Sampling, logical_axes
from tests.model.test_gates import MODEL, PARAMS, TOKENS

MESHES = {
    "fsdp4": {"fsdp": 4},
    "data2_tensor2": {"data": 2, "fsdp": 1, "tensor": 2},
    "fsdp2_context2": {"fsdp": 2, "context": 2},
}
RULE = ttt.GateRule("online", "reconstruction")
PROMPTS = [TOKENS[n % 4, : 3 + 4 * n] for n in range(6)]


def results(mesh: Any) -> dict[str, Any]:
    """Continuations of six prompts in four rows, losses and gates under a rule, scores of all next tokens."""
    params = PARAMS
    if mesh is not None:
        params = jax.device_put(params, named_shardings(mesh, logical_axes(MODEL), params))
    generator = Generator(MODEL, params, rows=4, max_tokens=40, gate=RULE, mesh=mesh, draws=4)
    continuations: dict[int, list[int]] = {n: [] for n in range(len(PROMPTS))}
    for piece in generator.run([Request(n, p, 7) for n, p in enumerate(PROMPTS)], Sampling(1.0, seed=3)):
        continuations[piece.sequence] += piece.tokens.tolist()
    rows = [type("Row", (), {"tokens_BT": tokens})() for tokens in TOKENS]
    found = GatedDocuments(MODEL, params, rows, batch_rows=4, mesh=mesh).read(RULE, ttt.GateSettings())
    reader = Respondent(Condition(MODEL, params, 0.5), ByteTokenizer(), rows=4, report=lambda _: None, mesh=mesh)
    return {
        "scores": reader.score([(TOKENS[0, :9], [token]) for token in range(MODEL.vocab_size)]),
        "continuations": [continuations[n] for n in continuations],
        "nll": found.nll_NM.tolist(),
        "gates": np.asarray(found.gates_NMn).tolist(),
    }


def main() -> None:
    found = {"one": results(None)}
    for name, sizes in MESHES.items():
        found[name] = results(make_mesh(MeshConfig(**sizes), jax.devices()[:4]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
