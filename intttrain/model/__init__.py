"""The Flax NNX decoder: the only home of flax. Qwen3 and Llama families with In-Place TTT layers."""

from intttrain.model.decoder import Decoder, DecoderOutput, TTTStats
from intttrain.model.functional import Params, abstract_params, bind, init_params, logical_axes
from intttrain.model.loss import token_nll

__all__ = [
    "Decoder",
    "DecoderOutput",
    "Params",
    "TTTStats",
    "abstract_params",
    "bind",
    "init_params",
    "logical_axes",
    "token_nll",
]
