"""Evaluations.

positions/      held-out loss by position in the document
  losses        sums by document and bucket                evaluate_positions
  context       the same tokens after more and more text
  ngram         unigram and bigram baselines               count_ngrams, evaluate_ngrams
  report        JSON, table and figure                     make_report, PositionReport
  evaluate      all of it for one run                      evaluate_run
gating/         which chunks should be written
  documents     documents read under gates                 GatedDocuments
  oracles       gate decisions made with the loss in view  enumerate_decisions, rollout, first_order, greedy
  metrics       a rule beside controls and oracles         score_bases, score_controls, measure_rule
  study         all rules of a run                         study_gates
  report        JSON and tables                            make_gating_report
  figure        its pictures (loads matplotlib)            plot_gating
ruler/          RULER: samples, answers, scores            prepare_ruler, evaluate_ruler
code/           HumanEval, with a sandbox for its programs evaluate_code
harness         tasks of lm-evaluation-harness             Respondent, register_model
run             what a task of ``--task`` gets             EvalRun
conditions      update on, off, gated; a dense twin        Condition, make_conditions
bootstrap       intervals over documents                   bootstrap_level, bootstrap_difference
tables          estimates as JSON and as lines of a table
batches         rows of documents as batches
completion      text from a trained model                  Complete, Completer
answers         answers on disk, to go on after a stop     AnswerFile
"""

from intttrain.evals.answers import AnswerFile
from intttrain.evals.bootstrap import Estimate, bootstrap_difference, bootstrap_level
from intttrain.evals.completion import Complete, Completer, TextStream
from intttrain.evals.conditions import Condition, make_conditions
from intttrain.evals.gating.study import study_gates
from intttrain.evals.positions.evaluate import evaluate_run
from intttrain.evals.positions.losses import PositionLosses, evaluate_positions
from intttrain.evals.positions.ngram import NgramCounts, count_ngrams, evaluate_ngrams
from intttrain.evals.positions.report import PositionReport, make_report
from intttrain.evals.ruler.data import prepare_ruler
from intttrain.evals.ruler.evaluate import evaluate_ruler
from intttrain.evals.ruler.report import RulerReport
from intttrain.evals.ruler.tasks import RulerSample, RulerSet
from intttrain.evals.run import EvalRun

__all__ = [
    "AnswerFile",
    "Complete",
    "Completer",
    "Condition",
    "Estimate",
    "EvalRun",
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
    "make_conditions",
    "make_report",
    "prepare_ruler",
    "study_gates",
]
