"""The ``model.ttt`` section of the configuration: which layers have a fast weight and how it moves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from intttrain.config.literals import STRICT, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Switch
from intttrain.config.registry import TARGETS, UPDATE_RULES, Named, SectionOf


@dataclass(frozen=True, config=STRICT)
class SumConfig:
    """The update rule of In-Place TTT: a chunk adds its sum of outer products, and nothing is forgotten."""

    kind: Literal["sum"] = "sum"


@dataclass(frozen=True, config=STRICT)
class TTTConfig:
    """In-Place TTT: which MLP blocks carry a fast weight and how it moves (``docs/method.md``)."""

    layers: tuple[NonNegativeInt, ...]  # indices of the decoder layers with a fast weight
    chunk_tokens: PositiveInt  # C, tokens per chunk
    eta: NonNegativeFloat  # size of one update; coupled to chunk_tokens (no 1/C factor)
    target: Annotated[str, Named(TARGETS)] = "input_embed"
    eta_warmup_steps: NonNegativeInt = 0  # eta rises linearly from 0 over these training steps
    update: Annotated[Any, SectionOf(UPDATE_RULES)] = SumConfig()  # what a chunk writes, and what is left of the rest
    delta_clip: PositiveFloat | None = None  # bound on the Frobenius norm of one chunk's eta * V^T Z
    delta_spectral: PositiveFloat | None = None  # bound on its spectral norm
    preserve_row_norm: Switch = False  # read W0 + S rescaled to the row norms of W0
    implementation: Literal["auto", "chunked", "pallas", "reference"] = "auto"

    @property
    def bounds(self) -> dict[str, Any]:
        """The bounds as every update rule has them: ``MyRule(**config.bounds, ...)``."""
        return {name: vars(self)[field] for field, name in BOUNDS.items()}


# Bounds on an update, which every update rule has to honour or to refuse: field of TTTConfig -> field of UpdateRule.
BOUNDS = {"delta_clip": "clip", "delta_spectral": "spectral", "preserve_row_norm": "preserve_row_norm"}
