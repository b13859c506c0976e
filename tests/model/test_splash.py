"""The TPU attention kernel, interpreted on the CPU, against the dense form: value and gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.model import splash_blocks
from intttrain.model.attention import causal_mask, dense_attention
from intttrain.model.context_attention import attend
from intttrain.model.splash import BandMask, kernel, masks, supports
from intttrain.model.splash_blocks import choose_blocks
from tests.model.test_causality import CONFIG

T, N, K, H = 256, 4, 2, 128


def inputs(rows: int = 1) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (rows, T, heads, H)) for key, heads in zip(keys, (N, K, K, N), strict=True))
    return q, k, v, do


def segments() -> jax.Array:
    """Three documents, one edge on a block of 128, and padding."""
    return jnp.asarray(np.repeat([1, 2, 3, 0], [128, 70, 40, 18])[None], jnp.int32)


@pytest.mark.parametrize(("rows", "window"), [(1, None), (1, 100), (2, None)])
def test_splash_is_dense_in_value_and_gradient(rows, window):
    """One row is cut by key/value heads, several are not."""
    q, k, v, do = inputs(rows)
    ids = jnp.concatenate([segments(), jnp.flip(segments(), 1)])[:rows]

    def dense(q, k, v):
        return dense_attention(q, k, v, causal_mask(ids, window))

    config = dataclasses.replace(CONFIG, attention="splash", head_dim=H, sliding_window=window)

    def splash(q, k, v):
        return attend(config, q, k, v, ids)

    wanted, pull = jax.vjp(dense, q, k, v)
    actual, pull_splash = jax.vjp(splash, q, k, v)
    # fp32 sums over up to 256 keys in another order; the kernel multiplies in fp32 too.
    np.testing.assert_allclose(actual, wanted, atol=2e-5)
    for a, b in zip(pull_splash(do), pull(do), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_shapes_that_the_kernel_cannot_run_are_refused_or_left_to_dense():
    assert supports(256, 128) == ""
    assert "200 tokens a row are not a multiple of 128" in supports(200, 128)
    assert "head_dim 64" in supports(256, 64)
    q, k, v, _ = (x[:, :200] for x in inputs())
    config = dataclasses.replace(CONFIG, attention="splash", head_dim=H, sliding_window=None)
    with pytest.raises(UserError, match="200 tokens"):
        attend(config, q, k, v, segments()[:, :200])


@pytest.mark.parametrize("window", [None, 1, 100, 256, 700])
@pytest.mark.parametrize("make", [kernel.make_splash_mha, kernel.make_splash_mqa])
def test_blocks_are_chosen_as_with_the_masks_of_the_library(make, window):
    """Which blocks the kernels skip, compute and mask, for the three kernels, with blocks of unequal sides."""
    tokens = 1024
    sizes = kernel.BlockSizes(
        block_q=256, block_kv=512, block_kv_compute=256, block_q_dkv=128, block_kv_dkv=256, block_kv_dkv_compute=256,
        block_q_dq=256, block_kv_dq=256,
    )  # fmt: skip
    shape = (tokens, tokens)
    theirs = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    ours, wanted = (
        make(masks.MultiHeadMask([mask] * 2), block_sizes=sizes, head_shards=1, q_seq_shards=1)
        for mask in (BandMask(np.arange(tokens), tokens, window), theirs)
    )
    for info in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        for name in ("data_next", "block_mask", "q_sequence"):
            np.testing.assert_array_equal(getattr(getattr(ours, info), name), getattr(getattr(wanted, info), name))


def test_blocks_divide_the_row_and_grow_with_it(monkeypatch):
    for kind in ("cpu", *splash_blocks._LONG):
        monkeypatch.setattr(splash_blocks, "device_kind", lambda kind=kind: kind)
        for seq_len in (128, 384, 1536, 8192, 33024, 131072 + 384):
            for tile in choose_blocks(seq_len, seq_len // 2, None):
                assert seq_len // 2 % tile.q == seq_len % tile.kv == tile.kv % tile.compute == 0
    monkeypatch.setattr(splash_blocks, "device_kind", lambda: "TPU v5")
    assert choose_blocks(32768, 32768, None).forward.q == 2048
    assert choose_blocks(131072, 32768, None).backward.kv == 4096
    assert choose_blocks(131072, 131072, 2048).backward.kv == 1024  # large blocks are wasted on a window
