"""Which process this is. The only place that asks."""

from __future__ import annotations

import jax


def process_index() -> int:
    """Returns the number of this process, 0 for the one that writes results."""
    return jax.process_index()


def process_count() -> int:
    """Returns the number of processes that run this program together."""
    return jax.process_count()
