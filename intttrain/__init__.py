"""In-Place Test-Time Training: pretraining language models that keep learning while they read.

What Python code may rely on is named here and explained in docs/api.md; everything else may move between releases. A
name is loaded from its module when it is first used, so ``import intttrain`` loads nothing and touches no device: on a
pod the processes have to find each other before anything does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intttrain.app.runs import load_trained
    from intttrain.config import Config, default_config, resolve
    from intttrain.config.errors import UserError
    from intttrain.data import Batch
    from intttrain.model import Generator, Request, Sampling, bind, init_params
    from intttrain.train import Checkpoints, init_state, make_train_step
    from intttrain.ttt import fast_weight_projection, make_targets

__all__ = [
    "Batch",
    "Checkpoints",
    "Config",
    "Generator",
    "Request",
    "Sampling",
    "UserError",
    "bind",
    "default_config",
    "fast_weight_projection",
    "init_params",
    "init_state",
    "load_trained",
    "make_targets",
    "make_train_step",
    "resolve",
]

_MODULE_OF = {
    "Batch": "intttrain.data",
    "Checkpoints": "intttrain.train",
    "Config": "intttrain.config",
    "Generator": "intttrain.model",
    "Request": "intttrain.model",
    "Sampling": "intttrain.model",
    "UserError": "intttrain.config.errors",
    "bind": "intttrain.model",
    "default_config": "intttrain.config",
    "fast_weight_projection": "intttrain.ttt",
    "init_params": "intttrain.model",
    "init_state": "intttrain.train",
    "load_trained": "intttrain.app.runs",
    "make_targets": "intttrain.ttt",
    "make_train_step": "intttrain.train",
    "resolve": "intttrain.config",
}


def __getattr__(name: str) -> Any:
    """Loads a public name (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'intttrain' has no public name {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
