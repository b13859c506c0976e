"""The decoder against loops in numpy, its dense special case, and packed rows through the whole model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.model import bind
from tests.model import numpy_decoder
from tests.model.tiny import (
    TINY,
    TTT,
    C,
    T,
    V,
    hidden,
    init,
    leaves,
    loss_and_gradients,
    random_params,
    rows,
    run,
    with_ttt,
)
from tests.ttt.cases import assert_close, assert_same

BATCH = rows((13, 19), (5, 9, -2, 16))
TWELVE = dataclasses.replace(TINY, num_layers=12)


def layer_set(*layers):
    """Twelve layers with fast weights in the given ones; small updates, or twelve of them explode."""
    ttt = dataclasses.replace(TTT, layers=layers, eta=0.05) if layers else None
    return dataclasses.replace(TWELVE, ttt=ttt)


CONFIGS = {
    "qwen3": TINY,
    "llama": dataclasses.replace(TINY, family="llama", tie_embeddings=False, sliding_window=5, attention="banded"),
    "hidden_states": with_ttt(dataclasses.replace(TINY, num_kv_heads=1), target="hidden_states", eta=0.1),
    "next_hidden": with_ttt(dataclasses.replace(TINY, sliding_window=9), target="next_hidden", eta=0.1),
    "clip_row_norm": with_ttt(TINY, delta_clip=4.0, preserve_row_norm=True),
    "L12_none": layer_set(),
    "L12_all": layer_set(*range(12)),
    "L12_irregular": layer_set(0, 3, 4, 11),
    "L12_every_sixth": layer_set(0, 6),
}


def doubles(config):
    return {name: leaf.astype(np.float64) for name, leaf in leaves(random_params(config)).items()}


def eta_of(config):
    return config.ttt.eta if config.ttt else 0.0


def slope(config, p, batch, directions):
    """Returns the central difference of the numpy loss along ``directions``, a dict of some parameters."""
    step = 1e-6
    ahead, behind = (
        numpy_decoder.loss(
            config, p | {name: p[name] + sign * step * d for name, d in directions.items()}, *batch, eta_of(config)
        )
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_equal_the_numpy_decoder(name):
    """The loss to fp32 rounding, the gradient of every parameter along a random direction by central differences.

    A misplaced layer of a stack, a parameter read by the wrong layer or a lost gradient path shows here. Deep models
    take one step along all parameters at once, each scaled to weigh the same.
    """
    config = CONFIGS[name]
    deep = config.num_layers > 2
    batch = [x[1:] for x in BATCH] if deep else BATCH
    loss, grads = loss_and_gradients(config, random_params(config), *batch)
    p, grads = doubles(config), {name: leaf.astype(np.float64) for name, leaf in leaves(grads).items()}
    wanted = numpy_decoder.loss(config, p, *batch, eta_of(config))
    assert abs(float(loss) - wanted) <= 1e-5 * wanted
    if config.ttt is not None and config.ttt.preserve_row_norm:
        return  # its scales are constants for differentiation
    rng = np.random.default_rng(0)
    directions = {}
    for leaf, gradient in grads.items():
        direction = rng.standard_normal(gradient.shape)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert scale > 1e-4, f"{leaf} has no gradient"
        directions[leaf] = direction / scale
    for group in [list(directions)] if deep else [[leaf] for leaf in directions]:
        along = {leaf: directions[leaf] for leaf in group}
        got = sum(np.sum(grads[leaf] * d) for leaf, d in along.items())
        assert abs(got - slope(config, p, batch, along)) <= 2e-4, group


@pytest.mark.parametrize(
    ("family", "target"),
    [("qwen3", "input_embed"), ("qwen3", "hidden_states"), ("qwen3", "next_hidden"), ("llama", "input_embed")],
)
def test_a_fresh_model_equals_its_dense_twin_bit_for_bit(family, target):
    """Same seed, same numbers in the shared parameters, and nothing is written yet."""
    config = with_ttt(dataclasses.replace(TINY, family=family, num_layers=4), target=target, layers=(1, 3))
    dense = dataclasses.replace(config, ttt=None)
    params, twin = init(config, jax.random.key(7)), init(dense, jax.random.key(7))
    shared = leaves(twin)
    for name, leaf in leaves(params).items():
        if not name.startswith("ttt."):
            assert_same(leaf, shared.pop(name), name)
    assert not shared
    assert_same(hidden(config, params, BATCH), hidden(dense, twin, BATCH))


@pytest.mark.parametrize("name", ["qwen3", "llama", "next_hidden", "clip_row_norm"])
def test_eta_zero_equals_dense_bit_for_bit(name):
    config = CONFIGS[name]
    params = random_params(config)
    dense = dataclasses.replace(config, ttt=None)
    dense_params = {key: value for key, value in params.items() if key != "ttt"}
    off, plain = hidden(config, params, BATCH, eta=0.0), hidden(dense, dense_params, BATCH)
    assert_same(off, plain)
    on = hidden(config, params, BATCH)
    assert np.max(np.abs(on - plain)) > 1e-2


def test_eta_is_the_configured_one_unless_given():
    params = random_params(TINY)
    batch = BATCH[:3]
    configured = bind(TINY, params)(*(jnp.asarray(x) for x in batch)).hidden_BTD
    assert_close(configured, hidden(TINY, params, BATCH, eta=TTT.eta), 1e-6)


PACKED = ["qwen3", "hidden_states", "next_hidden", "llama"]


@pytest.mark.parametrize("name", PACKED)
def test_no_document_sees_another_through_the_whole_model(name):
    """Tokens outside a document change (padding too): its hidden states stay bit for bit."""
    config = CONFIGS[name]
    params = random_params(config)
    tokens_BT, ids_BT, positions_BT, _ = BATCH
    wanted = hidden(config, params, BATCH)
    for document in (1, 2, 3):
        kept_BT = ids_BT == document
        other_BT = np.where(kept_BT, tokens_BT, (tokens_BT + 7) % V).astype(np.int32)
        actual = hidden(config, params, (other_BT, ids_BT, positions_BT))
        assert_same(actual[kept_BT], wanted[kept_BT], f"document {document}")
        assert np.any(actual[~kept_BT] != wanted[~kept_BT])


@pytest.mark.parametrize("name", PACKED)
def test_an_aligned_document_equals_itself_alone(name):
    """Two documents that start on the chunk grid, each moved to the start of a row of its own.

    Attention sums run over other columns then, so this holds to fp32 rounding; ``ttt`` alone is exact.
    """
    config = CONFIGS[name]
    params = random_params(config)
    packed = rows((14, -2, 13, -3))
    wanted = hidden(config, params, packed)
    for start, length in ((0, 14), (16, 13)):
        alone = list(rows((length, length - T)))
        alone[0] = np.roll(packed[0], -start, axis=1)
        actual = hidden(config, params, alone)
        assert_close(actual[:, :length], wanted[:, start : start + length], 2e-5)


def test_unaligned_documents_do_depend_on_where_they_stand():
    """Why alignment is an option: the chunk grid belongs to the row."""
    params = random_params(TINY)
    packed = rows((5, 27))
    alone = list(rows((27, -5)))
    alone[0] = np.roll(packed[0], -5, axis=1)
    assert not np.allclose(hidden(TINY, params, alone)[:, :27], hidden(TINY, params, packed)[:, 5:], atol=1e-2)


def test_sizes_of_updates_are_reported_in_layer_order():
    """Layer 3 is made to write ten times as much as layer 1."""
    config = with_ttt(dataclasses.replace(TINY, num_layers=4), layers=(1, 3))
    params = jax.tree.map(lambda leaf: leaf, random_params(config))
    small = params["ttt"]["target"][0]
    params["ttt"] = params["ttt"] | {"target": jnp.stack([small, 10 * small])}
    stats = run(config, params, *BATCH[:3], jnp.float32(0.01)).ttt
    assert stats.delta_norm_nBM.shape == stats.state_norm_nBM.shape == (2, 2, T // C)
    assert np.mean(stats.delta_norm_nBM[1]) > 2 * np.mean(stats.delta_norm_nBM[0])


def test_a_dense_model_reports_no_sizes():
    dense = dataclasses.replace(TINY, ttt=None)
    assert run(dense, random_params(dense), *BATCH[:3], jnp.float32(0)).ttt is None


def test_bind_does_not_share_parameters_between_models():
    one, two = random_params(TINY, 1), random_params(TINY, 2)
    first, second = bind(TINY, one), bind(TINY, two)
    assert_same(first.layers.mlp.down[...], one["layers"]["mlp"]["down"])
    assert_same(second.layers.mlp.down[...], two["layers"]["mlp"]["down"])
