"""``lax.scan`` for loops that may have a single iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def scan(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any, length: int, *, reverse: bool = False
) -> tuple[Any, Any]:
    """``lax.scan`` that does not wrap a loop around a single iteration."""
    if length > 1:
        return jax.lax.scan(body, carry, inputs, length=length, reverse=reverse)
    carry, output = body(carry, jax.tree.map(lambda x: x[0], inputs))
    return carry, jax.tree.map(lambda x: x[None], output)
