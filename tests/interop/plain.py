"""The whole model as numpy loops in double precision, written from the definition and from nothing else.

One row at a time, no batch, no padding. Dims: T tokens, C tokens per chunk, D width, F feed-forward width,
N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from intttrain.config import ModelConfig, TTTConfig


def logits(model: ModelConfig, params: dict[str, Any], tokens_T: np.ndarray, *, update: bool = True) -> np.ndarray:
    """Returns T x V logits of one row (no RoPE scaling)."""
    embed_VD = params["embed"]["weight"].astype(np.float64)
    x0_TD = embed_VD[tokens_T]
    x_TD = x0_TD
    for layer in range(model.num_layers):
        weights = {
            f"{part}.{name}": np.asarray(leaf[layer], np.float64)
            for part, content in params["layers"].items()
            for name, leaf in content.items()
        }
        x_TD = x_TD + attention(model, weights, norm(x_TD, weights["attention_norm.scale"], model.norm_eps))
        h_TD = norm(x_TD, weights["mlp_norm.scale"], model.norm_eps)
        gate_TF = h_TD @ weights["mlp.gate"]
        z_TF = gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ weights["mlp.up"])
        if model.ttt is None or layer not in model.ttt.layers or not update:
            x_TD = x_TD + z_TF @ weights["mlp.down"].T
        else:
            source_TD = x0_TD if model.ttt.target == "input_embed" else h_TD
            mine = {k: np.asarray(v[model.ttt.layers.index(layer)], np.float64) for k, v in params["ttt"].items()}
            x_TD = x_TD + fast_weight(model.ttt, mine, weights["mlp.down"], z_TF, source_TD)
    head_VD = embed_VD if model.tie_embeddings else params["head"]["weight"].astype(np.float64)
    return norm(x_TD, params["final_norm"]["scale"].astype(np.float64), model.norm_eps) @ head_VD.T


def fast_weight(
    ttt: TTTConfig, mine: dict[str, np.ndarray], w0_DF: np.ndarray, z_TF: np.ndarray, x_TD: np.ndarray
) -> np.ndarray:
    o_TD = np.zeros((len(z_TF), w0_DF.shape[0]))
    s_DF = np.zeros_like(w0_DF)
    for start in range(0, len(z_TF), ttt.chunk_tokens):
        chunk = range(start, min(start + ttt.chunk_tokens, len(z_TF)))
        w_DF = w0_DF + s_DF
        if ttt.preserve_row_norm:
            w_DF = w_DF * (np.linalg.norm(w0_DF, axis=1) / np.linalg.norm(w_DF, axis=1))[:, None]
        for t in chunk:
            o_TD[t] = w_DF @ z_TF[t]
        if len(chunk) < ttt.chunk_tokens:
            break
        delta_DF = np.zeros_like(w0_DF)
        for t in chunk:
            u_D = np.zeros(x_TD.shape[1])
            if ttt.target == "next_hidden":
                u_D = x_TD[t + 1] if t + 1 in chunk else u_D
            else:
                for tap in range(5):
                    if t + tap - 2 in chunk:
                        u_D = u_D + mine["conv"][tap] * x_TD[t + tap - 2]
            delta_DF += ttt.eta * np.outer(u_D @ mine["target"], z_TF[t])
        if ttt.delta_clip is not None:
            delta_DF *= min(1.0, ttt.delta_clip / np.linalg.norm(delta_DF))
        if ttt.delta_spectral is not None:
            delta_DF *= min(1.0, ttt.delta_spectral / np.linalg.norm(delta_DF, ord=2))
        s_DF = s_DF + delta_DF
    return o_TD


def attention(model: ModelConfig, weights: dict[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
    q_TNH = np.einsum("td,dnh->tnh", x_TD, weights["attention.q"])
    k_TKH = np.einsum("td,dkh->tkh", x_TD, weights["attention.k"])
    v_TKH = np.einsum("td,dkh->tkh", x_TD, weights["attention.v"])
    if model.family == "qwen3":
        q_TNH = norm(q_TNH, weights["attention.q_norm"], model.norm_eps)
        k_TKH = norm(k_TKH, weights["attention.k_norm"], model.norm_eps)
    q_TNH, k_TKH = rotate(q_TNH, model.rope.theta), rotate(k_TKH, model.rope.theta)
    group = model.num_heads // model.num_kv_heads
    window = model.sliding_window or len(x_TD)
    o_TNH = np.zeros_like(q_TNH)
    for t in range(len(x_TD)):
        keys = slice(max(0, t - window + 1), t + 1)
        for n in range(model.num_heads):
            score = k_TKH[keys, n // group] @ q_TNH[t, n] / np.sqrt(model.head_dim)
            weight = np.exp(score - score.max())
            o_TNH[t, n] = weight / weight.sum() @ v_TKH[keys, n // group]
    return np.einsum("tnh,nhd->td", o_TNH, weights["attention.o"])


def rotate(x_TNH: np.ndarray, theta: float) -> np.ndarray:
    half = x_TNH.shape[-1] // 2
    angle_Th = np.arange(len(x_TNH))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle_Th)[:, None], np.sin(angle_Th)[:, None]
    low, high = x_TNH[..., :half], x_TNH[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale
