"""The FLOP rule and what remat keeps, against numbers written out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from intttrain.config import RopeConfig
from intttrain.model import abstract_params, kept_values, matmul_parameters, model_flops_per_token
from intttrain.model.flops import attended_tokens
from tests.model.tiny import TINY

QWEN3_4B = dataclasses.replace(
    TINY, vocab_size=151936, d_model=2560, d_ff=9728, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128,
    rope=RopeConfig(theta=1e6), ttt=None, sliding_window=None, tie_embeddings=True, remat="qkv",
)  # fmt: skip


def test_model_flops_of_qwen3_4b():
    """36 layers of 26.2 M (attention) + 74.7 M (MLP), a head of 389 M that is also the embedding."""
    weights = 36 * (2560 * 128 * (2 * 32 + 2 * 8) + 3 * 2560 * 9728) + 151936 * 2560
    assert matmul_parameters(QWEN3_4B) == weights
    assert model_flops_per_token(QWEN3_4B, 8192) == pytest.approx(6 * weights + 6 * 36 * 32 * 128 * 8193)


def test_ttt_and_an_embedding_of_its_own_do_not_count():
    dense = dataclasses.replace(TINY, ttt=None)
    assert matmul_parameters(TINY) == matmul_parameters(dense)
    untied = dataclasses.replace(dense, tie_embeddings=False)
    assert matmul_parameters(untied) == matmul_parameters(dataclasses.replace(dense, tie_embeddings=True))
    assert "head" in abstract_params(untied)


@pytest.mark.parametrize(("window", "seq_len"), [(None, 7), (3, 7), (9, 7), (1, 7)])
def test_attended_tokens_are_counted(window, seq_len):
    counted = sum(min(t + 1, window or seq_len) for t in range(seq_len)) / seq_len
    assert attended_tokens(dataclasses.replace(TINY, sliding_window=window), seq_len) == pytest.approx(counted)


def test_kept_values_by_policy():
    def kept(policy, tensor=1):
        return kept_values(dataclasses.replace(QWEN3_4B, remat=policy), tensor)

    assert kept("full") == 2560
    assert kept("attention") == kept("offload") == 2560 + 4096
    assert kept("qkv") == 2560 + 4096 + 6144 + 2560
    assert kept("dots") == kept("qkv") + 2 * 9728
    assert kept("qkv", tensor=4) == 2560 + 1024 + 1536 + 2560
    assert kept("none") is None
