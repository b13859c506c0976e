"""The order in which the tokens of a row are stored when it is cut over the mesh axis ``context``.

Storage is cut into equal, consecutive parts, one a shard; which tokens of the row they hold is said here and nowhere
else. *Logical* places count the tokens as they are read, *stored* ones as they lie on the devices.
"""

from __future__ import annotations

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
