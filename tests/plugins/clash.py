"""Takes a name that is taken."""

from intttrain.config.registry import GATE_RULES
from intttrain.ttt.gating import Online

GATE_RULES.add("online", Online("generate"))
