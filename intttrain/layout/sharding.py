"""Which tensor dimension lies along which mesh axis: one table of logical names, for parameters and activations.

Parameters carry logical names of their dims (``model.logical_axes``); activations are pinned with ``constrain``. Code
that runs without a mesh (evaluation, tests, one device) sees no constraint at all.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.config import Config
from intttrain.config.errors import UserError, nearest_divisors
from intttrain.layout.row_order import check_row_order

PyTree = Any
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
Axes = tuple[str | None, ...]

# Logical name -> mesh axes, outermost first. A dim without an axis is replicated.
RULES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        # activations
        "batch": ("data", "fsdp"),
        "tokens": ("context",),
        "width": (),
        # parameters; heads, mlp and vocab name the same dims of activations
        "layers": (),
        "embed": ("fsdp", "context"),  # a context shard needs no copy of the optimizer state of its own
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "spread_heads": ("tensor", "context"),  # while whole rows are attended to
        "head_dim": (),
        "mlp": ("tensor",),
        "vocab": ("tensor",),
        "target": ("tensor",),
        "norm": (),
        "taps": (),
    }
)
# The dims along which parameters are stored in pieces but used whole: gathered before a matmul.
GATHERED = ("embed",)


def partition_spec(axes: Axes) -> PartitionSpec:
    """Returns the spec of a tensor whose dims have these logical names (``None``: not sharded).

    Raises:
      ValueError: an unknown name, or two dims that want the same mesh axis.
    """
    taken: dict[str, str] = {}
    for name in axes:
        if name is not None and name not in RULES:
            raise ValueError(f"{name!r} in {axes} has no rule; the names are {', '.join(RULES)}")
        for axis in RULES[name] if name is not None else ():
            if axis in taken:
                raise ValueError(f"{axes}: the dims {taken[axis]!r} and {name!r} both want the mesh axis {axis!r}")
            taken[axis] = str(name)
    return PartitionSpec(*(RULES[name] or None if name is not None else None for name in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins ``x`` to the sharding of its logical names; does nothing where no mesh is in use."""
    return jax.lax.with_sharding_constraint(x, partition_spec(axes)) if _sharded() else x


def per_device(
    function: Callable[..., Any], in_axes: PyTree, out_axes: PyTree, *, left_to_xla: tuple[str, ...] = ()
) -> Any:
    """Returns ``function`` to be run by every device on its own pieces; it does its own communication.

    Args:
      function: sees arrays in the pieces that the logical names say; may use the collectives below.
      in_axes, out_axes: as the arguments and results of ``function``: logical names of the dims of each array.
      left_to_xla: mesh axes along which arrays stay whole to ``function`` and XLA divides its work; none of the logical
        names may lie on them.

    Where no mesh is in use the pieces are whole, and ``function`` itself is returned.
    """
    if not _sharded():
        return function
    is_axes = lambda x: type(x) is tuple and all(name is None or isinstance(name, str) for name in x)  # noqa: E731
    in_specs, out_specs = (jax.tree.map(partition_spec, axes, is_leaf=is_axes) for axes in (in_axes, out_axes))
    manual = set(jax.sharding.get_abstract_mesh().axis_names) - set(left_to_xla)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False)


def _sharded() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def sum_over(x: jax.Array, *axes: str) -> jax.Array:
    """Inside ``per_device``: the sum of ``x`` over the devices along mesh axes."""
    return jax.lax.psum(x, axes) if _sharded() else x


def max_over(x: jax.Array, *axes: str) -> jax.Array:
    """Inside ``per_device``: the maximum of ``x`` over the devices along mesh axes."""
    return jax.lax.pmax(x, axes) if _sharded() else x


def gather_pieces(x: jax.Array, name: str, dim: int) -> jax.Array:
    """Inside ``per_device``: the whole of a dim that is stored in pieces under this logical name."""
    return jax.lax.all_gather(x, RULES[name], axis=dim, tiled=True) if _sharded() else x


def sum_to_pieces(x: jax.Array, name: str, dim: int) -> jax.Array:
    """Inside ``per_device``: the sum of ``x`` over the axes of this logical name, each device keeping its piece."""
    return jax.lax.psum_scatter(x, RULES[name], scatter_dimension=dim, tiled=True) if _sharded() else x


def position_on(axis: str) -> jax.Array | int:
    """Inside ``per_device``: which piece along a mesh axis this device holds."""
    return jax.lax.axis_index(axis) if _sharded() else 0


def using_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Makes ``mesh`` the one that ``constrain`` sees, while a function is traced; ``None`` changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def axis_size(axis: str) -> int:
    """Returns the size of a mesh axis, 1 where no mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def platform() -> str:
    """Returns what the program being traced is for: "tpu", "gpu" or "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def device_kind() -> str:
    """Returns the ``jax.Device.device_kind`` of the devices that the program being traced is for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else str(device.device_kind)


def named_shardings(mesh: Mesh, axes: PyTree, abstract: PyTree) -> PyTree:
    """Returns the sharding of every parameter.

    Args:
      mesh: with the axes of ``layout.mesh.AXES``.
      axes: tree of tuples of logical names.
      abstract: tree of shapes with the same structure.

    Raises:
      UserError: a dim that its mesh axes do not divide; names the parameter.
    """

    def sharding(path: Any, leaf: Any, names: tuple[str, ...]) -> NamedSharding:
        for size, name in zip(leaf.shape, names, strict=True):
            pieces = pieces_of(mesh, name)
            if size % pieces:
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                split = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in RULES[name])
                raise UserError(
                    f"parameter {where}: dim {name!r} of size {size} cannot be cut into {split} = {pieces} pieces; "
                    f"use {' or '.join(map(str, nearest_divisors(size, pieces)))}"
                )
        return NamedSharding(mesh, partition_spec(names))

    return jax.tree_util.tree_map_with_path(sharding, abstract, axes)


def with_sharding(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of ``leaf`` with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_batch(config: Config, mesh: Mesh) -> None:
    """Checks that the rows of a microbatch, and the tokens of a row, can be cut over the mesh. Raises ``UserError``."""
    rows, pieces = config.train.batch_rows // config.train.microbatches, pieces_of(mesh, "batch")
    if rows % pieces:
        choices = _nearest_multiples(rows, pieces)
        raise UserError(
            f"train.batch_rows={config.train.batch_rows} in {config.train.microbatches} microbatches gives {rows} "
            f"rows, which data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {pieces} does not divide; use "
            f"train.batch_rows={' or '.join(str(choice * config.train.microbatches) for choice in choices)}"
        )
    check_row_order(config.model, "data.seq_len", config.data.seq_len, mesh.shape["context"], mesh.shape["tensor"])


def check_evaluation(config: Config, mesh: Mesh) -> None:
    """Checks the same of the rows of an evaluation. Raises ``UserError``."""
    rows, pieces = config.eval.batch_rows, pieces_of(mesh, "batch")
    if rows % pieces:
        choices = _nearest_multiples(rows, pieces)
        raise UserError(
            f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {pieces} does not divide the rows of "
            f"eval.batch_rows={rows}; use eval.batch_rows={' or '.join(map(str, choices))}, or other axes of the mesh"
        )
    check_row_order(config.model, "eval.seq_len", config.eval.seq_len, mesh.shape["context"], mesh.shape["tensor"])


def _nearest_multiples(rows: int, pieces: int) -> list[int]:
    return sorted({max(1, rows // pieces) * pieces, -(-rows // pieces) * pieces})


def pieces_of(mesh: Mesh | None, name: str | None) -> int:
    """Returns into how many pieces ``mesh`` (default: the one in use) cuts the dims of this logical name."""
    size = axis_size if mesh is None else mesh.shape.__getitem__
    return 1 if name is None else math.prod(map(size, RULES[name]))
