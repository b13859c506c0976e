"""Checksums of arrays, computed where the arrays are: one pass over memory, a few bytes to the host."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def array_checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Returns a 32-bit checksum of the bits of each array, independent of how it is sharded.

    Boolean, integer and floating dtypes of 1, 2, 4 or 8 bytes; NaNs and zeros count by their bits. Blocks until the
    arrays are computed, so an error in the program that makes them surfaces here.
    """
    # One small program per array rather than one for all: it needs at most one temporary of the size of the largest
    # array (on CPU XLA makes one), and the arrays may live on different devices. One after the other: CPU devices run
    # programs side by side on a few threads, where many that communicate can end up waiting for each other.
    return {name: int(_sum_bits(array)) for name, array in arrays.items()}


@jax.jit
def _sum_bits(array: jax.Array) -> jax.Array:
    """Returns sum_i (2 i + 1) * word_i modulo 2^32 over the flat index i, uint32 scalar.

    Integer sums do not depend on their order, so every sharding gives the same value. The weights are odd, so any
    change of a single word shows, and they differ, so words that changed places show too.
    """
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, unsigned).astype(np.uint32)
    index = jnp.zeros(words.shape, np.uint32)
    stride = 1
    for dim in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(np.uint32, words.shape, dim) * np.uint32(stride % 2**32)
        stride *= words.shape[dim]
    return jnp.sum(words * (index * np.uint32(2) + np.uint32(1)), dtype=np.uint32)
