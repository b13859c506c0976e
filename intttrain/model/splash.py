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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from intttrain.core.sharding import axis_size, constrain, device_kind, per_device

TOKEN_MULTIPLE = 128  # the smallest block of the kernel


class Blocks(NamedTuple):
    """Tokens of a block of queries and of keys; the forward kernel computes ``compute`` keys at once."""

    q: int
    kv: int
    compute: int
    dkv: int
    dq: int


# Chosen by the static profiles of ``python -m intttrain.planner.profile_kernels`` (``planner/attention_cost.py`` has
# them all). Blocks on the diagonal are computed whole, so large ones pay only in long rows without a window: on v5p
# forward .75 -> .815 of the peak, backward .91 -> .95 and .88 -> .93, for 3 % more work at 32768 tokens, 11 % at 8192.
_BLOCKS = Blocks(1024, 1024, 512, 1024, 1024)
_LONG_ROW = 32768
_LONG_ROW_BLOCKS = {  # device_kind -> blocks; .5 of the peak is the best of v6e, half of whose matrix unit 128 fill
    "TPU v5": Blocks(2048, 2048, 512, 2048, 2048),  # v5p
    "TPU v5 lite": Blocks(1024, 2048, 512, 2048, 1024),  # v5e: .80 -> .84, .95 -> .97, .92
    "TPU v6 lite": Blocks(1024, 2048, 512, 1024, 1024),  # v6e: .26 -> .28, .40, .34
}


def choose_blocks(seq_len: int, window: int | None) -> Blocks:
    """Returns the blocks for rows on the devices of this program; each divides ``seq_len``."""
    long = window is None and seq_len >= _LONG_ROW
    chosen = _LONG_ROW_BLOCKS.get(device_kind(), _BLOCKS) if long else _BLOCKS
    return Blocks(*(math.gcd(seq_len, size) for size in chosen))


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
    blocks = choose_blocks(seq_len, window)
    sizes = kernel.BlockSizes(
        block_q=blocks.q, block_kv=blocks.kv, block_kv_compute=blocks.compute,
        block_q_dkv=blocks.dkv, block_kv_dkv=blocks.dkv, block_kv_dkv_compute=blocks.dkv,
        block_q_dq=blocks.dq, block_kv_dq=blocks.dq,
    )  # fmt: skip
    mask = masks.MultiHeadMask([BandMask(seq_len, window)] * heads)
    return make(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
