"""The backward pass holds a few states, however many chunks a row has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from intttrain import ttt
from intttrain.ttt.layout import make_layout

# A state of 512 x 512 fp32 is 1 MiB; a chunk of one token holds 2 KiB of z and 2 KiB of v. At 256 chunks z or v of the
# whole row is half a state, so whatever must grow with the row (z, v, o and their gradients, a dozen arrays) stays
# below six states, and one state per chunk would show as 252.
D = F = 512
C = 1
STATE_BYTES = D * F * 4
FEW = 6


def naive(z, v, w, ids, update):
    """The same recurrence left to autodiff, which keeps the state of every chunk."""
    layout = make_layout(ids, C)
    chunks = ids.shape[1] // C

    def step(s, chunk):
        z_CF, v_CD, reads_C, writes_C, keep = chunk
        o_CD = z_CF @ (w + s).T * reads_C[:, None] + z_CF @ w.T * (1 - reads_C)[:, None]
        return keep * s + (v_CD * writes_C[:, None]).T @ z_CF, o_CD

    masks = layout.reads_BMC[0], layout.writes_BMC[0], layout.keeps_BM[0]
    _, o_MCD = jax.lax.scan(step, jnp.zeros((D, F)), (z.reshape(chunks, C, F), v.reshape(chunks, C, D), *masks))
    return o_MCD.reshape(1, chunks * C, D)


def chunked(z, v, w, ids, update):
    return ttt.fast_weight_projection(z, v, w, ids, chunk_tokens=C, eta=jnp.asarray(1.0), update=update).o_BTD


@functools.cache
def temporary_bytes(project, chunks, update):
    """Returns the scratch memory of the compiled value and gradient of one row."""

    def loss(z, v, w, ids):
        return jnp.sum(jnp.square(project(z, v, w, ids, update)))

    z, v = (jax.ShapeDtypeStruct((1, chunks * C, width), jnp.float32) for width in (F, D))
    w, ids = jax.ShapeDtypeStruct((D, F), jnp.float32), jax.ShapeDtypeStruct((1, chunks * C), jnp.int32)
    analysis = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(z, v, w, ids).compile().memory_analysis()
    if analysis is None or not analysis.temp_size_in_bytes:
        pytest.skip("this backend does not report memory")
    return analysis.temp_size_in_bytes


def growth(project, update):
    """Returns how many states of scratch memory 256 chunks need beyond 4."""
    return (temporary_bytes(project, 256, update) - temporary_bytes(project, 4, update)) / STATE_BYTES


@pytest.mark.parametrize(
    "update",
    [ttt.UpdateRule(), ttt.UpdateRule(clip=1.0, preserve_row_norm=True), ttt.UpdateRule(spectral=1.0)],
    ids=["plain", "clip_row_norm", "spectral"],
)
def test_backward_memory_does_not_grow_with_the_number_of_chunks(update):
    assert growth(chunked, update) < FEW
    assert temporary_bytes(chunked, 4, update) / STATE_BYTES < 3 * FEW


def test_autodiff_through_the_scan_would_fail_the_same_bound():
    assert growth(naive, ttt.UpdateRule()) > 8 * FEW
