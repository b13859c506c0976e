"""The model's side of a gating study: what it hands to oracles and metrics, and the whole of it on a tiny model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from intttrain import ttt
from intttrain.config import Config, default_config, resolve
from intttrain.config.errors import UserError
from intttrain.data import Batch
from intttrain.evals.conditions import Condition
from intttrain.evals.gating.documents import GatedDocuments
from intttrain.evals.gating.study import calibrate, flops_share, study_gates
from intttrain.evals.positions.context import evaluate_contexts
from tests.model.test_gates import CHUNK, CHUNKS, MODEL, PARAMS, SETTINGS, TOKENS, T, read, rows

# Of layers whose decisions differ, so that a mix-up of layers would be seen.
RULE = ttt.GateRule("threshold", "reconstruction")


def document(tokens: np.ndarray) -> Batch:
    ones = np.ones(tokens.shape, np.int32)
    return Batch(tokens, np.roll(tokens, -1), ones.astype(np.float32), ones, np.arange(len(tokens), dtype=np.int32))


@functools.cache
def reader() -> GatedDocuments:
    """Batches of three: the last one has a single document."""
    return GatedDocuments(MODEL, PARAMS, [document(tokens) for tokens in TOKENS], batch_rows=3)


def by_chunk(nll_BT: np.ndarray) -> np.ndarray:
    """Sums over the chunks that predictions are made from; ``nll_BT[t]`` is the loss of token t + 1."""
    return np.pad(nll_BT, ((0, 0), (0, 1))).reshape(len(nll_BT), CHUNKS, CHUNK).sum(axis=2)


def test_documents_are_read_as_the_model_reads_them_whatever_the_batch() -> None:
    found, whole = reader().read(RULE, SETTINGS), read(RULE)
    np.testing.assert_allclose(found.nll_NM, by_chunk(whole.nll_BP[:, 1:]), rtol=1e-5)
    np.testing.assert_array_equal(found.gates_NMn, np.moveaxis(whole.decision.gate, 0, 2))
    np.testing.assert_allclose(found.signal_NMn, np.moveaxis(whole.decision.signal, 0, 2), rtol=1e-5)
    assert 0 < found.gates_NMn.mean() < 1 and np.any(found.gates_NMn[..., 0] != found.gates_NMn[..., 1])
    assert reader().weights_NM.sum(axis=1).tolist() == [T - 1] * 4

    some = np.array([3, 1])
    again = reader().losses()(some, found.gates_NMn[some])
    np.testing.assert_allclose(again, found.nll_NM[some], rtol=1e-5)


def test_gates_that_layers_share_and_their_gradient() -> None:
    gates = np.random.default_rng(1).integers(0, 2, (4, CHUNKS)).astype(np.float64)
    (_, nll), slope = rows(gates)
    everyone = np.arange(4)
    np.testing.assert_allclose(reader().losses()(everyone, gates), by_chunk(nll), rtol=1e-4, atol=1e-4)
    found, gradient = reader().gradients()(everyone, gates)
    np.testing.assert_allclose(found, by_chunk(nll), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-4)


def test_shuffled_chunks_keep_their_tokens_and_all_others_their_order() -> None:
    noisy, noisy_M = reader().shuffled(0)
    assert noisy_M.tolist() == [False, False, False, True, False, False]
    own_NMC, other_NMC = (x.tokens_NT.reshape(4, CHUNKS, CHUNK) for x in (reader(), noisy))
    np.testing.assert_array_equal(np.sort(other_NMC, axis=2), np.sort(own_NMC, axis=2))
    assert np.array_equal(np.any(other_NMC != own_NMC, axis=(0, 2)), noisy_M)
    # The chunks before know nothing of it.
    own, seen = reader().read(RULE, SETTINGS), noisy.read(RULE, SETTINGS)
    np.testing.assert_array_equal(seen.signal_NMn[:, :3], own.signal_NMn[:, :3])
    assert np.any(seen.signal_NMn[:, 3] != own.signal_NMn[:, 3])


def test_losses_of_a_dense_model_by_chunk() -> None:
    """A model whose layers write nothing is one without TTT."""
    dense = dataclasses.replace(MODEL, ttt=None)
    params = {name: leaf for name, leaf in PARAMS.items() if name != "ttt"}
    never = reader().read(ttt.GateRule("never"), ttt.GateSettings())
    np.testing.assert_allclose(reader().dense_nll(dense, params), never.nll_NM, rtol=1e-5)


def config(**gating: Any) -> Config:
    tree = default_config()
    tree.data.seq_len = tree.eval.seq_len = T
    tree.eval.position_edges, tree.eval.min_document_tokens = (T,), T
    tree.eval.batch_rows, tree.eval.bootstrap_samples = 4, 50
    tree.model.ttt.chunk_tokens = CHUNK
    tree.eval.gating.update(lengths=(1,), rates=(0.5,), signals=("reconstruction",), **gating)
    return dataclasses.replace(resolve(tree), model=MODEL)


def documents(count: int, seed: int = 0) -> list[Batch]:
    return [document(x) for x in np.random.default_rng(seed).integers(0, MODEL.vocab_size, (count, T)).astype(np.int32)]


def test_thresholds_write_the_wanted_share_of_each_layer() -> None:
    chosen = documents(20)
    found = calibrate(config(rules=("percentile",)), PARAMS, chosen)
    assert set(found) == {("reconstruction", side, 0.5) for side in ("high", "low")}
    watched = GatedDocuments(MODEL, PARAMS, chosen, batch_rows=4).read(
        ttt.GateRule("threshold", "reconstruction"), ttt.GateSettings(threshold_n=np.full(2, -np.inf, np.float32))
    )
    for side in ("high", "low"):
        above_n = (watched.signal_NMn > found["reconstruction", side, 0.5]).mean(axis=(0, 1))
        np.testing.assert_allclose(above_n, 0.5, atol=0.02)
    with pytest.raises(UserError, match=r"4 training documents have 24 chunks.*100.*calibration_documents=32"):
        calibrate(config(), PARAMS, documents(4))


def test_a_threshold_for_a_fifth_writes_a_fifth_on_its_side() -> None:
    """At a rate of one half both sides of a quantile are alike; here one is four times the other.

    The signal has no ties: here a fifth of the reconstruction errors are 1, the largest there can be.
    """
    chosen, base = documents(20), config(rules=("percentile",), update_on=("high", "low"))
    gating = dataclasses.replace(base.eval.gating, rates=(0.2,), signals=("delta_norm",))
    found = calibrate(dataclasses.replace(base, eval=dataclasses.replace(base.eval, gating=gating)), PARAMS, chosen)
    reader = GatedDocuments(MODEL, PARAMS, chosen, batch_rows=4)
    everything = ttt.GateSettings(threshold_n=np.full(2, -np.inf, np.float32))
    signal_NMn = reader.read(ttt.GateRule("threshold", "delta_norm"), everything).signal_NMn
    written_n = {
        "high": (signal_NMn > found["delta_norm", "high", 0.2]).mean(axis=(0, 1)),
        "low": (signal_NMn < found["delta_norm", "low", 0.2]).mean(axis=(0, 1)),
    }
    for share_n in written_n.values():
        np.testing.assert_allclose(share_n, 0.2, atol=0.02)


def test_a_study_from_documents_to_its_table() -> None:
    settings = config(rules=("online", "percentile", "ponder_ema", "periodic", "topk"), update_on=("high", "low"),
                      oracles=("tree", "rollout_always", "first_order"))  # fmt: skip
    settings = dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, seed=2**32 - 1))  # the largest
    lines: list[str] = []
    dense = (dataclasses.replace(MODEL, ttt=None), {name: leaf for name, leaf in PARAMS.items() if name != "ttt"})
    report = study_gates(
        settings, PARAMS, rows_by_length={T: documents(8)}, calibration_rows=documents(20, 1), report=lines.append,
        dense=dense,
    )  # fmt: skip
    names = [(row.setting.rule, row.setting.sign) for row in report.rows]
    both = [(rule, sign) for rule in ("online", "percentile") for sign in (1, -1)]
    assert names == [*both, ("ponder_ema", 1), ("periodic", None), ("topk", 1), ("topk", -1)]
    assert len(lines) == 1 + len(names) and "8 documents" in lines[0]
    for row in report.rows:
        levels = {name: float(level.value_P[0]) for name, level in row.metrics.levels.items()}
        # One decision for all layers: no bound for rules that decide by layer, but for these two and all blind ones.
        assert levels["dense"] == pytest.approx(levels["never"], rel=1e-5)
        assert (row.shuffled is None) == (row.setting.rule in ("periodic", "topk"))
        assert levels["tree"] <= min(levels[name] for name in ("never", "always", "rollout_always")) + 1e-9
        assert row.cost.seconds is not None and row.cost.flops_share is not None and 0 < row.cost.flops_share <= 1
    assert report.rows[-2].metrics.rate == pytest.approx(0.4)  # 2 of 5 live gates
    table = report.table()
    assert "ponder_ema" in table and "rollout_always" in table and "selectivity" in table


def test_a_rule_that_cannot_follow_its_signal_and_a_model_without_ttt_are_refused() -> None:
    impossible = config(rules=("ponder_ema",), update_on=("low",))
    with pytest.raises(UserError, match=r"eval\.gating.*ponder_ema.*low.*online"):
        study_gates(impossible, PARAMS, rows_by_length={}, calibration_rows=[], report=print)
    dense = dataclasses.replace(config(), model=dataclasses.replace(MODEL, ttt=None))
    with pytest.raises(UserError, match=r"model\.ttt=None"):
        study_gates(dense, PARAMS, rows_by_length={}, calibration_rows=[], report=print)


def test_counted_flops_grow_with_the_share_that_is_written() -> None:
    shares = [flops_share(MODEL, T, rate) for rate in (0.0, 0.5, 1.0)]
    assert shares[0] < shares[1] < shares[2] == 1.0
    assert shares[1] - shares[0] == pytest.approx(shares[2] - shares[1])


def test_the_last_block_is_the_same_whatever_was_read_before() -> None:
    """Longest context: the losses of the whole document. Without a context of its own a chunk knows no update."""
    base = config()
    setting = dataclasses.replace(
        base.eval, context=dataclasses.replace(base.eval.context, lengths=(2 * CHUNK, T), block_tokens=CHUNK + 1)
    )
    conditions = {"on": Condition(MODEL, PARAMS, 0.5), "off": Condition(MODEL, PARAMS, 0.0)}
    report = evaluate_contexts(
        conditions,
        [document(tokens) for tokens in TOKENS],
        setting,
        name="x",
        unit="bits per token",
        report=lambda _: None,
    )
    for name, eta in (("on", 0.5), ("off", 0.0)):
        nll_BT = read(ttt.GateRule("always"), eta=eta).nll_BP[:, -CHUNK - 1 :]
        assert report.levels[name].value_P[1] == pytest.approx(nll_BT.mean() / np.log(2), rel=1e-4)
    assert report.differences["on - off"].value_P[1] != 0
    assert "tokens read" in report.table() and report.to_json()["columns"][0]["length"] == 2 * CHUNK
    (warning,) = report.to_json()["warnings"]
    assert warning.startswith("4 documents, fewer than 30") and f"warning: {warning}\n" in report.table()
    short = dataclasses.replace(setting, context=dataclasses.replace(setting.context, lengths=(CHUNK + 1,)))
    with pytest.raises(UserError, match=rf"multiple of {CHUNK}.*block_tokens={CHUNK + 1}; use"):
        evaluate_contexts(conditions, [], short, name="x", unit="", report=print)
