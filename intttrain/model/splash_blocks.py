"""How many tokens the blocks of the splash kernels have: one table per chip and row length.

The part of the peak that a block reaches is a static profile of ``python -m tests.benchmarks.profile_attention``
(``planner/attention_cost.py`` has more of them). Blocks on the diagonal are computed whole, so a row of T tokens has
1 + block / T times the scores that it needs, and large blocks pay only in long rows without a window.

The backward pass is one kernel that computes scores and their gradients once: five products, where two kernels have
seven. It writes a part of the queries' gradient for every block of keys, in the compute dtype, and XLA adds them up: of
a head of 128 in bf16 17 MB at 8192 tokens, 1 GB at 131072. It walks the whole square, so with a window the gradient of
the queries is a kernel of its own.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import NamedTuple

from intttrain.layout.sharding import device_kind


class Tile(NamedTuple):
    """Tokens of a block of queries and of keys; the kernel computes ``compute`` keys at once."""

    q: int
    kv: int
    compute: int


class Blocks(NamedTuple):
    """Blocks of the forward and of the backward kernel."""

    forward: Tile
    backward: Tile


_SHORT = Blocks(Tile(1024, 1024, 512), Tile(1024, 2048, 1024))  # v5p: .75, .94; v5e: .80, .96; v6e: .26, .41
_WINDOW = Blocks(Tile(1024, 1024, 512), Tile(1024, 1024, 1024))
_LONG_ROW = 32768
_LONG: Mapping[str, Blocks] = types.MappingProxyType(
    {  # by device_kind
        "TPU v5": Blocks(Tile(2048, 2048, 512), Tile(2048, 4096, 1024)),  # v5p: .82, .97
        "TPU v5 lite": Blocks(Tile(1024, 2048, 512), Tile(2048, 4096, 1024)),  # v5e: .84, .98
        # Of these .5 is the best: a head dim of 128 fills half of their matrix unit.
        "TPU v6 lite": Blocks(Tile(1024, 4096, 512), Tile(2048, 4096, 1024)),  # v6e: .29, .44
        "TPU7x": Blocks(Tile(1024, 4096, 512), Tile(1024, 4096, 512)),  # .29, .43
    }
)


def choose_blocks(keys: int, queries: int, window: int | None) -> Blocks:
    """Returns the blocks for the devices of this program; each divides the tokens that it cuts.

    Args:
      keys: tokens that are attended to.
      queries: tokens that attend, or of every piece of them that is consecutive in the row.
      window: how many tokens a query sees; ``None`` for all before it.
    """
    if window is not None:
        chosen = _WINDOW
    else:
        chosen = _LONG.get(device_kind(), _SHORT) if keys >= _LONG_ROW else _SHORT

    def fit(tile: Tile) -> Tile:
        return Tile(math.gcd(queries, tile.q), math.gcd(keys, tile.kv), math.gcd(keys, tile.compute))

    return Blocks(fit(chosen.forward), fit(chosen.backward))
