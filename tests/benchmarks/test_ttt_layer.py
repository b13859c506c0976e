"""The two sides of the benchmark compute the same thing; how fast is not a test."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.benchmarks.ttt_layer import ETA, jax_step, problem, run_torch
from tests.ttt.cases import assert_close

CHUNK_TOKENS = 8


@pytest.mark.hf
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_torch_with_a_weight_per_chunk_agrees(chunks):
    given = problem(chunks, CHUNK_TOKENS, 16, 24)
    loss, gradients = jax.jit(jax_step(CHUNK_TOKENS))(*given)
    step, read = run_torch(given, CHUNK_TOKENS)
    wanted_loss, wanted = read(step())
    assert_close(loss, wanted_loss, 1e-6, "loss")
    assert set(gradients) == set(wanted)
    for name, gradient in wanted.items():
        assert_close(gradients[name], gradient, 1e-5, name)
    if chunks > 1:
        assert np.max(np.abs(wanted["target"])) > 1e-3 * ETA, "the updates are read"
