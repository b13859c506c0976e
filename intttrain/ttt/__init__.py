"""In-Place Test-Time Training as pure functions over arrays: the only home of the method.

``fast_weight_projection`` is the door: it replaces ``o = W0 z`` of an MLP block. ``make_targets`` computes the
values that are written; ``FastWeightCache`` with ``read``, ``remember`` and ``commit`` is the same thing a few tokens
at a time, where ``gating`` may decide which chunks are written.
``UpdateRule`` says what a chunk writes and what becomes of what was written before.
``reference`` is the definition; everything else must agree with it in value and in gradient.

Letters: B row, T tokens in a row, C tokens per chunk, M = T / C chunks, D model width, F feed-forward width,
W conv taps.
"""

from intttrain.ttt.api import FastWeightOutput, fast_weight_projection, project
from intttrain.ttt.chunked import MIXED_SCOPE
from intttrain.ttt.decode import FastWeightCache, FastWeights, commit, init_cache, read, remember
from intttrain.ttt.gating import Decision, GateRule, GateSettings, GateState
from intttrain.ttt.layout import ChunkLayout, FastWeightState, init_state, make_layout
from intttrain.ttt.rules import UpdateRule
from intttrain.ttt.shards import STATE_NAME
from intttrain.ttt.signals import ModelSignal, Predictions, measured_tokens
from intttrain.ttt.targets import CONV_TAPS, make_targets, mix_neighbours

__all__ = [
    "CONV_TAPS",
    "MIXED_SCOPE",
    "STATE_NAME",
    "ChunkLayout",
    "Decision",
    "FastWeightCache",
    "FastWeightOutput",
    "FastWeightState",
    "FastWeights",
    "GateRule",
    "GateSettings",
    "GateState",
    "ModelSignal",
    "Predictions",
    "UpdateRule",
    "commit",
    "fast_weight_projection",
    "init_cache",
    "init_state",
    "make_layout",
    "make_targets",
    "measured_tokens",
    "mix_neighbours",
    "project",
    "read",
    "remember",
]
