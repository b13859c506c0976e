"""Attention over rows that a context axis may cut: which keys meet which queries on which device.

- ``all_to_all``: while attention runs, every device has whole rows and a part of the heads (of ``tensor`` x
  ``context``); key/value heads are copied where there are fewer than devices that share a row. Balanced as it is.
- ``all_gather``: a shard keeps its queries and gathers all keys and values. Rows are stored balanced
  (``layout/row_order.py``), an early and a late piece in every shard, because late queries see more keys.
- ``halo``: with a sliding window a shard needs only the last keys and values of the shard before it.

On its device the work is done by ``splash`` (TPU kernels), ``banded`` (a sliding window in blocks) or ``dense`` (all
scores); "auto" takes splash on TPUs, banded for windows of less than half the keys, dense otherwise.

Letters: B row, T tokens, N query heads, K key/value heads, H head dim, S keys; n shards; lower case: a device's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from intttrain.config import ModelConfig
from intttrain.config.errors import UserError
from intttrain.layout.axes import ROW_AXIS
from intttrain.layout.row_order import Ranges, context_way, halo_tokens, is_balanced, stored_ranges, stored_units
from intttrain.layout.sharding import (
    Axes,
    constrain,
    gather_pieces,
    per_device,
    pieces_of,
    platform,
    position_on,
)
from intttrain.model.attention import banded_attention, dense_attention, visible_keys
from intttrain.model.splash import attend_rows, make_kernel, supports
from intttrain.ttt.layout import NO_DOCUMENT

# (keys, values, their segment ids) of a device -> those that its queries meet
Bring = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]


class Cut(NamedTuple):
    """How a row is cut while attention runs.

    Attributes:
      q_axes, kv_axes, ids_axes: logical names of queries (B N T H), keys and values (B K T H), and segment ids (B T).
      positions_nt: where the queries of every shard stand among the keys that they meet; n = 1 if that is the same.
      piece: how many of them follow each other in the row.
      keys: how many keys a device has.
      bring: makes these keys of those that it holds.
    """

    q_axes: Axes
    kv_axes: Axes
    ids_axes: Axes
    positions_nt: np.ndarray
    piece: int
    keys: int
    bring: Bring


def attend(
    config: ModelConfig,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attends from every token to itself and the tokens before it in its document and window.

    The result, in the layout that its own backward pass wants, carries the name "attention" for remat policies.

    Raises:
      UserError: ``config.attention`` cannot run these shapes.
    """
    cut = _cut(config, q_BTNH.shape[1])
    if cut.kv_axes[1] == "spread_heads":
        k_BTKH, v_BTKH = _copy_heads(k_BTKH), _copy_heads(v_BTKH)
    by_splash = _takes_splash(config, cut)
    if by_splash:
        q_BTNH = q_BTNH * config.head_dim**-0.5
    by_head = [jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH)]
    kernel, kernel_axes = _make_kernel(config, cut, *(x.shape for x in by_head[:2])) if by_splash else (None, None)

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, ids_bt: jax.Array) -> jax.Array:
        k, v, ids_bS = cut.bring(k, v, ids_bt)
        if kernel is not None:
            return attend_rows(kernel, q, k, v, ids_bt, ids_bS)
        return checkpoint_name(_attend_by_xla(config, cut.positions_nt, q, k, v, ids_bt, ids_bS), "attention")

    axes = (cut.q_axes, cut.kv_axes, cut.kv_axes, cut.ids_axes)
    placed = [constrain(x, *names) for x, names in zip((*by_head, segment_ids_BT), axes, strict=True)]
    # Unchecked: JAX wants every pallas_call to say along which axes its results differ, and refuses the attention
    # kernels, which do not. XLA's attention it accepts, but then keeps a constant of it per device for the backward
    # pass. Nothing is summed over devices here, so no sum can be missing.
    o_BNTH = per_device(local, (kernel_axes, *axes), cut.q_axes, checked=False)(kernel, *placed)
    return constrain(jnp.swapaxes(o_BNTH, 1, 2), "batch", "tokens", "heads", "head_dim")


def _cut(config: ModelConfig, seq_len: int) -> Cut:
    shards, window = pieces_of(None, "tokens"), config.sliding_window
    way = context_way(config, seq_len, shards, pieces_of(None, "heads"))
    if way == "all_to_all":
        spread: Axes = ("batch", "spread_heads", None, "head_dim")
        return Cut(spread, spread, ("batch", None), np.arange(seq_len)[None], seq_len, seq_len, lambda *held: held)
    q_axes: Axes = ("batch", "heads", "tokens", "head_dim")
    kv_axes: Axes = ("batch", "kv_heads", "tokens", "head_dim")
    ids_axes: Axes = ("batch", "tokens")
    if way == "all_gather":
        balanced = is_balanced(config, seq_len, shards, pieces_of(None, "heads"))
        ranges = stored_ranges(seq_len, shards, balanced=balanced)
        positions_nt = stored_units(seq_len, shards, 1, balanced=balanced).reshape(shards, -1)
        piece = seq_len // len(ranges)
        return Cut(q_axes, kv_axes, ids_axes, positions_nt, piece, seq_len, lambda *held: _gather_rows(ranges, *held))
    assert window is not None
    own = seq_len // shards
    halo = halo_tokens(window, own)
    positions_nt = halo + np.arange(own)[None]
    return Cut(q_axes, kv_axes, ids_axes, positions_nt, own, halo + own, lambda *held: _put_halo_before(halo, *held))


def _copy_heads(x_BTKH: jax.Array) -> jax.Array:
    """Returns as many key/value heads as every device that shares a row can have some of."""
    kv_heads, devices = x_BTKH.shape[2], pieces_of(None, "spread_heads")
    copies = math.lcm(kv_heads, devices) // kv_heads
    return x_BTKH if copies == 1 else jnp.repeat(x_BTKH, copies, axis=2)


def _gather_rows(ranges: Ranges, k_bkth: jax.Array, v_bkth: jax.Array, ids_bt: jax.Array) -> tuple[jax.Array, ...]:
    """Gathers what all shards hold and puts its pieces into the order of the row."""
    in_order = sorted(range(len(ranges)), key=lambda piece: ranges[piece])

    def gather(x: jax.Array, dim: int) -> jax.Array:
        pieces = jnp.split(gather_pieces(x, "tokens", dim), len(ranges), axis=dim)
        return jnp.concatenate([pieces[piece] for piece in in_order], axis=dim)

    return gather(k_bkth, 2), gather(v_bkth, 2), gather(ids_bt, 1)


def _put_halo_before(halo: int, k_bkth: jax.Array, v_bkth: jax.Array, ids_bt: jax.Array) -> tuple[jax.Array, ...]:
    """Puts before what a shard holds the last of what the shard before it holds; the first has nobody to ask."""
    shards = pieces_of(None, "tokens")
    if halo == 0:  # a window of one token
        return k_bkth, v_bkth, ids_bt

    def receive(x: jax.Array, dim: int) -> jax.Array:
        last = jax.lax.slice_in_dim(x, x.shape[dim] - halo, None, axis=dim)
        return jax.lax.ppermute(last, ROW_AXIS, [(i, i + 1) for i in range(shards - 1)])

    def extend(x: jax.Array, dim: int) -> jax.Array:
        return jnp.concatenate([receive(x, dim), x], axis=dim)

    halo_ids = jnp.where(position_on("tokens") == 0, NO_DOCUMENT, receive(ids_bt, 1))
    return extend(k_bkth, 2), extend(v_bkth, 2), jnp.concatenate([halo_ids, ids_bt], axis=1)


def _takes_splash(config: ModelConfig, cut: Cut) -> bool:
    if config.attention != "splash" and (config.attention != "auto" or platform() != "tpu"):
        return False
    obstacle = supports(math.gcd(cut.piece, cut.keys), config.head_dim)
    if obstacle and config.attention == "splash":
        raise UserError(f'model.attention="splash": {obstacle}; use "auto" or "dense"')
    return not obstacle


def _make_kernel(config: ModelConfig, cut: Cut, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Returns the kernel of a device, an array tree that differs over shards, and the logical names of its arrays."""
    rows, heads = (size // pieces_of(None, name) for size, name in zip(q_shape[:2], cut.q_axes[:2], strict=True))
    groups = heads // (kv_shape[1] // pieces_of(None, cut.kv_axes[1]))
    kernel = make_kernel(
        cut.positions_nt, cut.piece, cut.keys, config.sliding_window, heads if rows > 1 else groups,
        one_kv_head=rows == 1, interpret=platform() != "tpu",
    )  # fmt: skip
    by_shard = "tokens" if len(cut.positions_nt) > 1 else None
    return kernel, jax.tree.map(lambda x: (by_shard,) if x.ndim == 1 else (None, by_shard, None), kernel)


def _attend_by_xla(
    config: ModelConfig, positions_nt: np.ndarray, q_bnth: jax.Array, k_bkSh: jax.Array, v_bkSh: jax.Array,
    ids_bt: jax.Array, ids_bS: jax.Array,
) -> jax.Array:  # fmt: skip
    q_btnh, k_bSkh, v_bSkh = (jnp.swapaxes(x, 1, 2) for x in (q_bnth, k_bkSh, v_bkSh))
    window, keys, queries = config.sliding_window, k_bSkh.shape[1], q_btnh.shape[1]
    narrow = config.attention == "banded" or (config.attention == "auto" and 2 * (window or keys) < keys)
    if narrow and window is not None and len(positions_nt) == 1:
        before = ((0, 0), (keys - queries, 0))
        q_bSnh = jnp.pad(q_btnh, (*before, (0, 0), (0, 0)))
        o_btnh = banded_attention(q_bSnh, k_bSkh, v_bSkh, ids_bS, window)[:, keys - queries :]
    else:
        shard = position_on("tokens") if len(positions_nt) > 1 else 0
        mask_btS = visible_keys(ids_bt, ids_bS, jnp.asarray(positions_nt)[shard], window)
        o_btnh = dense_attention(q_btnh, k_bSkh, v_bSkh, mask_btS)
    return jnp.swapaxes(o_btnh, 1, 2)
