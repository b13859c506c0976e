"""The table of names: exactly the release's, in its orientation, both ways without a changed bit."""

from __future__ import annotations

import numpy as np
import pytest

from intttrain.config.dotted import flatten, unflatten
from intttrain.interop.names import leaf_shapes, list_tensors
from tests.interop.cases import make_model, make_params, make_ttt

# D 20, F 28, N 4, K 2, H 6, V 50; TTT in layers 0 and 2.
LAYER = {
    "input_layernorm.weight": (20,),
    "self_attn.q_proj.weight": (24, 20),
    "self_attn.k_proj.weight": (12, 20),
    "self_attn.v_proj.weight": (12, 20),
    "self_attn.o_proj.weight": (20, 24),
    "post_attention_layernorm.weight": (20,),
    "mlp.gate_proj.weight": (28, 20),
    "mlp.up_proj.weight": (28, 20),
    "mlp.down_proj.weight": (20, 28),
}
QWEN3 = {"self_attn.q_norm.weight": (6,), "self_attn.k_norm.weight": (6,)}
FAST = {"mlp.ttt_proj.weight": (20, 20), "mlp.ttt_conv.weight": (20, 1, 5)}


def expected(family: str, *, tied: bool, fast_layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    names = {"model.embed_tokens.weight": (50, 20), "model.norm.weight": (20,)}
    for layer in range(3):
        parts = LAYER | (QWEN3 if family == "qwen3" else {}) | (FAST if layer in fast_layers else {})
        names |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return names if tied else names | {"lm_head.weight": (50, 20)}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_names_and_shapes_are_the_releases(family, tied, dense):
    ttt = None if dense else make_ttt()
    tensors = list_tensors(make_model(family, ttt, tie_embeddings=tied))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    found = {tensor.name: tensor.shape for tensor in tensors}
    assert found == expected(family, tied=tied, fast_layers=() if dense else (0, 2))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ttt", [None, make_ttt(), make_ttt(target="next_hidden")], ids=["dense", "ttt", "next"])
def test_round_trip_keeps_every_bit(family, tied, ttt):
    model = make_model(family, ttt, tie_embeddings=tied)
    leaves = flatten(make_params(model))
    back = {path: np.full_like(leaf, np.nan) for path, leaf in leaves.items()}
    for tensor in list_tensors(model):
        exported = tensor.export(leaves[tensor.rule.path])
        assert exported.shape == tensor.shape and exported.flags.c_contiguous
        back[tensor.rule.path][... if tensor.index is None else tensor.index] = tensor.restore(exported)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)


def test_orientation_of_every_matrix():
    """One marked element per matrix has to arrive at the place that the formulas of the method give it."""
    model = make_model(tie_embeddings=False)
    tensors = {tensor.name: tensor for tensor in list_tensors(model)}
    shapes = leaf_shapes(model)

    def land(name: str, *ours: int) -> list[int]:
        tensor = tensors[name]
        leaf = np.zeros(shapes[tensor.rule.path], np.float32)
        leaf[ours] = 1
        return np.argwhere(tensor.export(leaf)).tolist()

    layer = "model.layers.2"  # the second TTT layer: our index 1 there, 2 elsewhere
    assert land(f"{layer}.self_attn.q_proj.weight", 2, 7, 2, 5) == [[2 * 6 + 5, 7]]  # D 7, N 2, H 5
    assert land(f"{layer}.self_attn.k_proj.weight", 2, 7, 1, 4) == [[1 * 6 + 4, 7]]
    assert land(f"{layer}.self_attn.v_proj.weight", 2, 7, 1, 4) == [[1 * 6 + 4, 7]]
    assert land(f"{layer}.self_attn.o_proj.weight", 2, 2, 5, 7) == [[7, 2 * 6 + 5]]  # N 2, H 5, D 7
    assert land(f"{layer}.mlp.gate_proj.weight", 2, 7, 21) == [[21, 7]]
    assert land(f"{layer}.mlp.up_proj.weight", 2, 7, 21) == [[21, 7]]
    assert land(f"{layer}.mlp.down_proj.weight", 2, 7, 21) == [[7, 21]]  # W0 is D x F on both sides
    assert land(f"{layer}.mlp.ttt_proj.weight", 1, 7, 11) == [[7, 11]]  # used as u @ weight: not transposed
    assert land(f"{layer}.mlp.ttt_conv.weight", 1, 4, 7) == [[7, 0, 4]]  # tap 4 (offset +2) of channel 7
    assert land("lm_head.weight", 31, 7) == [[31, 7]]
    assert land(f"{layer}.mlp.ttt_proj.weight", 0, 7, 11) == []  # the first TTT layer is layer 0


def test_flatten_and_nest_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
