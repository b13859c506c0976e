"""Attention on TPUs: JAX's splash kernels, which never hold the scores of more than one block.

Each device attends with its own rows and heads. What a kernel is mapped over is "parallel" to it, and both cores of a
v4 or v5p work on that, backward too: rows where there are several, else key/value heads (which costs copies). A context
axis that divides the query heads divides them as well while the kernel runs: the row comes together and the heads part
(all-to-all), then the reverse; key/value heads are copied where they are fewer than the devices that share a row. With
other numbers of heads every context shard computes all of them, which is right and wasteful.

Letters: B row, T tokens, N query heads, K key/value heads, H head dim; lower case is a device's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from intttrain.core.sharding import axis_size, constrain, per_device
from intttrain.model.splash_blocks import choose_blocks

TOKEN_MULTIPLE = 128  # the smallest block of the kernel


def supports(seq_len: int, head_dim: int) -> str:
    """Returns why the kernel cannot run these shapes, or ``""``."""
    if seq_len % TOKEN_MULTIPLE:
        return f"{seq_len} tokens a row are not a multiple of {TOKEN_MULTIPLE}"
    if head_dim % 128:
        return f"head_dim {head_dim} is not a multiple of 128"
    return ""


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"],
    window: int | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns what ``dense_attention`` returns under the causal mask of documents and window.

    Args:
      q_BTNH, k_BTKH, v_BTKH: rotated queries and keys, and values.
      segment_ids_BT: documents.
      window: tokens that a query sees, itself included; ``None`` for all.
      interpret: runs the kernel without a TPU, slowly.
    """
    seq_len, query_heads, head_dim = q_BTNH.shape[1:]
    kv_heads, shards = k_BTKH.shape[2], axis_size("tensor") * axis_size("context")
    spread = query_heads % shards == 0
    copies = math.lcm(kv_heads, shards) // kv_heads if spread else 1
    if copies > 1:
        k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
    in_axes = ("batch", "spread_heads" if spread else "heads", None, "head_dim")

    def local(q_bnTH: jax.Array, k_bkTH: jax.Array, v_bkTH: jax.Array, segment_ids_bT: jax.Array) -> jax.Array:
        rows, heads = q_bnTH.shape[:2]
        segments = kernel.SegmentIds(segment_ids_bT, segment_ids_bT)
        if rows > 1:
            return jax.vmap(_make_kernel(kernel.make_splash_mha, seq_len, heads, window, interpret))(
                q_bnTH, k_bkTH, v_bkTH, segments
            )
        groups = heads // k_bkTH.shape[1]
        attend = _make_kernel(kernel.make_splash_mqa, seq_len, groups, window, interpret)
        q_bkgTH = q_bnTH.reshape(rows, -1, groups, seq_len, head_dim)
        per_row = jax.vmap(jax.vmap(attend, in_axes=(0, 0, 0, None)))
        return per_row(q_bkgTH, k_bkTH, v_bkTH, segments).reshape(q_bnTH.shape)

    by_head = [jnp.swapaxes(x, 1, 2) for x in (q_BTNH * head_dim**-0.5, k_BTKH, v_BTKH)]
    attend = per_device(local, (in_axes, in_axes, in_axes, ("batch", None)), in_axes)
    o_BNTH = attend(*(constrain(x, *in_axes) for x in by_head), constrain(segment_ids_BT, "batch", None))
    return constrain(jnp.swapaxes(o_BNTH, 1, 2), "batch", "tokens", "heads", "head_dim")


class BandMask(masks.Mask):
    """The causal mask, of a window if there is one, which says of a block only what its distances show.

    The library asks of every block whether any and whether all of it is visible. Its own masks answer with every entry
    of the block, half a minute at 131072 tokens; whether a key is visible depends on its distance from the query only,
    and a block has few of those. The kernel itself calls ``mask_function``.
    """

    def __init__(self, seq_len: int, window: int | None):
        self.seq_len, self.window = seq_len, window
        self.q_sequence = np.arange(seq_len, dtype=np.int32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.seq_len, self.seq_len

    def mask_function(self, q_ids: Any, kv_ids: Any) -> Any:
        """Returns whether a query sees a key, of arrays that broadcast."""
        causal = q_ids >= kv_ids
        return causal if self.window is None else causal & (q_ids - kv_ids < self.window)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """Returns whether each distance in the block, smallest first, is visible, as a column."""
        q, kv = block
        distances = np.arange(q.start - kv.stop + 1, q.stop - kv.start)
        return np.asarray(self.mask_function(distances, 0))[:, None]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BandMask) and (self.seq_len, self.window) == (other.seq_len, other.window)

    def __hash__(self) -> int:
        return hash((self.seq_len, self.window))


def _make_kernel(make: Callable[..., Any], seq_len: int, heads: int, window: int | None, interpret: bool) -> Any:
    """Returns the kernel for one row (``make_splash_mha``) or for one of its key/value heads (``make_splash_mqa``).

    What it keeps for the backward pass carries the name "attention" (remat).
    """
    forward, backward = choose_blocks(seq_len, seq_len, window)
    apart = {} if window is None else {"block_q_dq": backward.q, "block_kv_dq": backward.kv}
    sizes = kernel.BlockSizes(
        block_q=forward.q, block_kv=forward.kv, block_kv_compute=forward.compute,
        block_q_dkv=backward.q, block_kv_dkv=backward.kv, block_kv_dkv_compute=backward.compute,
        use_fused_bwd_kernel=window is None, **apart,
    )  # fmt: skip
    mask = masks.MultiHeadMask([BandMask(seq_len, window)] * heads)
    return make(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
