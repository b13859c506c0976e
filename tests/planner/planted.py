"""Programs with a known number of matmul FLOPs and known loops, and how to compile them for CPU and TPU.

TPU programs are compiled ahead of time for a described topology; no TPU is needed, only libtpu.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.planner.xla import hlo

TARGETS = ("cpu", "v5e:2x2", "v5p:2x2x1")
F32 = jnp.float32


class Program(NamedTuple):
    """A function, the shapes of its arguments, the matmul FLOPs of one call, the trips of its loops in any order."""

    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    flops: int
    trips: tuple[int, ...] = ()


def _plain(x, w):
    return x @ w


def _gradient(x, w):
    return jax.value_and_grad(lambda x, w: jnp.sum(jnp.tanh(x @ w)), argnums=(0, 1))(x, w)


def _nested(x, ws):
    def outer(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

    return jax.lax.scan(outer, x, ws)[0]


def _nested_gradient(x, ws):
    def outer(x, w):
        return jax.lax.scan(jax.checkpoint(lambda x, _: (jnp.tanh(x @ w), None)), x, None, length=3)[0], None

    return jax.value_and_grad(lambda x, ws: jnp.sum(jax.lax.scan(outer, x, ws)[0]), argnums=(0, 1))(x, ws)


def _carried_bound(x, w):
    """The bound is data to JAX, and travels through the loop beside the counter."""

    def body(carry):
        i, bound, x = carry
        return i + 2, bound, jnp.tanh(x @ w)

    start = (jnp.int32(1), jnp.int32(14), x)
    return jax.lax.while_loop(lambda carry: carry[0] <= carry[1], body, start)[2]


def _while_in_scan(x, ws):
    """The inner bound comes from outside of both loops."""

    def outer(carry, w):
        x, bound = carry
        body = lambda c: (c[0] - 1, jnp.tanh(c[1] @ w))  # noqa: E731
        _, x = jax.lax.while_loop(lambda c: c[0] > 0, body, (bound, x))
        return (x, bound), None

    return jax.lax.scan(outer, (x, jnp.int32(4)), ws)[0][0]


def _one_trip(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


def _reverse(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x[0]), x, ws, reverse=True)


def _einsum(formula: str) -> Callable[..., Any]:
    return functools.partial(jnp.einsum, formula)


_STEP = 2 * 64 * 128 * 128
_X, _WS = (64, 128), (5, 128, 128)
PROGRAMS = {
    "plain": Program(_plain, ((64, 96), (96, 256)), 2 * 64 * 96 * 256),
    "batched": Program(_einsum("bij,bkj->bik"), ((6, 64, 128), (6, 40, 128)), 2 * 6 * 64 * 128 * 40),
    "two contracted dims": Program(_einsum("aij,ijk->ak"), ((48, 8, 16), (8, 16, 256)), 2 * 48 * 8 * 16 * 256),
    "grouped": Program(_einsum("bkgth,bksh->bkgts"), ((2, 4, 2, 64, 32), (2, 4, 72, 32)), 2 * 2 * 4 * 2 * 64 * 72 * 32),
    "gradient": Program(_gradient, ((64, 96), (96, 256)), 3 * 2 * 64 * 96 * 256),
    "nested scans": Program(_nested, (_X, _WS), 15 * _STEP, (5, 3)),
    # Backward: recomputed once and two products; the recomputed last product is what tanh's derivative needs.
    "nested scans, gradient": Program(_nested_gradient, (_X, _WS), 4 * 15 * _STEP, (5, 3, 5, 3)),
    "carried bound": Program(_carried_bound, (_X, _WS[1:]), 7 * _STEP, (7,)),
    "while in scan": Program(_while_in_scan, (_X, _WS), 20 * _STEP, (5, 4)),
    "one trip": Program(_one_trip, (_X, (1, 128, 128)), _STEP),
    "reverse scan": Program(_reverse, (_X, _WS), 5 * _STEP, (5,)),
}


def topology(name: str) -> Any:
    """A described TPU topology; skips the test where it cannot be had."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU that is not there needs libtpu (pip install libtpu)")
    # Read by libtpu when it loads: no metadata server, no lock against other processes, no warnings about a host.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5p-8",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def compiled_text(function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], target: str) -> str:
    """Optimised text of ``function`` on fp32 arguments, replicated over the devices of a TPU."""
    if target == "cpu":
        arguments = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]
    else:
        mesh = topologies.make_mesh(topology(target), (4,), ("data",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        arguments = [jax.ShapeDtypeStruct(shape, F32, sharding=everywhere) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


@functools.cache
def compiled(name: str, target: str) -> hlo.Module:
    """A planted program, compiled and read; kept for the other tests of this process."""
    program = PROGRAMS[name]
    return hlo.parse_module(compiled_text(program.function, program.shapes, target))
