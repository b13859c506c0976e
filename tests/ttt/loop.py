"""The method once more: one token after the other, in float64 numpy, written from ``docs/method.md`` alone.

Shares no code with the package, so an error in the masks, the scan or the gradient rules cannot hide in both.

Letters: B row, T tokens, C tokens per chunk, D model width, F feed-forward width, W conv taps.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from intttrain.ttt import UpdateRule
from tests.ttt.other_rules import DeltaRule


@dataclasses.dataclass
class Carried:
    """What a row carries: what its document has written, and which document that is."""

    s_DF: np.ndarray
    document: int


def targets(x_BTD, w_target_DD, conv_WD, segments_BT, chunk_tokens):
    """v_t = (sum over offsets of conv[offset] x_{t + offset}) W_target; ``conv_WD=None``: x_{t+1} W_target."""
    u_BTD = np.zeros_like(x_BTD)
    rows, seq_len = segments_BT.shape
    offsets = {1: None} if conv_WD is None else {offset: conv_WD[offset + 2] for offset in (-2, -1, 0, 1, 2)}
    for b in range(rows):
        for t in range(seq_len):
            for offset, tap_D in offsets.items():
                s = t + offset
                inside = 0 <= s < seq_len and s // chunk_tokens == t // chunk_tokens
                if inside and segments_BT[b, s] == segments_BT[b, t]:
                    u_BTD[b, t] += x_BTD[b, s] if tap_D is None else tap_D * x_BTD[b, s]
    return u_BTD @ w_target_DD


def written(tokens, update: UpdateRule):
    """The sum of outer products of (v, z) pairs, or what the delta rule of ``other_rules`` makes of them."""
    sum_DF = np.zeros((len(tokens[0][0]), len(tokens[0][1])))
    for v_D, z_F in tokens:
        error_D = v_D - update.beta * sum_DF @ z_F if isinstance(update, DeltaRule) else v_D
        sum_DF += np.outer(error_D, z_F)
    return sum_DF


def bounded(update_DF, update: UpdateRule):
    if update.clip is not None:
        update_DF = update_DF * min(1.0, update.clip / max(np.linalg.norm(update_DF), 1e-300))
    if update.spectral is not None:
        largest = np.linalg.svd(update_DF, compute_uv=False)[0]
        update_DF = update_DF * min(1.0, update.spectral / max(largest, 1e-300))
    return update_DF


def read(w_DF, s_DF, update: UpdateRule):
    """The weight that a token sees."""
    moved_DF = w_DF + s_DF
    if update.preserve_row_norm:
        moved_DF *= (np.linalg.norm(w_DF, axis=1) / np.linalg.norm(moved_DF, axis=1))[:, None]
    return moved_DF


def project_row(z_TF, v_TD, w_DF, segments_T, chunk_tokens, eta, gates_M, carried: Carried, update: UpdateRule):
    """Returns o_TD and what the row carries at its end."""
    nothing_DF = np.zeros(w_DF.shape)
    states = {carried.document: carried.s_DF}
    pending: dict[int, list] = {}
    o_TD = np.zeros((len(segments_T), w_DF.shape[0]))
    for t, document in enumerate(segments_T):
        o_TD[t] = read(w_DF, states.get(document, nothing_DF), update) @ z_TF[t]
        if document > 0:
            pending.setdefault(document, []).append((v_TD[t], z_TF[t]))
        if (t + 1) % chunk_tokens == 0:
            states = {name: update.retention * s_DF for name, s_DF in states.items()}
            for name, tokens in pending.items():
                update_DF = gates_M[t // chunk_tokens] * bounded(eta * written(tokens, update), update)
                states[name] = states.get(name, nothing_DF) + update_DF
            pending = {}
    last = int(segments_T[-1])
    return o_TD, Carried(states.get(last, nothing_DF), last)


def project(z_BTF, v_BTD, w_DF, segments_BT, chunk_tokens, eta, gates_BM, s_in_BDF, document_B, update):
    """Returns o_BTD and the carried sums s_BDF of all rows."""
    rows = [
        project_row(z, v, w_DF, segments, chunk_tokens, eta, gates, Carried(s, int(document)), update)
        for z, v, segments, gates, s, document in zip(
            z_BTF, v_BTD, segments_BT, gates_BM, s_in_BDF, document_B, strict=True
        )
    ]
    return np.stack([o_TD for o_TD, _ in rows]), np.stack([end.s_DF for _, end in rows])
