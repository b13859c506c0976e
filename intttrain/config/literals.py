"""Types of configuration values: each refuses what is out of its range, and nothing is converted."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import numpy as np
import pydantic
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")

# Devices compute in fp32: what is larger is infinite there, and what is smaller is 0 (or flushed to it).
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)
SEEDS = 2**32  # jax.random.key takes 32 bits and wraps what is more


def _in_fp32(value: float) -> float:
    if value > LARGEST:
        raise ValueError(f"this is infinite in fp32, in which devices compute; use at most {LARGEST:.2g}")
    if 0 < value < SMALLEST:
        raise ValueError(f"this is 0 in fp32, in which devices compute; use at least {SMALLEST:.2g}")
    return value


def _below_one_in_fp32(value: float) -> float:
    if np.float32(value) >= 1:
        raise ValueError(
            "this is 1 in fp32: the moment would never move and its bias correction, 1 - b, be 0; use for example 0.95"
        )
    return value


PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True), AfterValidator(_in_fp32)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True), AfterValidator(_in_fp32)]
FiniteFloat = Annotated[float, Field(strict=True)]
ScalingFactor = Annotated[float, Field(ge=1, strict=True), AfterValidator(_in_fp32)]
AboveOne = Annotated[float, Field(gt=1, strict=True), AfterValidator(_in_fp32)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
MomentDecay = Annotated[float, Field(ge=0, le=1, strict=True), AfterValidator(_below_one_in_fp32)]
Switch = Annotated[bool, Field(strict=True)]

STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass_transform(frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Makes a class a section of the configuration: frozen, strict, without keys that it does not have."""
    made: Any = dataclass(frozen=True, config=STRICT)(cls)
    return cast(type[T], made)
