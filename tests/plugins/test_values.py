"""A rule and a target of a user's own in the whole model: training, its gradient and decoding, against numpy loops."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from intttrain.config import ModelConfig
from intttrain.model import Reading, bind, read_documents
from tests.model import numpy_decoder
from tests.model.tiny import TINY, C, T, leaves, loss_and_gradients, random_params, rows, with_ttt
from tests.plugins.conftest import MODULE


def own_model(**changes: object) -> ModelConfig:
    extras = importlib.import_module(MODULE)
    return with_ttt(
        TINY, **{"target": "next_embed", "update": extras.ForgetsConfig(retained=0.6), "eta": 0.3} | changes
    )


def test_training_equals_the_loop_in_value_and_gradient() -> None:
    """A step along the whole gradient, since every parameter by itself is the business of tests/model."""
    model, batch = own_model(), rows((13, 19), (5, 9, -2, 16))
    loss, grads = loss_and_gradients(model, random_params(model), *batch)
    p = {name: leaf.astype(np.float64) for name, leaf in leaves(random_params(model)).items()}
    assert "ttt.conv" not in p
    wanted = numpy_decoder.loss(model, p, *batch, 0.3)
    assert abs(float(loss) - wanted) <= 1e-5 * wanted
    for changes in ({"target": "next_hidden"}, {"update": TINY.ttt.update}):  # type: ignore[union-attr]
        other = numpy_decoder.loss(own_model(**changes), p, *batch, 0.3)
        assert abs(other - wanted) > 1e-3 * wanted, "either of the two matters"
    direction = {name: leaf.astype(np.float64) for name, leaf in leaves(grads).items()}
    length = np.sqrt(sum(np.sum(leaf**2) for leaf in direction.values()))
    ahead, behind = (
        numpy_decoder.loss(
            model, {name: p[name] + sign * 1e-6 / length * leaf for name, leaf in direction.items()}, *batch, 0.3
        )
        for sign in (1, -1)
    )
    assert abs((ahead - behind) / 2e-6 - length) <= 1e-4 * length


def test_decoding_equals_the_loop() -> None:
    """Chunk after chunk, with a document that ends within one."""
    model, lengths = own_model(), (T, T - 3)
    tokens_BT, ids_BT, positions_BT, _ = rows((T,), (T - 3, -3))
    reading = Reading(C, T, wants_nll=True)

    @jax.jit
    def nll_BT(params: object) -> jax.Array | None:
        numbers = jnp.arange(len(lengths))
        read, _ = read_documents(
            bind(model, params), reading, jnp.asarray(tokens_BT), jnp.asarray(lengths), numbers, eta=jnp.float32(0.3)
        )
        return read.nll_BP

    got_BT = np.asarray(nll_BT(random_params(model)))
    p = {name: leaf.astype(np.float64) for name, leaf in leaves(random_params(model)).items()}
    for row, length in enumerate(lengths):
        hidden_TD = numpy_decoder.hidden(model, p, tokens_BT[row], ids_BT[row], positions_BT[row], 0.3)
        wanted_T = numpy_decoder.nll(model, p, hidden_TD[: length - 1], tokens_BT[row, 1:length])
        np.testing.assert_allclose(got_BT[row, 1:length], wanted_T, rtol=1e-4, atol=1e-4)


def test_nothing_is_made_of_a_bound_that_is_not_there() -> None:
    """The bounds of the configuration reach the rule of a user's."""
    model = own_model(delta_clip=0.25, preserve_row_norm=True)
    assert dataclasses.asdict(numpy_decoder.ttt.update_rule(model.ttt)) == {  # type: ignore[arg-type]
        "clip": 0.25, "spectral": None, "preserve_row_norm": True, "retained": 0.6,
    }  # fmt: skip
