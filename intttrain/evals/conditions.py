"""The ways in which a trained model reads: update on, update off, under a gate, or a dense twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from intttrain import ttt
from intttrain.config import EvalConfig, ModelConfig
from intttrain.config.errors import UserError
from intttrain.config.evaluation import GateConfig
from intttrain.config.registry import GATE_RULES
from intttrain.model import Generator, Params


class Condition(NamedTuple):
    """A model and how it reads.

    Attributes:
      model, params: of the run, or of a dense twin.
      eta: size of an update; 0 switches it off.
      gate, settings: which chunks are written.
    """

    model: ModelConfig
    params: Params
    eta: float
    gate: ttt.GateRule = ttt.GateRule()
    settings: ttt.GateSettings = ttt.GateSettings()

    def make_generator(self, *, rows: int, max_tokens: int, mesh: jax.sharding.Mesh | None) -> Generator:
        """Returns what continues documents under this condition; arguments as in ``Generator``."""
        return Generator(
            self.model, self.params, rows=rows, max_tokens=max_tokens, eta=self.eta, gate=self.gate,
            settings=self.settings, mesh=mesh,
        )  # fmt: skip


def make_conditions(
    model: ModelConfig, params: Params, config: EvalConfig, dense: tuple[ModelConfig, Params] | None
) -> dict[str, Condition]:
    """Returns what is compared by name: ``on``, ``off``, each of ``eval.gates``, ``dense``.

    Args:
      model, params: of the run; without TTT it is itself ``dense``.
      config: ``gates`` and ``seed`` are used.
      dense: model and parameters of a twin that was trained without TTT.

    Raises:
      UserError: a gate does not fit its signal or the model.
    """
    if model.ttt is None:
        found = {"dense": Condition(model, params, 0.0)}
    else:
        found = {"on": Condition(model, params, model.ttt.eta), "off": Condition(model, params, 0.0)}
        for gate in config.gates:
            rule = ttt.GateRule(gate.rule, gate.signal, gate.update_on, gate.shared)
            if problem := rule.problem():
                raise UserError(f"eval.gates: {problem}")
            settings = gate_settings(rule, gate.rate, gate.thresholds, model, where="eval.gates", flag="thresholds")
            found[_label(gate, rule)] = Condition(
                model, params, model.ttt.eta, rule, settings._replace(seed=np.asarray(config.seed, np.uint32))
            )
    if dense is not None:
        found["dense"] = Condition(*dense, 0.0)
    return found


def _label(gate: GateConfig, rule: ttt.GateRule) -> str:
    looks = f" {gate.update_on} {gate.signal}" if rule.uses_signal else ""
    return f"{gate.rule}{looks} {gate.rate:g}"


def gate_settings(
    gate: ttt.GateRule, rate: float, thresholds: Sequence[float], model: ModelConfig, *, where: str, flag: str
) -> ttt.GateSettings:
    """Returns the numbers of a gate. Raises ``UserError`` for thresholds that do not fit the rule or the model."""
    wanted = len(model.ttt.layers) if gate.definition.thresholds and model.ttt is not None else 0
    if len(thresholds) != wanted:
        having = GATE_RULES.names(lambda rule: rule.thresholds and rule.offered & {"generate", "evaluate"})
        raise UserError(
            f"{where}={gate.rule} takes {wanted} {flag}, one for each TTT layer if the rule is "
            f"{' or '.join(map(repr, having))}, not {len(thresholds)}; intttrain eval --task=calibrate finds some"
        )
    threshold_n = np.asarray(thresholds, np.float32) if thresholds else None
    return ttt.GateSettings(rate=rate, threshold_n=threshold_n)
