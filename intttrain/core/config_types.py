"""Types of configuration values: each refuses what is out of its range, and nothing is converted."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Switch = Annotated[bool, Field(strict=True)]

STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
