"""Rules alone, driven by signals that are made up here; with a model they are in tests/model/test_gates.py."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.config.registry import GATE_RULES, GATE_SIGNALS
from intttrain.ttt.gating import GateRule, GateSettings, decide, init_gate_state
from intttrain.ttt.signals import LayerChunk, measured_tokens

ROWS = 4
TAU = jnp.array([0.5, 0.25])  # of two layers


@functools.partial(jax.jit, static_argnums=0)
def drive(rule, settings, signal_MB, layer=0, sequence_B=None):
    """Decides about M chunks of every row; returns gates, margins and the states after each (M B)."""
    rows = signal_MB.shape[1]
    sequence_B = jnp.arange(rows) if sequence_B is None else sequence_B

    def step(state, inputs):
        signal_B, chunk = inputs
        decision, state = decide(
            rule, settings, state, signal_B, layer=layer, chunk_B=jnp.full((rows,), chunk), sequence_B=sequence_B
        )
        return state, (decision.gate, decision.margin, state)

    start = jax.tree.map(lambda x: x[0], init_gate_state(1, rows))
    return jax.lax.scan(step, start, (signal_MB, jnp.arange(signal_MB.shape[0])))[1]


def drifting(chunks=2000, seed=0):
    """Signals in [0, 1] whose level and spread change, as those of a long text do."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0, 1, chunks)[:, None]
    level, spread = 0.6 + 0.2 * np.sin(6 * at), 0.002 + 0.02 * at
    return jnp.asarray(level + spread * rng.standard_normal((chunks, ROWS)), jnp.float32)


def selectivity(gate_MB, signal_MB, window=50):
    """Mean z-score, against the chunks around, of written chunks less that of skipped ones."""
    kernel = np.ones(window) / window
    smooth = np.stack([np.convolve(x, kernel, "same") for x in signal_MB.T], axis=1)
    square = np.stack([np.convolve(x, kernel, "same") for x in ((signal_MB - smooth) ** 2).T], axis=1)
    z = (signal_MB - smooth) / np.sqrt(square)
    return z[gate_MB > 0].mean() - z[gate_MB == 0].mean()


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_online_keeps_its_rate_under_drift_and_selects(rate):
    signal_MB = drifting()
    gate_MB, _, _ = drive(GateRule("online"), GateSettings(rate=rate), signal_MB)
    late_MB = np.asarray(gate_MB)[200:]
    np.testing.assert_allclose(late_MB.mean(axis=0), rate, atol=0.02)
    chosen = selectivity(late_MB, np.asarray(signal_MB)[200:])
    random_MB, _, _ = drive(GateRule("random"), GateSettings(rate=rate), signal_MB)
    assert abs(selectivity(np.asarray(random_MB)[200:], np.asarray(signal_MB)[200:])) < 0.1
    assert chosen > 1.2  # the best possible is 1.6 to 1.75


def test_the_published_rule_keeps_its_rate_on_a_quiet_signal_and_selects_little():
    """Why a test of the rate alone proves nothing."""
    rng = np.random.default_rng(0)
    signal_MB = jnp.asarray(0.5 + 0.002 * rng.standard_normal((2000, ROWS)), jnp.float32)
    settings = GateSettings(rate=0.5, threshold_n=TAU)
    for rule, bounds in (("ponder_ema", (-0.2, 0.5)), ("online", (1.2, 1.8))):
        gate_MB, _, _ = drive(GateRule(rule), settings, signal_MB)
        late_MB = np.asarray(gate_MB)[500:]
        np.testing.assert_allclose(late_MB.mean(), 0.5, atol=0.05)
        assert bounds[0] < selectivity(late_MB, np.asarray(signal_MB)[500:]) < bounds[1], rule


def test_a_low_signal_can_be_what_is_written():
    signal_MB = drifting()
    high, _, _ = drive(GateRule("online"), GateSettings(rate=0.3), signal_MB)
    low, _, _ = drive(GateRule("online", update_on="low"), GateSettings(rate=0.3), signal_MB)
    mirrored, _, _ = drive(GateRule("online"), GateSettings(rate=0.3), -signal_MB)
    np.testing.assert_array_equal(low, mirrored)
    assert (
        selectivity(np.asarray(low)[100:], np.asarray(signal_MB)[100:])
        < -1.0
        < 0
        < selectivity(np.asarray(high)[100:], np.asarray(signal_MB)[100:])
    )


@pytest.mark.parametrize("rule", ["ponder_ema", "ponder_ema_code"])
def test_ponder_ema_follows_its_equations_on_recorded_signals(rule):
    signal_M = np.random.default_rng(1).gamma(2.0, 0.3, 60).astype(np.float32)
    signal_M[20:30] = 0.0  # drives the threshold down to its floor
    tau, rate, a, rho = 0.25, 0.3, 0.1, 0.3
    gates, taus = [], []
    for signal in signal_M:
        decision = float(signal > tau)
        rate_before, rate = rate, (1 - a) * rate + a * decision
        if rule == "ponder_ema":
            tau = tau + a * (rate_before - rho) * abs(tau)
        else:
            tau = max(0.01, tau + a * (rate - rho) * max(0.1, abs(tau)))
        gates.append(decision)
        taus.append(tau)
    settings = GateSettings(rate=rho, threshold_n=TAU)
    found, margin, state = drive(GateRule(rule), settings, jnp.asarray(signal_M)[:, None], 1)
    np.testing.assert_array_equal(np.asarray(found)[:, 0], gates)
    np.testing.assert_allclose(np.asarray(state.level)[:, 0], taus, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(margin)[1:, 0], signal_M[1:] - taus[:-1], atol=1e-5)


def test_threshold_takes_the_bound_of_its_layer_and_says_by_how_much():
    signal_MB = jnp.array([[0.3, 0.6, 0.2, 0.5]])
    for layer, expected in ((0, [0, 1, 0, 0]), (1, [1, 1, 0, 1])):
        gate_MB, margin_MB, _ = drive(GateRule("threshold"), GateSettings(threshold_n=TAU), signal_MB, layer)
        np.testing.assert_array_equal(gate_MB[0], expected)
        np.testing.assert_allclose(margin_MB[0], signal_MB[0] - TAU[layer], rtol=1e-6)
        below_MB, _, _ = drive(GateRule("threshold", update_on="low"), GateSettings(threshold_n=TAU), signal_MB, layer)
        np.testing.assert_array_equal(below_MB[0], (signal_MB[0] < TAU[layer]).astype(np.float32))


@pytest.mark.parametrize("rate", [0.0, 0.25, 1 / 3, 0.7, 1.0])
def test_periodic_spreads_exactly_its_share(rate):
    gate_MB, _, _ = drive(GateRule("periodic"), GateSettings(rate=rate), jnp.zeros((120, 1)))
    gaps = np.diff(np.flatnonzero(np.asarray(gate_MB)[:, 0]))
    assert np.asarray(gate_MB).sum() == round(120 * rate)
    assert rate == 0 or (gaps.max() - gaps.min() <= 1 and abs(gaps.mean() - 1 / rate) < 0.1)


def test_random_draws_belong_to_document_layer_and_chunk():
    signal_MB, settings = jnp.zeros((3000, ROWS)), GateSettings(rate=0.3)
    gates = {layer: np.asarray(drive(GateRule("random"), settings, signal_MB, layer)[0]) for layer in (0, 1)}
    np.testing.assert_allclose(gates[0].mean(axis=0), 0.3, atol=0.03)
    pairs = [gates[0][:, b] for b in range(ROWS)] + [gates[1][:, 0]]
    for one, other in itertools.combinations(pairs, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.08
    order = jnp.array([2, 0, 3, 1])
    permuted, _, _ = drive(GateRule("random"), settings, signal_MB, 0, order)
    np.testing.assert_array_equal(permuted, gates[0][:, np.asarray(order)])
    together = drive(GateRule("random", shared=True), settings, signal_MB, 1)[0]
    np.testing.assert_array_equal(together, gates[0])


def test_forced_gates_are_taken_as_they_are_and_end():
    forced_nBM = np.random.default_rng(0).integers(0, 2, (2, ROWS, 5)).astype(np.float32)
    gate_MB, _, _ = drive(GateRule("forced"), GateSettings(forced_nBM=forced_nBM), jnp.zeros((7, ROWS)), 1)
    np.testing.assert_array_equal(gate_MB, np.concatenate([forced_nBM[1].T, np.zeros((2, ROWS))]))


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (GateRule("ponder_ema", "loss"), ["ponder_ema", "'loss'", "reconstruction", "online"]),
        (GateRule("ponder_ema_code", update_on="low"), ["ponder_ema_code", "low"]),
    ],
)
def test_rules_and_signals_that_cannot_work_together_are_named(rule, parts):
    problem = rule.problem()
    assert problem is not None and all(part in problem for part in parts) and "\n" not in problem


def test_all_other_rules_have_no_problem():
    for rule in GATE_RULES.names():
        assert GateRule(rule).problem() is None


def own_signal(signal, o, v, measured):
    """Measures a signal of the layer that needs neither the state nor the update."""
    return GATE_SIGNALS[signal].measure(LayerChunk(o, v, measured, lambda: None, lambda: None))


def test_own_signals_are_what_they_say():
    rng = np.random.default_rng(0)
    o, v = jnp.asarray(rng.standard_normal((2, 3, 8, 6)), jnp.float32)
    measured = jnp.arange(8)[None] < jnp.array([[6], [8], [1]])
    for row in range(3):
        a, b = (np.asarray(x[row])[np.asarray(measured[row])].ravel() for x in (o, v))
        best = (a @ b) / (a @ a)  # the multiple of O nearest to V
        error = np.sum((b - max(best, 0) * a) ** 2) / np.sum(b**2)
        np.testing.assert_allclose(own_signal("reconstruction", o, v, measured)[row], error, rtol=1e-4)
        np.testing.assert_allclose(
            own_signal("loss", o, v, measured)[row], -(a @ b) / int(measured[row].sum()), rtol=1e-4
        )
    assert measured_tokens(128, True) == 126 and measured_tokens(128, False) == 127
    np.testing.assert_allclose(own_signal("reconstruction", v, v, measured), 0, atol=1e-5)
    np.testing.assert_allclose(own_signal("reconstruction", -v, v, measured), 1)
    np.testing.assert_allclose(own_signal("reconstruction", 0 * v, v, measured), 1)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.75, 0.9])
def test_online_writes_about_its_rate_from_the_first_chunks_on(rate):
    """The first quantile is that of the rate, not of its complement; what comes later would mend any start."""
    signal_MB = jnp.asarray(np.random.default_rng(0).standard_normal((20, 400)), jnp.float32)
    gate_MB, margin_MB, _ = drive(GateRule("online"), GateSettings(rate=rate, gamma=0.0), signal_MB)
    np.testing.assert_allclose(np.asarray(gate_MB)[5:].mean(), rate, atol=0.05)
    assert (np.asarray(margin_MB)[0] > 0).all() == (rate > 0.5), "a first signal is its own mean"
    adapted_MB, _, _ = drive(GateRule("online"), GateSettings(rate=rate), signal_MB)
    np.testing.assert_allclose(np.asarray(adapted_MB)[:10].mean(), rate, atol=0.15)
