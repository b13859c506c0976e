"""The gating study of a run: rules x signals x signs x rates x lengths, beside blind decisions and oracles.

Letters: as in ``documents``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from intttrain import ttt
from intttrain.config import Config, ModelConfig
from intttrain.config.errors import UserError
from intttrain.config.registry import EVAL_TASKS
from intttrain.data import Batch
from intttrain.evals.gating.documents import Gated, GatedDocuments
from intttrain.evals.gating.metrics import measure_rule, measure_shuffled, score_bases, score_controls, shared_counts
from intttrain.evals.gating.oracles import (
    MAX_TREE_GATES,
    Outcome,
    enumerate_decisions,
    first_order,
    greedy,
    live_gates,
    make_outcome,
    rollout,
)
from intttrain.evals.gating.report import GateCost, GateRow, GateSetting, GatingReport, make_gating_report
from intttrain.evals.run import EvalRun
from intttrain.evals.tables import aligned
from intttrain.model import Params, model_flops_per_token
from intttrain.ttt.gating import HindsightRule

MIN_CALIBRATION_CHUNKS = 100
Report = Callable[[str], None]
# Threshold of each layer by signal, sign and rate.
Thresholds = Mapping[tuple[str, str, float], np.ndarray]


@EVAL_TASKS.register("gating")
def evaluate_gating(run: EvalRun) -> None:
    """Reports the gating study of a checkpoint; lengths of which there are no documents are left out with a note."""
    config = run.config
    rows_by_length, missing = {}, ""
    for tokens in [multiple * config.data.seq_len for multiple in config.eval.gating.lengths]:
        try:
            rows_by_length[tokens] = run.heldout(tokens, tokens)
        except UserError as error:
            missing = str(error)
            run.report(f"note: rows of {tokens} tokens are left out: {missing}")
    if not rows_by_length:
        raise UserError(f"eval.gating.lengths={list(config.eval.gating.lengths)} leaves nothing to read: {missing}")
    result = study_gates(
        config, run.params, rows_by_length=rows_by_length,
        calibration_rows=run.calibration(), report=run.report, dense=run.dense, mesh=run.mesh,
    )  # fmt: skip

    def plot(folder: Path) -> list[str]:
        from intttrain.evals.gating.figure import plot_gating  # loads matplotlib

        plot_gating(result, folder)
        return sorted(path.name for path in folder.glob("gating_*.png"))

    run.finish(result, plot=plot)


@EVAL_TASKS.register("calibrate")
def evaluate_thresholds(run: EvalRun) -> None:
    """Reports the thresholds of a checkpoint, to be given to gates."""
    rows = run.calibration()
    thresholds = calibrate(run.config, run.params, rows, mesh=run.mesh)
    run.finish(Calibration(run.config.name, len(rows), thresholds))


def study_gates(
    config: Config,
    params: Params,
    *,
    rows_by_length: Mapping[int, Sequence[Batch]],
    calibration_rows: Sequence[Batch],
    report: Report,
    dense: tuple[ModelConfig, Params] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> GatingReport:
    """Reads held-out documents under every rule of ``config.eval.gating`` and measures what the decisions are worth.

    Args:
      config: of the run; ``model`` and ``eval`` are used.
      params: of the run.
      rows_by_length: by T, documents of at least so many tokens, from ``data.document_rows``.
      calibration_rows: training documents, for rules with thresholds.
      report: receives progress lines.
      dense: a model trained without TTT, whose losses are shown beside the others.
      mesh: rows are cut over ``data`` and ``fsdp``.

    Raises:
      UserError: a model without TTT, a rule that cannot follow its signal, too little text to calibrate with, or a
        length of which there is no document.
    """
    _check_updates(config)
    assert config.model.ttt is not None
    gates = list(_gates(config))
    thresholds = calibrate(config, params, calibration_rows, mesh=mesh) if _needs_thresholds(config) else {}
    rows: list[GateRow] = []
    for length, documents in rows_by_length.items():
        report(f"rows of {length} tokens: {len(documents)} documents, {len(gates)} gates")
        reader = GatedDocuments(config.model, params, documents, batch_rows=config.eval.batch_rows, mesh=mesh)
        references = _references(reader, dense, wants_greedy=bool(config.eval.gating.oracles))
        rows += _study_length(config, reader, gates, thresholds, references, length, report)
    return make_gating_report(
        rows, config.eval, name=config.name, unit=config.prepare.tokenizer.loss_unit, train_tokens=config.data.seq_len,
        chunk_tokens=config.model.ttt.chunk_tokens,
    )  # fmt: skip


def _check_updates(config: Config) -> None:
    if config.model.ttt is None:
        raise UserError(f"run {config.name!r} has model.ttt=None, so there is no update to gate; name a run with TTT")


_Gate = tuple[ttt.GateRule, float]  # rule, rate


def _gates(config: Config) -> Iterator[_Gate]:
    """Yields all combinations; rules that look at nothing come once for each rate."""
    study = config.eval.gating
    refused = []
    for name in study.rules:
        blind = ttt.GateRule(name, shared=study.shared)
        looks = itertools.product(study.signals, study.update_on)
        rules = (ttt.GateRule(name, *look, study.shared) for look in looks) if blind.uses_signal else (blind,)
        for rule in rules:
            if problem := rule.problem():
                refused.append(problem)
                continue
            yield from ((rule, rate) for rate in study.rates)
    if refused and len(study.signals) * len(study.update_on) == 1:
        raise UserError(f"eval.gating: {refused[0]}")


def _needs_thresholds(config: Config) -> bool:
    return any(ttt.GateRule(name).definition.thresholds for name in config.eval.gating.rules)


def calibrate(
    config: Config, params: Params, rows: Sequence[Batch], *, mesh: jax.sharding.Mesh | None = None
) -> dict[tuple[str, str, float], np.ndarray]:
    """Returns the threshold of every TTT layer with which the wanted share of chunks of unlabelled text is written.

    Signals are recorded while every chunk is written; a gated model's may be others, and the realised rate shows it.

    Raises:
      UserError: a model without TTT, or fewer than ``MIN_CALIBRATION_CHUNKS`` chunks.
    """
    _check_updates(config)
    assert config.model.ttt is not None
    chunks = sum(row.tokens_BT.shape[0] for row in rows) // config.model.ttt.chunk_tokens
    if chunks < MIN_CALIBRATION_CHUNKS:
        raise UserError(
            f"{len(rows)} training documents have {chunks} chunks to take thresholds from, which needs "
            f"{MIN_CALIBRATION_CHUNKS}; raise eval.gating.calibration_documents="
            f"{config.eval.gating.calibration_documents} or give more text"
        )
    reader = GatedDocuments(config.model, params, rows, batch_rows=config.eval.batch_rows, mesh=mesh)
    found: dict[tuple[str, str, float], np.ndarray] = {}
    for signal in config.eval.gating.signals:
        watched = _watch(reader, signal, config.eval.gating.shared)
        for side, rate in itertools.product(config.eval.gating.update_on, config.eval.gating.rates):
            quantile = 1.0 - rate if side == "high" else rate
            found[signal, side, rate] = np.quantile(watched.signal_NMn, quantile, axis=(0, 1))
    return found


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Thresholds of a run, to be used as ``eval.gates`` or ``--gate_thresholds``.

    Attributes:
      name: of the run.
      documents: of training text, that they were taken from.
      thresholds: as ``calibrate`` returns them.
    """

    name: str
    documents: int
    thresholds: Thresholds

    def to_json(self) -> dict[str, Any]:
        """Returns entries of ``eval.gates``."""
        gates = [
            {"rule": "threshold", "signal": signal, "update_on": side, "rate": rate, "thresholds": values_n.tolist()}
            for (signal, side, rate), values_n in self.thresholds.items()
        ]
        return {"name": self.name, "documents": self.documents, "gates": gates}

    def table(self) -> str:
        """Returns the result as text for a terminal, ending in a newline."""
        cells = [["signal", "updates at", "rate", "thresholds, a TTT layer each"]]
        for (signal, side, rate), values_n in self.thresholds.items():
            cells.append([signal, side, f"{rate:g}", ",".join(f"{value:.6g}" for value in values_n)])
        head = f"{self.name}: thresholds from {self.documents} training documents, every chunk written"
        return "\n".join([head, "", *aligned(cells)]) + "\n"


def _watch(reader: GatedDocuments, signal: str, shared: bool) -> Gated:
    """Records a signal while every chunk is written."""
    everything = np.full(reader.layers, -np.inf, np.float32)
    return reader.read(ttt.GateRule("threshold", signal, shared=shared), ttt.GateSettings(threshold_n=everything))


def _references(
    reader: GatedDocuments, dense: tuple[ModelConfig, Params] | None, *, wants_greedy: bool
) -> dict[str, Outcome]:
    """Returns what is shown beside all rules of a length; greedy decisions cost as much as an oracle."""
    losses, weights_NM = reader.losses(), reader.weights_NM
    found = score_bases(losses, weights_NM)
    if wants_greedy:
        found["greedy"] = greedy(losses, weights_NM)
    if dense is not None:
        found["dense"] = make_outcome(np.zeros((*weights_NM.shape, 1)), reader.dense_nll(*dense), weights_NM)
    return found


def _study_length(
    config: Config,
    reader: GatedDocuments,
    gates: Sequence[_Gate],
    thresholds: Thresholds,
    references: Mapping[str, Outcome],
    length: int,
    report: Report,
) -> Iterator[GateRow]:
    """Yields the rows of one length, each with its controls and oracles."""
    study, weights_NM, losses = config.eval.gating, reader.weights_NM, reader.losses()
    oracles = {
        f"rollout_{base}": rollout(losses, weights_NM, base=base)
        for base in ("always", "never")
        if f"rollout_{base}" in study.oracles
    }
    if "tree" in study.oracles and live_gates(weights_NM)[0].sum() <= MAX_TREE_GATES:
        oracles["tree"] = enumerate_decisions(losses, weights_NM).best()
    noisy, noisy_M = reader.shuffled(config.eval.seed)
    for rule, rate in gates:
        settings = _settings(rule, rate, thresholds, config)
        chooses = rule.definition if isinstance(rule.definition, HindsightRule) else None
        found = reader.read(rule, settings) if chooses is None else _in_hindsight(reader, rule, chooses, rate)
        outcome = make_outcome(found.gates_NMn, found.nll_NM, weights_NM)
        own = dict(oracles)
        if "first_order" in study.oracles:
            counts_N = shared_counts(found.gates_NMn, weights_NM)
            own["first_order"], _ = first_order(losses, reader.gradients(), weights_NM, counts_N)
        metrics = measure_rule(
            outcome, references=references, oracles=own, weights_NM=weights_NM,
            controls=score_controls(losses, outcome.gates_NMn, weights_NM, seeds=range(study.random_seeds)),
            signal_NMn=found.signal_NMn if rule.uses_signal else None, eval_config=config.eval,
        )  # fmt: skip
        side: Literal[1, -1] = 1 if rule.update_on == "high" else -1
        signal = rule.signal if rule.uses_signal else None
        setting = GateSetting(rule.rule, signal, side if signal else None, rate, length)
        report(f"  {setting.line} at {rate:g}: {metrics.rate:.3f} written, {found.seconds:.1f} s")
        shuffled, flops = None, None
        if chooses is None:  # a rule that reads as it goes
            flops = reader.compiled_flops(rule, settings)
            if signal and noisy_M.any():
                seen_NMn = noisy.read(rule, settings).gates_NMn
                shuffled = measure_shuffled(found.gates_NMn, seen_NMn, noisy_M, config.eval)
        base_flops = reader.compiled_flops(ttt.GateRule("always"), ttt.GateSettings())
        cost = GateCost(
            flops_share=flops_share(config.model, length, metrics.rate),
            compiled_share=None if flops is None or base_flops is None else flops / base_flops,
            seconds=found.seconds,
        )
        yield GateRow(setting, metrics, cost, shuffled)


def _settings(rule: ttt.GateRule, rate: float, thresholds: Thresholds, config: Config) -> ttt.GateSettings:
    """Returns the numbers of a rule; one with thresholds has, or begins at, those for its rate."""
    threshold_n = thresholds[rule.signal, rule.update_on, rate] if rule.definition.thresholds else None
    return ttt.GateSettings(rate=rate, threshold_n=threshold_n, seed=config.eval.seed)


def _in_hindsight(reader: GatedDocuments, rule: ttt.GateRule, chooses: HindsightRule, rate: float) -> Gated:
    """Writes the chunks that are chosen from the signals of all, recorded while every chunk is written: not causal."""
    watched = _watch(reader, rule.signal, rule.shared)
    gates_NMn = chooses.choose(rule.sign * watched.signal_NMn, live_gates(reader.weights_NM)[0], rate)
    found = reader.read(ttt.GateRule("forced"), ttt.GateSettings(forced_nBM=np.moveaxis(gates_NMn, 2, 0)))
    return found._replace(gates_NMn=gates_NMn, signal_NMn=watched.signal_NMn)


def flops_share(model: ModelConfig, length: int, rate: float) -> float:
    """Returns the counted FLOPs of reading with this share of chunks written, over those of writing all.

    Counted: matmuls of the forward pass, attention to the keys that are seen, targets (always, signals need them), and
    ``2 D F`` per token and layer for every update that is made.
    """
    assert model.ttt is not None
    layers = len(model.ttt.layers)
    plain = model_flops_per_token(model, length) / 3 + 2 * layers * (model.d_model**2 + model.d_model * model.d_ff)
    update = 2 * layers * model.d_model * model.d_ff
    return (plain + rate * update) / (plain + update)
