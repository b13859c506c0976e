"""A TTT block in PyTorch, as one writes it first: every chunk's weight is a tensor of its own, autograd does the rest.

Written from ``docs/method.md`` alone, for one document per row; nothing of the package is used.

Letters: B row, T tokens, C tokens per chunk, M chunks, D model width, F feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def targets(x_BTD: Tensor, conv_WD: Tensor, target_DE: Tensor, chunk_tokens: int) -> Tensor:
    """Returns ``(sum_k conv[k] x_{t+k}) Wtarget``; the window stays inside the chunk."""
    rows, seq_len, width = x_BTD.shape
    x_NDC = x_BTD.reshape(-1, chunk_tokens, width).transpose(1, 2)
    taps = conv_WD.shape[0]
    u_NDC = torch.nn.functional.conv1d(x_NDC, conv_WD.T[:, None], padding=taps // 2, groups=width)
    return u_NDC.transpose(1, 2).reshape(rows, seq_len, width) @ target_DE


def block(weights: dict[str, Tensor], h_BTD: Tensor, chunk_tokens: int, eta: float) -> Tensor:
    """Returns the output of the MLP of a TTT layer."""
    rows, seq_len, width = h_BTD.shape
    chunks = seq_len // chunk_tokens
    z_BTF = torch.nn.functional.silu(h_BTD @ weights["gate"]) * (h_BTD @ weights["up"])
    v_BTD = targets(h_BTD, weights["conv"], weights["target"], chunk_tokens)
    z_BMCF = z_BTF.reshape(rows, chunks, chunk_tokens, -1)
    v_BMCD = v_BTD.reshape(rows, chunks, chunk_tokens, width)
    updates_BMDF = eta * torch.einsum("bmcd,bmcf->bmdf", v_BMCD, z_BMCF)
    before_BMDF = torch.cumsum(updates_BMDF, dim=1) - updates_BMDF
    weight_BMDF = weights["down"] + before_BMDF
    return torch.einsum("bmcf,bmdf->bmcd", z_BMCF, weight_BMDF).reshape(rows, seq_len, width)


def step(
    weights: dict[str, Tensor], h_BTD: Tensor, wanted_BTD: Tensor, chunk_tokens: int, eta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the mean squared error of the block and its gradient for every weight."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = torch.mean(torch.square(block(leaves, h_BTD, chunk_tokens, eta) - wanted_BTD))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))
