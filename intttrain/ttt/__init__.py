"""In-Place Test-Time Training as pure functions over arrays: the only home of the method.

``fast_weight_projection`` is the door: it replaces ``o = W0 z`` of an MLP block. ``make_targets`` computes the
values that are written, ``FastWeightCache`` with ``decode_projection`` is the same thing one token at a time.
``reference`` is the definition; everything else must agree with it in value and in gradient.

Letters: B row, T tokens in a row, C tokens per chunk, M = T / C chunks, D model width, F feed-forward width,
W conv taps.
"""

from intttrain.ttt.api import FastWeightOutput, fast_weight_projection, project
from intttrain.ttt.chunked import MIXED_SCOPE
from intttrain.ttt.decode import FastWeightCache, decode_projection, init_cache
from intttrain.ttt.layout import ChunkLayout, FastWeightState, init_state, make_layout
from intttrain.ttt.shards import STATE_NAME
from intttrain.ttt.targets import CONV_TAPS, make_targets, mix_neighbours
from intttrain.ttt.transforms import DeltaTransform

__all__ = [
    "CONV_TAPS",
    "MIXED_SCOPE",
    "STATE_NAME",
    "ChunkLayout",
    "DeltaTransform",
    "FastWeightCache",
    "FastWeightOutput",
    "FastWeightState",
    "decode_projection",
    "fast_weight_projection",
    "init_cache",
    "init_state",
    "make_layout",
    "make_targets",
    "mix_neighbours",
    "project",
]
