"""One table: where each of our parameters lives in a Hugging Face checkpoint, and in which layout.

A layout is two lists of dimension letters, ours and theirs: ``"D N H" -> "(N H) D"`` reads as transpose, then
merge N and H into one axis. The same line drives both directions, the shapes and the error messages.

Letters: V vocabulary, D model width, F feed-forward width, N query heads, K key/value heads, H head dim,
W conv taps, 1 an axis of length one. Our stacked leading axis (decoder layers, or TTT layers) is left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal

import numpy as np

from intttrain import ttt
from intttrain.config import ModelConfig
from intttrain.config.registry import FAMILIES, TARGETS

Array = Any  # numpy or JAX
Stack = Literal["none", "layers", "ttt"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
      path: dotted path in our parameter tree.
      name: Hugging Face name; ``{}`` is the index of the decoder layer.
      ours: our dimensions, without the stacked axis.
      theirs: the same letters in their order; parentheses merge axes.
      stack: what our leading axis counts; ``ttt`` counts only the layers with a fast weight.
    """

    path: str
    name: str
    ours: str
    theirs: str
    stack: Stack = "layers"


_EMBED = Rule("embed.weight", "model.embed_tokens.weight", "V D", "V D", "none")
_HEAD = Rule("head.weight", "lm_head.weight", "V D", "V D", "none")
_FINAL_NORM = Rule("final_norm.scale", "model.norm.weight", "D", "D", "none")

_LAYER = (
    Rule("layers.attention_norm.scale", "model.layers.{}.input_layernorm.weight", "D", "D"),
    Rule("layers.attention.q", "model.layers.{}.self_attn.q_proj.weight", "D N H", "(N H) D"),
    Rule("layers.attention.k", "model.layers.{}.self_attn.k_proj.weight", "D K H", "(K H) D"),
    Rule("layers.attention.v", "model.layers.{}.self_attn.v_proj.weight", "D K H", "(K H) D"),
    Rule("layers.attention.o", "model.layers.{}.self_attn.o_proj.weight", "N H D", "D (N H)"),
    Rule("layers.mlp_norm.scale", "model.layers.{}.post_attention_layernorm.weight", "D", "D"),
    Rule("layers.mlp.gate", "model.layers.{}.mlp.gate_proj.weight", "D F", "F D"),
    Rule("layers.mlp.up", "model.layers.{}.mlp.up_proj.weight", "D F", "F D"),
    Rule("layers.mlp.down", "model.layers.{}.mlp.down_proj.weight", "D F", "D F"),
)

_QK_NORM = (
    Rule("layers.attention.q_norm", "model.layers.{}.self_attn.q_norm.weight", "H", "H"),
    Rule("layers.attention.k_norm", "model.layers.{}.self_attn.k_norm.weight", "H", "H"),
)

# ttt_proj is used as ``u @ weight``, so its orientation is ours, not that of a Linear.
_TTT_TARGET = Rule("ttt.target", "model.layers.{}.mlp.ttt_proj.weight", "D D", "D D", "ttt")
_TTT_CONV = Rule("ttt.conv", "model.layers.{}.mlp.ttt_conv.weight", "W D", "D 1 W", "ttt")

TTT_TENSOR = re.compile(r"\.mlp\.ttt_\w+(\.|$)")  # matches every name that only a TTT model has


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of a checkpoint and its place in our tree.

    Attributes:
      name: its full name.
      rule: the line of the table it comes from.
      index: position on our stacked axis, ``None`` where there is none.
      our_shape: shape of the slice, without the stacked axis.
      shape: its shape in the checkpoint.
    """

    name: str
    rule: Rule
    index: int | None
    our_shape: tuple[int, ...]
    shape: tuple[int, ...]

    def export(self, leaf: Array) -> np.ndarray:
        """Returns the checkpoint's tensor from our (stacked) leaf; reads only the one slice it needs."""
        ours = np.asarray(leaf if self.index is None else leaf[self.index])
        return np.ascontiguousarray(ours.transpose(_permutation(self.rule)).reshape(self.shape))

    def restore(self, tensor: np.ndarray) -> np.ndarray:
        """Returns our slice from the checkpoint's tensor (the inverse of ``export``)."""
        order = _permutation(self.rule)
        split = tensor.reshape([self.our_shape[axis] for axis in order])
        return split.transpose(np.argsort(order))


def list_tensors(model: ModelConfig) -> list[HFTensor]:
    """Returns every tensor of ``model`` in checkpoint order: embedding, layer by layer, final norm, head."""
    tensors = [_tensor(model, _EMBED, None, None)]
    ttt_layers = () if model.ttt is None else model.ttt.layers
    rules = _LAYER + (_QK_NORM if FAMILIES[model.family].qk_norm else ())
    for layer in range(model.num_layers):
        tensors += [_tensor(model, rule, layer, layer) for rule in rules]
        if layer in ttt_layers:
            tensors += [_tensor(model, rule, layer, ttt_layers.index(layer)) for rule in _ttt_rules(model)]
    tensors.append(_tensor(model, _FINAL_NORM, None, None))
    if not model.tie_embeddings:
        tensors.append(_tensor(model, _HEAD, None, None))
    return tensors


def leaf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every leaf of our tree, stacked axis included, by dotted path."""
    stacks: dict[Stack, tuple[int, ...]] = {
        "none": (),
        "layers": (model.num_layers,),
        "ttt": () if model.ttt is None else (len(model.ttt.layers),),
    }
    return {t.rule.path: stacks[t.rule.stack] + t.our_shape for t in list_tensors(model)}


def _ttt_rules(model: ModelConfig) -> tuple[Rule, ...]:
    if model.ttt is None:
        return ()
    return (_TTT_TARGET, _TTT_CONV) if TARGETS[model.ttt.target].convolution else (_TTT_TARGET,)


def _tensor(model: ModelConfig, rule: Rule, layer: int | None, index: int | None) -> HFTensor:
    sizes = {
        "V": model.vocab_size, "D": model.d_model, "F": model.d_ff, "N": model.num_heads, "K": model.num_kv_heads,
        "H": model.head_dim, "W": ttt.CONV_TAPS, "1": 1,
    }  # fmt: skip
    groups = re.findall(r"\(([^)]*)\)|(\S+)", rule.theirs)
    shape = tuple(math.prod(sizes[letter] for letter in (merged or single).split()) for merged, single in groups)
    our_shape = tuple(sizes[letter] for letter in rule.ours.split())
    return HFTensor(rule.name.format(layer), rule, index, our_shape, shape)


def _permutation(rule: Rule) -> list[int]:
    """Returns the order in which our axes stand in the checkpoint."""
    ours, theirs = rule.ours.split(), re.findall(r"[A-Z]", rule.theirs)
    if ours == theirs:  # also the square "D D", whose letters do not tell the axes apart
        return list(range(len(ours)))
    return [ours.index(letter) for letter in theirs]
