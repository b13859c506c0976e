"""The whole model as loops in float64 numpy: no scan, no stacking, no masks broadcast over heads.

Letters: T tokens, D model width, F feed-forward width, H head dim, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from intttrain import ttt
from tests.ttt import loop


def norm(x_TD, scale_D, eps):
    return x_TD / np.sqrt(np.mean(x_TD**2, axis=-1, keepdims=True) + eps) * scale_D


def rotate(x_TH, positions_T, theta):
    half = x_TH.shape[1] // 2
    angle_Th = positions_T[:, None] * theta ** (-np.arange(half) / half)
    low, high = x_TH[:, :half], x_TH[:, half:]
    turned = [low * np.cos(angle_Th) - high * np.sin(angle_Th), high * np.cos(angle_Th) + low * np.sin(angle_Th)]
    return np.concatenate(turned, axis=1)


def attend_head(q_TH, k_TH, v_TH, segments_T, window):
    """One query head, one query at a time."""
    o_TH = np.zeros_like(v_TH)
    for t in range(len(q_TH)):
        seen = [s for s in range(t + 1) if segments_T[s] == segments_T[t] and (window is None or t - s < window)]
        scores = k_TH[seen] @ q_TH[t] / np.sqrt(q_TH.shape[1])
        weights = np.exp(scores - scores.max())
        o_TH[t] = (weights / weights.sum()) @ v_TH[seen]
    return o_TH


def attention(config, p, layer, h_TD, segments_T, positions_T):
    group = config.num_heads // config.num_kv_heads
    out_TD = np.zeros_like(h_TD)
    for head in range(config.num_heads):
        q = h_TD @ p["layers.attention.q"][layer, :, head]
        k = h_TD @ p["layers.attention.k"][layer, :, head // group]
        v = h_TD @ p["layers.attention.v"][layer, :, head // group]
        if config.family == "qwen3":
            q = norm(q, p["layers.attention.q_norm"][layer], config.norm_eps)
            k = norm(k, p["layers.attention.k_norm"][layer], config.norm_eps)
        q, k = rotate(q, positions_T, config.rope.theta), rotate(k, positions_T, config.rope.theta)
        out_TD += attend_head(q, k, v, segments_T, config.sliding_window) @ p["layers.attention.o"][layer, head]
    return out_TD


def mlp(config, p, layer, x0_TD, h_TD, segments_T, eta):
    gate_TF = h_TD @ p["layers.mlp.gate"][layer]
    z_TF = gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ p["layers.mlp.up"][layer])
    w_DF = p["layers.mlp.down"][layer]
    if config.ttt is None or layer not in config.ttt.layers:
        return z_TF @ w_DF.T
    at, chunk = config.ttt.layers.index(layer), config.ttt.chunk_tokens
    source_TD = x0_TD if config.ttt.target in ("input_embed", "next_embed") else h_TD
    conv_WD = None if config.ttt.target in ("next_hidden", "next_embed") else p["ttt.conv"][at]
    v_TD = loop.targets(source_TD[None], p["ttt.target"][at], conv_WD, segments_T[None], chunk)[0]
    update = ttt.update_rule(config.ttt)
    fresh = loop.Carried(np.zeros_like(w_DF), -1)
    gates_M = np.ones(len(h_TD) // chunk)
    return loop.project_row(z_TF, v_TD, w_DF, segments_T, chunk, eta, gates_M, fresh, update)[0]


def hidden(config, p, tokens_T, segments_T, positions_T, eta):
    """Returns the final hidden states of one row; ``p`` maps dotted names to float64 arrays."""
    x0_TD = p["embed.weight"][tokens_T]
    x_TD = x0_TD
    for layer in range(config.num_layers):
        h_TD = norm(x_TD, p["layers.attention_norm.scale"][layer], config.norm_eps)
        x_TD = x_TD + attention(config, p, layer, h_TD, segments_T, positions_T)
        h_TD = norm(x_TD, p["layers.mlp_norm.scale"][layer], config.norm_eps)
        x_TD = x_TD + mlp(config, p, layer, x0_TD, h_TD, segments_T, eta)
    return norm(x_TD, p["final_norm.scale"], config.norm_eps)


def nll(config, p, hidden_TD, labels_T):
    logits_TV = hidden_TD @ (p["embed.weight"] if config.tie_embeddings else p["head.weight"]).T
    top_T1 = logits_TV.max(axis=1, keepdims=True)
    total_T = top_T1[:, 0] + np.log(np.exp(logits_TV - top_T1).sum(axis=1))
    return total_T - logits_TV[np.arange(len(labels_T)), labels_T]


def loss(config, p, tokens_BT, segments_BT, positions_BT, labels_BT, eta):
    """Summed over the tokens of documents."""
    total = 0.0
    for tokens_T, segments_T, positions_T, labels_T in zip(
        tokens_BT, segments_BT, positions_BT, labels_BT, strict=True
    ):
        hidden_TD = hidden(config, p, tokens_T, segments_T, positions_T, eta)
        total += nll(config, p, hidden_TD, labels_T)[segments_T > 0].sum()
    return total
