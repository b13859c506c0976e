"""Evaluations.

positions   held-out loss by position in the document      evaluate_positions
ngram       unigram and bigram baselines                   count_ngrams, evaluate_ngrams
bootstrap   intervals over documents                       bootstrap_level, bootstrap_difference
report      JSON, table and figure of the above            make_report, PositionReport
evaluate    all of it for one run                          evaluate_run
"""

from intttrain.evals.bootstrap import Estimate, bootstrap_difference, bootstrap_level
from intttrain.evals.evaluate import evaluate_run
from intttrain.evals.ngram import NgramCounts, count_ngrams, evaluate_ngrams
from intttrain.evals.positions import PositionLosses, evaluate_positions
from intttrain.evals.report import PositionReport, make_report

__all__ = [
    "Estimate",
    "NgramCounts",
    "PositionLosses",
    "PositionReport",
    "bootstrap_difference",
    "bootstrap_level",
    "count_ngrams",
    "evaluate_ngrams",
    "evaluate_positions",
    "evaluate_run",
    "make_report",
]
