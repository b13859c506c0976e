"""Evaluations.

positions       held-out loss by position in the document  evaluate_positions
ngram           unigram and bigram baselines               count_ngrams, evaluate_ngrams
bootstrap       intervals over documents                   bootstrap_level, bootstrap_difference
tables          estimates as JSON and as lines of a table
report          JSON, table and figure of losses           make_report, PositionReport
evaluate        all of it for one run                      evaluate_run
gated           documents read under gates                 GatedDocuments
gating_study    all rules beside controls and oracles      study_gates
oracles         gate decisions made with the loss in view  enumerate_decisions, rollout, first_order, greedy
gating_metrics  a rule beside controls and oracles         score_bases, score_controls, measure_rule
gating_report   JSON and tables of a gating study          make_gating_report
gating_figure   its pictures (loads matplotlib)            plot_gating
completion      text from a trained model                  Complete, Completer
answers         answers on disk, to go on after a stop     AnswerFile
ruler           RULER: samples, answers, scores            prepare_ruler, evaluate_ruler
harness         tasks of lm-evaluation-harness             Respondent, register_model
code            HumanEval, with a sandbox for its programs evaluate_code
"""

from intttrain.evals.answers import AnswerFile
from intttrain.evals.bootstrap import Estimate, bootstrap_difference, bootstrap_level
from intttrain.evals.completion import Complete, Completer, TextStream
from intttrain.evals.gating.study import study_gates
from intttrain.evals.positions.evaluate import evaluate_run
from intttrain.evals.positions.losses import PositionLosses, evaluate_positions
from intttrain.evals.positions.ngram import NgramCounts, count_ngrams, evaluate_ngrams
from intttrain.evals.positions.report import PositionReport, make_report
from intttrain.evals.ruler.data import prepare_ruler
from intttrain.evals.ruler.evaluate import evaluate_ruler
from intttrain.evals.ruler.report import RulerReport
from intttrain.evals.ruler.tasks import RulerSample, RulerSet

__all__ = [
    "AnswerFile",
    "Complete",
    "Completer",
    "Estimate",
    "NgramCounts",
    "PositionLosses",
    "PositionReport",
    "RulerReport",
    "RulerSample",
    "RulerSet",
    "TextStream",
    "bootstrap_difference",
    "bootstrap_level",
    "count_ngrams",
    "evaluate_ngrams",
    "evaluate_positions",
    "evaluate_ruler",
    "evaluate_run",
    "make_report",
    "prepare_ruler",
    "study_gates",
]
