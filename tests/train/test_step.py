"""One training step: what it computes, what it reports, and that nothing moves when a number is not finite."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from intttrain.config import Config, default_config, resolve
from intttrain.config.training import ScheduleConfig
from intttrain.data import Batch
from intttrain.model import bind
from intttrain.train import step as step_module
from intttrain.train.step import abstract_state, init_state, make_train_step, scalars

ROWS, T, V = 4, 32, 32
FP32 = 2e-6
# Compiled without optimisation: half the time, and both sides of every bit comparison run the same program.
FAST = {"xla_backend_optimization_level": 0}


def make_config() -> Config:
    tree = default_config()
    tree.model.update(
        vocab_size=V, d_model=8, d_ff=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
        compute_dtype="float32", remat="none", loss_chunk_tokens=16,
    )  # fmt: skip
    tree.model.ttt.update(layers=(1,), chunk_tokens=8, eta=0.5)
    tree.data.seq_len = tree.eval.seq_len = T
    tree.eval.position_edges, tree.eval.min_document_tokens = (16, T), T
    tree.train.update(batch_rows=ROWS, num_steps=100)
    tree.train.schedule.update(peak_learning_rate=1e-2, warmup_steps=3)
    return resolve(tree)


BASE = make_config()


def with_train(config: Config = BASE, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def with_ttt(**changes: Any) -> Config:
    ttt = dataclasses.replace(BASE.model.ttt, **changes)
    return dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, ttt=ttt))


def make_batch(seed: int = 0) -> Batch:
    """Rows with 31, 17, 5 and 0 labels: a mean over rows or microbatches is not the mean over tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (ROWS, T)).astype(np.int32)
    weights = np.zeros((ROWS, T), np.float32)
    for row, labels in enumerate((31, 17, 5, 0)):
        weights[row, :labels] = 1.0
    ids = np.ones((ROWS, T), np.int32)
    ids[1, 18:], ids[2, 6:], ids[3, :] = 2, 0, 0
    positions = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    positions[1, 18:] -= 18
    return Batch(tokens, np.roll(tokens, -1, axis=1), weights, ids, positions)


BATCH = make_batch()


@functools.cache
def compiled(config: Config) -> Any:
    return jax.jit(make_train_step(config), compiler_options=FAST)


@functools.cache
def start() -> Any:
    """A state whose fast weights write: fresh taps are zero."""
    state = jax.jit(lambda: init_state(BASE), compiler_options=FAST)()
    conv = jax.random.normal(jax.random.key(1), state["params"]["ttt"]["conv"].shape)
    target = state["params"]["ttt"]["target"] * 25
    params = state["params"] | {"ttt": {"conv": conv, "target": target}}
    return state | {"params": params}


def assert_same_tree(actual: Any, wanted: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def saved_part(state: Any) -> Any:
    return {name: state[name] for name in ("params", "opt_state", "step", "rng")}


def poisoned(state: Any, value: float) -> Any:
    embed = state["params"]["embed"]["weight"].at[3, 2].set(value)
    return state | {"params": state["params"] | {"embed": {"weight": embed}}}


def test_loss_is_the_mean_over_labelled_tokens():
    state = start()
    _, metrics = compiled(BASE)(state, BATCH)
    decoder = bind(BASE.model, state["params"])
    inputs = (BATCH.tokens_BT, BATCH.segment_ids_BT, BATCH.positions_BT)
    hidden = jax.jit(lambda *x: decoder(*x).hidden_BTD, compiler_options=FAST)(*inputs)
    logits = np.asarray(jnp.einsum("btd,vd->btv", hidden, decoder.output_weight()), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, BATCH.labels_BT[..., None], -1)[..., 0]
    labelled = BATCH.loss_weights_BT > 0
    assert float(metrics.tokens) == 53
    np.testing.assert_allclose(float(metrics.loss), nll[labelled].mean(), rtol=FP32)
    rows = [nll[row][labelled[row]].mean() if labelled[row].any() else 0.0 for row in range(ROWS)]
    np.testing.assert_allclose(metrics.row_loss_B, rows, rtol=1e-5)


def test_labels_without_weight_do_not_matter():
    other = dataclasses.replace(BATCH, labels_BT=np.where(BATCH.loss_weights_BT > 0, BATCH.labels_BT, 5))
    one, two = compiled(BASE)(start(), BATCH)[0], compiled(BASE)(start(), other)[0]
    assert_same_tree(two, one)


def test_microbatches_give_the_same_update():
    """With a different number of labels in each piece, down to none: sums are divided once, at the end."""
    state, metrics = compiled(BASE)(start(), BATCH)
    pieces_state, pieces = compiled(with_train(microbatches=4))(start(), BATCH)
    for name in ("loss", "grad_norm", "row_loss_B", "tokens", "learning_rate", "eta"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(metrics, name), rtol=1e-5, err_msg=name)
    assert metrics.ttt is not None
    for name in ("delta", "state"):
        np.testing.assert_allclose(pieces.ttt[name], metrics.ttt[name], rtol=1e-5, err_msg=name)
    # The first moment is a tenth of the gradient itself; parameters would hide scale errors behind Adam.
    moments, wanted = (s["opt_state"][0].mu for s in (pieces_state, state))
    for actual, expected in zip(jax.tree.leaves(moments), jax.tree.leaves(wanted), strict=True):
        scale = np.max(np.abs(expected))
        assert scale > 0
        np.testing.assert_allclose(actual, expected, atol=1e-5 * scale)


def test_random_gates_leave_chunks_out_and_differ_from_step_to_step():
    def written(metrics: Any) -> float:
        return float(metrics.ttt["delta"][0])

    shut = compiled(with_train(gate_rate=0.0))(start(), BATCH)[1]
    off = compiled(with_ttt(eta=0.0))(start(), BATCH)[1]
    np.testing.assert_allclose(shut.loss, off.loss, rtol=FP32)
    step = compiled(with_train(gate_rate=0.5))
    first, again = (step(start(), BATCH)[1] for _ in range(2))
    later = step(start() | {"step": jnp.int32(1)}, BATCH)[1]
    assert first.loss == again.loss
    everything = compiled(BASE)(start(), BATCH)[1]
    assert len({written(x) for x in (shut, first, later, everything)}) == 4
    assert written(shut) == 0 < min(written(first), written(later)) and written(first) < written(everything)
    pieces = compiled(with_train(gate_rate=0.5, microbatches=4))(start(), BATCH)[1]
    np.testing.assert_allclose(written(pieces), written(first), rtol=1e-5)


def test_a_step_moves_every_parameter_and_counts():
    before = start()
    after, metrics = compiled(BASE)(before, BATCH)
    assert bool(metrics.healthy)
    assert int(after["step"]) == 1
    assert int(compiled(BASE)(after, BATCH)[0]["step"]) == 2
    for one, two in zip(jax.tree.leaves(before["params"]), jax.tree.leaves(after["params"]), strict=True):
        assert np.any(one != two)
    np.testing.assert_array_equal(after["rng"], before["rng"])


def test_training_lowers_the_loss():
    state, losses = start(), []
    for _ in range(12):
        state, metrics = compiled(BASE)(state, BATCH)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_non_finite_parameter_changes_nothing_and_stays_noticed(value):
    warm, _ = compiled(BASE)(start(), BATCH)  # moments that are not zero
    bad = poisoned(warm, value)
    after, metrics = compiled(BASE)(bad, BATCH)
    assert not bool(metrics.healthy)
    assert not bool(after["healthy"])
    assert_same_tree(saved_part(after), saved_part(bad))
    # The cause goes away, the flag does not: a later good batch must not move a state that is to be inspected.
    repaired = after | {"params": warm["params"]}
    later, metrics = compiled(BASE)(repaired, make_batch(1))
    assert np.isfinite(float(metrics.loss))
    assert not bool(metrics.healthy)
    assert not bool(later["healthy"])
    assert_same_tree(saved_part(later), saved_part(repaired))


def test_a_loss_that_is_finite_with_a_gradient_that_is_not_changes_nothing(monkeypatch):
    """sqrt at zero: value 0, slope infinite."""
    loss_sums = step_module._loss_sums

    def faulty(config, params, batch, eta):
        total, sums = loss_sums(config, params, batch, eta)
        return total + jnp.sqrt(jnp.sum(jnp.square(params["final_norm"]["scale"] * 0.0))), sums

    monkeypatch.setattr(step_module, "_loss_sums", faulty)
    after, metrics = jax.jit(make_train_step(BASE), compiler_options=FAST)(start(), BATCH)
    assert np.isfinite(float(metrics.loss))
    assert not np.isfinite(float(metrics.grad_norm))
    assert not bool(metrics.healthy)
    assert_same_tree(saved_part(after), saved_part(start()))


LARGEST = float(np.finfo(np.float32).max)
SPOILED = {
    "nan": np.nan,
    "infinite": np.inf,
    "too large": LARGEST,
}  # what step 1, 2, 3 adds to one number of its update
UNTIED = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, tie_embeddings=False))
SPIKES = with_train(UNTIED, skip=dataclasses.replace(BASE.train.skip, spike_deviations=3.0))


@functools.cache
def spoiled_step(config: Config) -> Any:
    """A step whose optimizer fails as its count says: in one number of the update, or (4) in its second moments."""
    make_optimizer = step_module.make_optimizer

    def make_spoiled(*args):
        optimizer = make_optimizer(*args)

        def update(*given):
            updates, (adam, *rest) = optimizer.update(*given)
            extra = jnp.asarray([0.0, *SPOILED.values(), 0.0, 0.0], jnp.float32)[adam.count]
            embed = updates["embed"]["weight"].at[5, 3].add(extra)
            nu = jax.tree.map(lambda nu: jnp.where(adam.count == 4, jnp.inf, nu), adam.nu)
            return updates | {"embed": {"weight": embed}}, (adam._replace(nu=nu), *rest)

        return optax.GradientTransformation(optimizer.init, update)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(step_module, "make_optimizer", make_spoiled)
        return jax.jit(make_train_step(config), compiler_options=FAST)


@pytest.mark.parametrize("config", [UNTIED, with_train(SPIKES, microbatches=2)], ids=["plain", "spikes, microbatches"])
@pytest.mark.parametrize(
    ("count", "broken"),
    [(1, ("update", "parameters")), (2, ("update", "parameters")), (3, ("parameters",)), (4, ("optimizer state",))],
    ids=[*SPOILED, "moments"],
)
def test_an_outcome_that_is_not_finite_is_not_applied(config, count, broken):
    """Loss and gradient are those of a healthy step: no text of the batch has token 5."""
    batch = dataclasses.replace(BATCH, tokens_BT=np.where(BATCH.tokens_BT == 5, 4, BATCH.tokens_BT))
    before = fresh(config)
    embed = before["params"]["embed"]["weight"].at[5, 3].set(LARGEST if count == 3 else 1.0)
    adam, *rest = before["opt_state"]
    before = before | {
        "params": before["params"] | {"embed": {"weight": embed}},
        "opt_state": (adam._replace(count=jnp.int32(count - 1)), *rest),
    }
    after, metrics = spoiled_step(config)(before, batch)
    assert np.isfinite(float(metrics.loss)) and np.isfinite(float(metrics.grad_norm))
    assert metrics.finite.broken == broken
    assert not bool(metrics.healthy) and not bool(after["healthy"])
    assert_same_tree({**after, "healthy": before["healthy"]}, before)


@functools.cache
def fresh(config: Config) -> Any:
    return jax.jit(lambda: init_state(config), compiler_options=FAST)()


def test_a_loss_whose_statistics_would_overflow_is_not_applied(monkeypatch):
    """Squared it is infinite, and a variance of infinity would let every later spike pass."""
    loss_sums = step_module._loss_sums

    def far_away(config, params, batch, eta):
        total, sums = loss_sums(config, params, batch, eta)
        return total, dataclasses.replace(sums, nll_B=sums.nll_B + 1e25)

    monkeypatch.setattr(step_module, "_loss_sums", far_away)
    before = fresh(SPIKES)
    after, metrics = jax.jit(make_train_step(SPIKES), compiler_options=FAST)(before, BATCH)
    assert np.isfinite(float(metrics.loss)) and metrics.loss_limit == np.inf
    assert metrics.finite.broken == ("loss statistics",)
    assert_same_tree({**after, "healthy": before["healthy"]}, before)


def test_every_part_of_a_healthy_outcome_is_finite():
    finite = compiled(BASE)(start(), BATCH)[1].finite
    assert finite.broken == () and finite.loss_statistics is None


def test_a_batch_without_labels_is_harmless():
    empty = dataclasses.replace(BATCH, loss_weights_BT=np.zeros_like(BATCH.loss_weights_BT))
    after, metrics = compiled(BASE)(start(), empty)
    assert float(metrics.loss) == float(metrics.grad_norm) == float(metrics.tokens) == 0.0
    assert bool(after["healthy"])


def test_eta_warms_up_linearly_and_reaches_the_model():
    step = compiled(with_ttt(eta_warmup_steps=4))
    state, sizes = start(), []
    for at in range(6):
        _, metrics = step(state | {"step": jnp.asarray(at, jnp.int32)}, BATCH)
        np.testing.assert_allclose(float(metrics.eta), 0.5 * min((at + 1) / 4, 1.0), rtol=1e-6)
        sizes.append(float(metrics.ttt["delta"][0]))
    np.testing.assert_allclose(np.array(sizes) / sizes[-1], [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-5)
    full = compiled(BASE)(state, BATCH)[1]
    np.testing.assert_allclose(float(full.eta), 0.5)


def test_learning_rate_follows_the_step():
    rates = [
        float(compiled(BASE)(start() | {"step": jnp.asarray(at, jnp.int32)}, BATCH)[1].learning_rate) for at in range(5)
    ]
    np.testing.assert_allclose(rates[:4], 1e-2 * np.array([0.25, 0.5, 0.75, 1.0]), rtol=1e-6)
    assert rates[4] < rates[3]
    assert isinstance(BASE.train.schedule, ScheduleConfig)


def test_clipping_bounds_the_gradient_but_not_what_is_reported():
    tight = with_train(optimizer=dataclasses.replace(BASE.train.optimizer, clip_norm=1e-3))
    (clipped, reported), (whole, wanted) = compiled(tight)(start(), BATCH), compiled(BASE)(start(), BATCH)
    assert 1e-3 < float(wanted.grad_norm) < BASE.train.optimizer.clip_norm
    np.testing.assert_allclose(float(reported.grad_norm), float(wanted.grad_norm), rtol=1e-6)
    ratio = 1e-3 / float(wanted.grad_norm)
    for one, two in zip(
        jax.tree.leaves(clipped["opt_state"][0].mu), jax.tree.leaves(whole["opt_state"][0].mu), strict=True
    ):
        np.testing.assert_allclose(one, ratio * np.asarray(two), rtol=1e-4, atol=1e-9)


def test_dense_model_steps_and_reports_no_sizes():
    dense = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, ttt=None))
    state = jax.jit(lambda: init_state(dense), compiler_options=FAST)()
    after, metrics = compiled(dense)(state, BATCH)
    assert metrics.ttt is None
    assert float(metrics.eta) == 0.0
    assert int(after["step"]) == 1
    assert set(scalars(dense, metrics)) == {"loss", "grad_norm", "learning_rate", "tokens"}


def test_scalars_name_the_layers():
    _, metrics = compiled(BASE)(start(), BATCH)
    found = scalars(BASE, metrics)
    assert set(found) >= {"loss", "grad_norm", "learning_rate", "tokens", "ttt/eta", "ttt/delta_1", "ttt/state_1"}
    assert all(isinstance(value, float) for value in found.values())


def test_abstract_state_is_the_state():
    def described(state):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)

    assert described(abstract_state(BASE)) == described(start())


def test_seed_decides_the_start():
    config = with_train(seed=1)
    other = jax.jit(lambda: init_state(config), compiler_options=FAST)()
    assert np.any(other["params"]["layers"]["mlp"]["up"] != start()["params"]["layers"]["mlp"]["up"])
    assert np.any(other["rng"] != start()["rng"])


def test_golden_step(golden):
    """Loss and gradient norm of one step from seed 0, to five digits."""
    _, metrics = compiled(BASE)(start(), BATCH)
    assert metrics.ttt is not None
    values = {
        "loss": float(metrics.loss),
        "grad_norm": float(metrics.grad_norm),
        "delta": float(metrics.ttt["delta"][0]),
        "state": float(metrics.ttt["state"][0]),
    }
    golden.check("train/step.json", {name: f"{value:.5g}" for name, value in values.items()})


def test_limit_of_the_loss_follows_its_mean_and_deviation():
    """Plain ones over the first losses, then exponential ones; no limit before there are enough."""
    values = np.random.default_rng(0).normal(3.0, 0.5, 400)
    losses = step_module.LossStatistics(*(jnp.zeros(()) for _ in range(3)))
    with_loss, limit = jax.jit(step_module._with_loss), jax.jit(step_module._loss_limit, static_argnums=1)
    for number, value in enumerate(values, start=1):
        losses = with_loss(losses, value)
        if number == step_module.SPIKE_WINDOW - 1:
            assert limit(losses, 2.0) == np.inf
        if number == step_module.SPIKE_WINDOW:
            np.testing.assert_allclose(losses.mean, values[:number].mean(), rtol=1e-5)
            np.testing.assert_allclose(losses.variance, values[:number].var(), rtol=1e-4)
    weights = (1 - 1 / step_module.SPIKE_WINDOW) ** np.arange(400)[::-1]
    mean = np.average(values, weights=weights)
    deviation = np.sqrt(np.average((values - mean) ** 2, weights=weights))
    np.testing.assert_allclose(limit(losses, 2.0), mean + 2.0 * deviation, rtol=0.02)
