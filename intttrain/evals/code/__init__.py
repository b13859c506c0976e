"""HumanEval: pass@k of programs that a model wrote, run in a sandbox.

evaluate   completions, verdicts and report of one model    evaluate_code
problems   the benchmark
sandbox    runs programs and says how they ended            run_programs, check_sandbox
confine    the script that confines one program
report     pass@k with intervals, JSON and table            CodeReport
"""

from intttrain.evals.code.evaluate import evaluate_code
from intttrain.evals.code.report import CodeReport
from intttrain.evals.code.sandbox import Limits, Verdict, check_sandbox, run_programs

__all__ = ["CodeReport", "Limits", "Verdict", "check_sandbox", "evaluate_code", "run_programs"]
