"""Seeded permutations that never change: integer arithmetic only, the same on every machine and NumPy release.

``numpy.random.Generator`` does not promise the same stream across releases, and a resumed run must see the same order.

Letters: N things to be put into an order.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values_N: np.ndarray) -> np.ndarray:
    """Returns the SplitMix64 finaliser of uint64 ``values_N`` (Steele et al., OOPSLA 2014), a bijection on 64 bits."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        z_N = values_N.astype(np.uint64) + _GOLDEN
        z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z_N ^ (z_N >> np.uint64(31))


def derive_seed(seed: int, stream: int) -> int:
    """Returns a 32-bit seed for one of several independent ``stream`` numbers below one ``seed``."""
    base = mix64(np.array([seed % 2**64], np.uint64))
    return int(mix64(base ^ np.uint64(stream))[0] >> np.uint64(32))


def permutation(count: int, seed: int) -> np.ndarray:
    """Returns the int64 permutation of ``range(count)`` that belongs to ``seed``."""
    key = mix64(np.array([seed % 2**64], np.uint64))
    return np.argsort(mix64(np.arange(count, dtype=np.uint64) ^ key), kind="stable").astype(np.int64, copy=False)
