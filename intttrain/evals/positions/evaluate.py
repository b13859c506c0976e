"""The whole evaluation of a run by position: every condition, the baselines, the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from intttrain.config import Config, ModelConfig
from intttrain.config.errors import UserError
from intttrain.config.registry import EVAL_TASKS
from intttrain.data import Batch, TokenStore
from intttrain.evals.positions.losses import PositionLosses, evaluate_positions
from intttrain.evals.positions.ngram import DEFAULT_MAX_TOKENS, count_ngrams, evaluate_ngrams
from intttrain.evals.positions.report import PositionReport, make_report
from intttrain.evals.run import EvalRun
from intttrain.logs.progress import LineStream, Progress, human_count
from intttrain.model import Params

Report = Callable[[str], None]


@EVAL_TASKS.register("positions")
def evaluate_held_out(run: EvalRun) -> None:
    """Reports the held-out loss of a checkpoint by position, beside n-grams of the training store if there is one."""
    config = run.config
    rows = run.heldout(config.eval.seq_len, config.eval.min_document_tokens)
    store = run.store(config.data.train[0].path) if config.data.train else None  # for the n-gram baselines
    result = evaluate_run(
        config, run.params, dense=run.dense, heldout_rows=rows, train_store=store, mesh=run.mesh, report=run.report
    )

    def plot(folder: Path) -> list[str]:
        result.plot(folder / "positions.png")
        return ["positions.png"]

    run.finish(result, plot=plot)


def evaluate_run(
    config: Config,
    params: Params,
    *,
    dense: tuple[ModelConfig, Params] | None,
    heldout_rows: Sequence[Batch],
    train_store: TokenStore | None,
    report: Report,
    mesh: jax.sharding.Mesh | None = None,
    ngram_max_tokens: int = DEFAULT_MAX_TOKENS,
) -> PositionReport:
    """Scores the held-out documents with the update on and off, with a dense model and with n-grams.

    A run without TTT (``config.model.ttt=None``) has one condition, ``dense``.

    Args:
      config: of the run; ``model`` and ``eval`` are used, and whether its tokenizer is bytes.
      params: of the run.
      dense: model configuration and parameters of a run trained without TTT, to compare with.
      heldout_rows: one document each, from ``data.document_rows``.
      train_store: text to count n-grams in; ``None`` leaves the baselines out.
      report: receives progress lines.
      mesh: over whose devices rows and tokens are cut.
      ngram_max_tokens: tokens of the training store to count.

    Raises:
      UserError: the dense model has TTT, does not fit the rows, or nothing is to be compared with it; a held-out
        token is outside a vocabulary.
    """
    conditions = _conditions(config, params, dense)
    losses: dict[str, PositionLosses] = {}
    report(f"scoring {len(heldout_rows)} documents of up to {config.eval.seq_len} tokens: {', '.join(conditions)}")
    for name, (model_config, model_params, eta) in conditions.items():
        progress = Progress(f"{name} documents", total=len(heldout_rows), stream=LineStream(report))
        losses[name] = evaluate_positions(
            model_config, model_params, heldout_rows, config.eval, eta=eta, mesh=mesh, on_rows=progress.advance
        )
        report(progress.line())
    if train_store is not None:
        losses |= _baselines(config, heldout_rows, train_store, report, ngram_max_tokens)
    return make_report(losses, config.eval, name=config.name, unit=config.prepare.tokenizer.loss_unit)


def _conditions(
    config: Config, params: Params, dense: tuple[ModelConfig, Params] | None
) -> dict[str, tuple[ModelConfig, Params, float | None]]:
    """Returns model, parameters and eta of every condition."""
    if dense is not None and dense[0].ttt is not None:
        raise UserError(
            f"the dense run to compare with has model.ttt.layers={list(dense[0].ttt.layers)} but must have "
            "model.ttt=None; name a run that was trained without TTT"
        )
    if config.model.ttt is None:
        if dense is not None:
            raise UserError(
                f"run {config.name!r} has model.ttt=None, so there is no update to compare with the dense run; "
                "evaluate a run with TTT or leave the dense run out"
            )
        return {"dense": (config.model, params, None)}
    conditions: dict[str, tuple[ModelConfig, Params, float | None]] = {
        "on": (config.model, params, config.model.ttt.eta),
        "off": (config.model, params, 0.0),
    }
    if dense is not None:
        conditions["dense"] = (*dense, None)
    return conditions


def _baselines(
    config: Config, rows: Sequence[Batch], store: TokenStore, report: Report, max_tokens: int
) -> dict[str, PositionLosses]:
    tokens = min(store.num_tokens, max_tokens)
    report(f"counting unigrams and bigrams in {human_count(tokens)} of {human_count(store.num_tokens)} training tokens")
    progress = Progress("n-gram tokens", total=tokens, stream=LineStream(report))
    counts = count_ngrams(store, max_tokens=max_tokens, on_tokens=progress.advance)
    unigram, bigram = evaluate_ngrams(counts, rows, config.eval.position_edges)
    report(progress.line())
    return {"unigram": unigram, "bigram": bigram}
