"""The order in which the tokens of a row are stored when it is cut over the mesh axis ``context``.

Storage is cut into equal, consecutive parts, one a shard; which tokens of the row they hold is said here and nowhere
else. *Logical* places count the tokens as they are read, *stored* ones as they lie on the devices.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from intttrain.config import ModelConfig
from intttrain.config.errors import UserError, nearest_divisors

Ways = Literal["all_to_all", "all_gather", "halo"]
Ranges = tuple[tuple[int, int], ...]  # (start, stop) of tokens, half open


def stored_ranges(seq_len: int, context_shards: int, *, balanced: bool) -> Ranges:
    """Returns the logical ranges of a row in the order in which they are stored, all of the same length.

    Args:
      seq_len: tokens of the row, a multiple of the number of ranges.
      context_shards: n; shard i holds the i-th n-th of the ranges.
      balanced: shard i holds the pieces i and 2 n - 1 - i of 2 n, an early and a late one, so that all shards attend
        to equally many tokens; otherwise the i-th of n pieces.
    """
    pieces = 2 * context_shards if balanced else context_shards
    if seq_len % pieces:
        raise ValueError(f"{seq_len=} is not a multiple of {pieces} pieces")
    order = [piece for i in range(context_shards) for piece in ((i, pieces - 1 - i) if balanced else (i,))]
    length = seq_len // pieces
    return tuple((piece * length, (piece + 1) * length) for piece in order)


def stored_units(seq_len: int, context_shards: int, unit: int, *, balanced: bool) -> np.ndarray:
    """Returns the logical numbers of the units (tokens or chunks, of ``unit`` tokens) in the order of storage."""
    ranges = stored_ranges(seq_len, context_shards, balanced=balanced)
    return np.concatenate([np.arange(start // unit, stop // unit) for start, stop in ranges])


def context_way(model: ModelConfig, seq_len: int, context: int, tensor: int) -> Ways:
    """Returns how attention crosses a context axis (``model.context_attention``, or what "auto" takes).

    "auto" exchanges only a halo if a window allows it, else heads if they divide, else gathers keys.

    Args:
      model: its heads and window decide.
      seq_len: tokens of a row.
      context, tensor: sizes of the mesh axes.
    """
    if context == 1:
        return "all_to_all"  # of one
    if model.context_attention != "auto":
        return model.context_attention
    if model.sliding_window is not None and model.sliding_window - 1 <= seq_len // context:
        return "halo"
    return "all_gather" if model.num_heads % (context * tensor) else "all_to_all"


def is_balanced(model: ModelConfig, seq_len: int, context: int, tensor: int) -> bool:
    """Whether rows are stored balanced: where shards gather keys and two pieces a shard are whole chunks."""
    gathered = context_way(model, seq_len, context, tensor) == "all_gather"
    return gathered and seq_len % (2 * context * _chunk_tokens(model)) == 0


def halo_tokens(window: int, shard_tokens: int) -> int:
    """Returns how many tokens before its own a shard needs: ``window - 1``, rounded up to whole blocks."""
    block = math.gcd(shard_tokens, 1024)
    return -(-(window - 1) // block) * block


def check_row_order(model: ModelConfig, name: str, seq_len: int, context: int, tensor: int) -> None:
    """Checks that rows of ``seq_len`` (the option ``name``) can be cut over ``context``. Raises ``UserError``."""
    way = context_way(model, seq_len, context, tensor)
    forced = f"model.context_attention={model.context_attention!r}"
    if way == "all_to_all" and model.num_heads % (context * tensor):
        raise UserError(
            f"{forced}: mesh.context={context} x mesh.tensor={tensor} does not divide model.num_heads="
            f"{model.num_heads}; use 'all_gather', or mesh.context={_choices(model.num_heads // tensor, context)}"
        )
    if way == "halo" and (model.sliding_window is None or model.sliding_window - 1 > seq_len // context):
        raise UserError(
            f"{forced} needs a window of at most {name}={seq_len} / mesh.context={context} = {seq_len // context} "
            f"tokens, but model.sliding_window={model.sliding_window}; use 'auto'"
        )
    if seq_len % context:
        raise UserError(
            f"{name}={seq_len} cannot be cut into mesh.context={context} pieces; "
            f"use mesh.context={_choices(seq_len, context)}"
        )
    if (seq_len // context) % _chunk_tokens(model):
        raise UserError(
            f"{name}={seq_len} over mesh.context={context} gives {seq_len // context} tokens a device, not a whole "
            f"number of chunks of model.ttt.chunk_tokens={_chunk_tokens(model)}; "
            f"use mesh.context={_choices(seq_len // _chunk_tokens(model), context)}"
        )


def _chunk_tokens(model: ModelConfig) -> int:
    return 1 if model.ttt is None else model.ttt.chunk_tokens


def _choices(number: int, wanted: int) -> str:
    return " or ".join(map(str, nearest_divisors(number, wanted)))
