"""Holds what the TPU kernels of the scans share: conditions, products, copies, and what XLA is told of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

LANES = 128  # values in a row of a register: widths of blocks are multiples of it


class Machine(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      vmem_bytes: on-chip memory that it may use.
      interpret: how Pallas interprets it on a machine without a TPU.
    """

    vmem_bytes: int
    interpret: Any = False


# The two forms of a condition, looked up in this module at every use so that `tests/benchmarks/profile_scans.py` can
# replace them: the compiler's static profile counts nothing under a condition.


def either(condition: Any, usual: Callable[[], None], other: Callable[[], None]) -> None:
    """Runs ``usual`` if the condition holds, else ``other``."""
    pl.when(condition)(usual)
    pl.when(jnp.logical_not(condition))(other)


def once(condition: Any) -> Callable[[Callable[[], None]], None]:
    """Decorates a function that only those steps of the grid run in which the condition holds."""
    return pl.when(condition)


def dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Returns the fp32 product of two matrices, summed over dim ``contract_a`` of one and ``contract_b`` of the other.

    With the dims stated no matrix has to be transposed before, which would be a pass of its own over it.
    """
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def tile_copy(hbm: Any, ref: Any, semaphore: Any, by_rows: bool, tile: Any, *, back: bool = False) -> Any:
    """Returns the copy, not started, of a tile of a matrix in main memory to ``ref``, or back.

    A tile is a set of rows or of columns. ``multiple_of`` promises the compiler that it begins at a whole register.
    """
    size = ref.shape[0 if by_rows else 1]
    part = pl.ds(pl.multiple_of(tile * size, LANES), size)
    there = hbm.at[part, :] if by_rows else hbm.at[:, part]
    return pltpu.make_async_copy(ref, there, semaphore) if back else pltpu.make_async_copy(there, ref, semaphore)


def run_copy(copy: Any) -> None:
    """Runs a copy and waits for its end."""
    copy.start()
    copy.wait()


def compiler_params(machine: Machine) -> pltpu.CompilerParams:
    """Lets two TensorCores share the first dim of the grid, the tiles; steps along the others run in their order."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=machine.vmem_bytes
    )


def cost(
    flops: int, moved: list[Any], *, reread: tuple[Any, int] | None = None, partly: tuple[list[Any], float] = ([], 1.0)
) -> pl.CostEstimate:
    """Returns what a kernel states about itself: FLOPs of its products, and bytes to and from main memory.

    A plan has nothing else to go by, since XLA cannot see into a kernel (``planner/scan_cost.py``).

    Args:
      flops: of all products.
      moved: arrays that are moved once.
      reread: an array of these that is moved several times, and how often.
      partly: arrays of which only a part is moved, and that part.
    """
    size = lambda x: x.size * x.dtype.itemsize  # noqa: E731
    total = sum(map(size, moved)) + partly[1] * sum(map(size, partly[0]))
    if reread is not None:
        total += (reread[1] - 1) * size(reread[0])
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=int(total))
