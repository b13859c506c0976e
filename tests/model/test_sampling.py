"""Which tokens may be drawn: those that transformers keeps with top-k, then top-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.model.sampling import Sampling, kept_tokens

torch = pytest.importorskip("torch")
warpers = pytest.importorskip("transformers.generation.logits_process")
pytestmark = pytest.mark.hf

KEPT = jax.jit(kept_tokens)


def kept_by_transformers(logits_BV: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    scores = torch.from_numpy(logits_BV)
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    return torch.isfinite(scores).numpy()


@pytest.mark.parametrize("ties", [False, True], ids=["all different", "ties"])
@pytest.mark.parametrize("top_p", [0.0, 0.031, 0.317, 0.713, 0.947, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 40, 64])
def test_the_same_tokens_as_with_transformers(top_k: int, top_p: float, ties: bool) -> None:
    logits_BV = np.random.default_rng(0).normal(0.0, 2.0, (200, 64)).astype(np.float32)
    if ties:
        logits_BV = np.round(logits_BV)
    kept_BV = np.asarray(KEPT(jnp.asarray(logits_BV), Sampling(1.0, top_k, top_p)))
    wanted_BV = kept_by_transformers(logits_BV, top_k, top_p)
    if not ties:
        np.testing.assert_array_equal(kept_BV, wanted_BV)
    # Which of equally likely tokens at the edge of top-p stay is open there: the sort is not stable.
    found, wanted = (np.sort(np.where(kept, logits_BV, -np.inf)) for kept in (kept_BV, wanted_BV))
    np.testing.assert_array_equal(found, wanted)


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    """.5 of (.4, .3) / .7 is the first alone; of all it would be the first two."""
    logits_BV = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]], jnp.float32))
    np.testing.assert_array_equal(KEPT(logits_BV, Sampling(1.0, 2, 0.5)), [[True, False, False, False]])
    np.testing.assert_array_equal(KEPT(logits_BV, Sampling(1.0, 0, 0.5)), [[True, True, False, False]])
