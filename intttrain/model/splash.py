"""Attention on TPUs: JAX's splash kernels, which never hold the scores of more than one block.

What a kernel is mapped over is "parallel" to it, and both cores of a v4 or v5p work on that, backward too: rows where
there are several, else key/value heads (which costs copies).

Letters: B row, T query tokens, S key tokens, N query heads, K key/value heads, H head dim,
G query heads of a key/value head; n shards of a context axis.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from intttrain.model.splash_blocks import choose_blocks

TOKEN_MULTIPLE = 128  # the smallest block of the kernel


def supports(seq_len: int, head_dim: int) -> str:
    """Returns why the kernel cannot run these shapes, or ``""``."""
    if seq_len % TOKEN_MULTIPLE:
        return f"{seq_len} tokens a row are not a multiple of {TOKEN_MULTIPLE}"
    if head_dim % 128:
        return f"head_dim {head_dim} is not a multiple of 128"
    return ""


def make_kernel(
    positions_nT: np.ndarray, piece: int, keys: int, window: int | None, heads: int, *, one_kv_head: bool,
    interpret: bool = False,
) -> kernel.SplashAttentionKernel:  # fmt: skip
    """Returns the kernel for one row, or for one of its key/value heads.

    It is a tree of arrays; with n > 1, those of all shards, to be cut along dim 1 (or their only one).

    Args:
      positions_nT: where the queries of every shard stand among the keys.
      piece: how many of them, at least, follow each other; blocks of queries divide this.
      keys: S.
      window: keys that a query sees, itself included; ``None`` for all.
      heads: query heads of the kernel.
      one_kv_head: they share one key/value head.
      interpret: runs the kernel without a TPU, slowly.

    What it keeps for the backward pass carries the name "attention" (remat).
    """
    forward, backward = choose_blocks(keys, piece, window)
    apart: dict[str, Any] = {} if window is None else {"block_q_dq": backward.q, "block_kv_dq": backward.kv}
    sizes = kernel.BlockSizes(
        block_q=forward.q, block_kv=forward.kv, block_kv_compute=forward.compute,
        block_q_dkv=backward.q, block_kv_dkv=backward.kv, block_kv_dkv_compute=backward.compute,
        use_fused_bwd_kernel=window is None, **apart,
    )  # fmt: skip
    mask = masks.MultiHeadMask([BandMask(positions_nT.reshape(-1), keys, window)] * heads)
    make = kernel.make_splash_mqa if one_kv_head else kernel.make_splash_mha
    return make(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=len(positions_nT),
        residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip


def attend_rows(
    kernel_of_row: Any,
    q_BNTH: Float[Array, "B N T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    q_segment_ids_BT: Int[Array, "B T"],
    k_segment_ids_BS: Int[Array, "B S"],
) -> Float[Array, "B N T H"]:
    """Returns what ``dense_attention`` returns; queries come with the factor ``H ** -0.5``."""
    segments = kernel.SegmentIds(q_segment_ids_BT, k_segment_ids_BS)
    if not kernel_of_row.kwargs["is_mqa"]:
        return jax.vmap(kernel_of_row)(q_BNTH, k_BKSH, v_BKSH, segments)
    rows, heads, queries, head_dim = q_BNTH.shape
    q_BKGTH = q_BNTH.reshape(rows, k_BKSH.shape[1], -1, queries, head_dim)
    per_row = jax.vmap(jax.vmap(kernel_of_row, in_axes=(0, 0, 0, None)))
    return per_row(q_BKGTH, k_BKSH, v_BKSH, segments).reshape(rows, heads, queries, head_dim)


class BandMask(masks.Mask):
    """The causal mask, of a window if there is one, which says of a block only what its distances show.

    The library asks of every block whether any and whether all of it is visible. Its own masks answer with every entry
    of the block, half a minute at 131072 tokens; whether a key is visible depends on its distance from the query only,
    and a block has few of those. The kernel itself calls ``mask_function``.

    Args:
      q_sequence: where the queries stand among the keys; those of a block follow each other.
      keys: how many keys there are.
      window: how many of them a query sees, itself included; ``None`` for all.
    """

    def __init__(self, q_sequence: np.ndarray, keys: int, window: int | None):
        self.q_sequence, self.keys, self.window = q_sequence.astype(np.int32), keys, window
        self._identity = (self.q_sequence.tobytes(), keys, window)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), self.keys

    def mask_function(self, q_ids: Any, kv_ids: Any) -> Any:
        """Returns whether a query sees a key, of arrays that broadcast."""
        causal = q_ids >= kv_ids
        return causal if self.window is None else causal & (q_ids - kv_ids < self.window)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """Returns whether each distance in the block, smallest first, is visible, as a column."""
        q, kv = block
        distances = np.arange(self.q_sequence[q.start] - kv.stop + 1, self.q_sequence[q.stop - 1] + 1 - kv.start)
        return np.asarray(self.mask_function(distances, 0))[:, None]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BandMask) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)
