"""The Flax NNX decoder: the only home of flax. Qwen3 and Llama families with In-Place TTT layers."""

from intttrain.model.decode import DecodeState, decode_step, generate, init_decode_state
from intttrain.model.decoder import Decoder, DecoderOutput, TTTStats
from intttrain.model.flops import FLOP_RULE, kept_values, matmul_parameters, model_flops_per_token
from intttrain.model.functional import Params, abstract_params, bind, init_params, logical_axes
from intttrain.model.loss import token_nll

__all__ = [
    "FLOP_RULE",
    "DecodeState",
    "Decoder",
    "DecoderOutput",
    "Params",
    "TTTStats",
    "abstract_params",
    "bind",
    "decode_step",
    "generate",
    "init_decode_state",
    "init_params",
    "kept_values",
    "logical_axes",
    "matmul_parameters",
    "model_flops_per_token",
    "token_nll",
]
