"""`intttrain plan`: compiles the training step for TPUs that are not there and reads the result.

plan          configuration + topology -> Plan                       make_plan
report        Plan -> text; comparison and Pareto tables             describe_plan
sweep         several configurations at once
topology      names of TPU slices -> described devices
hlo, shapes   the compiler's text as instructions
loops         how often each part runs
flops, cost   matmul FLOPs and estimated cycles, by kind and line
kernels, attention_cost, scan_cost    what Pallas kernels cost
collectives, groups        bytes by kind and mesh axis
memory, liveness           what lies where at the peak, does it fit
replication   what every device holds although it could be in pieces
"""

from intttrain.planner.plan import Plan, make_plan
from intttrain.planner.report import describe_plan, describe_plans, describe_ttt_share
from intttrain.planner.sweep import make_plans, parse_sweep

__all__ = [
    "Plan",
    "describe_plan",
    "describe_plans",
    "describe_ttt_share",
    "make_plan",
    "make_plans",
    "parse_sweep",
]
