"""The Flax NNX decoder: the only home of flax. Qwen3 and Llama families with In-Place TTT layers."""

from intttrain.model.decode import (
    DecodeState,
    Read,
    Reading,
    init_decode_state,
    next_logits,
    piece_counts,
    piece_tokens,
    read_documents,
    read_tokens,
    restart_rows,
)
from intttrain.model.decoder import Decoder, DecoderOutput, TTTStats
from intttrain.model.flops import FLOP_RULE, kept_values, matmul_parameters, model_flops_per_token
from intttrain.model.functional import Params, abstract_params, bind, init_params, logical_axes
from intttrain.model.generation import Generator, Piece, Request
from intttrain.model.loss import token_nll
from intttrain.model.sampling import Sampling, sample_tokens

__all__ = [
    "FLOP_RULE",
    "DecodeState",
    "Decoder",
    "DecoderOutput",
    "Generator",
    "Params",
    "Piece",
    "Read",
    "Reading",
    "Request",
    "Sampling",
    "TTTStats",
    "abstract_params",
    "bind",
    "init_decode_state",
    "init_params",
    "kept_values",
    "logical_axes",
    "matmul_parameters",
    "model_flops_per_token",
    "next_logits",
    "piece_counts",
    "piece_tokens",
    "read_documents",
    "read_tokens",
    "restart_rows",
    "sample_tokens",
    "token_nll",
]
