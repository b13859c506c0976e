"""How arrays are cut over the devices of a mesh, by the logical names of their dims, and sums over those devices.

The table of names is ``layout/axes.py``. Parameters carry logical names of their dims (``model.logical_axes``);
activations are pinned with ``constrain``. Code that runs without a mesh (evaluation, tests, one device) sees no
constraint at all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.config import Config
from intttrain.config.errors import UserError, nearest_divisors
from intttrain.layout.axes import GATHERED, RULES, TOKEN_AXES
from intttrain.layout.row_order import check_row_order

PyTree = Any
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
Axes = tuple[str | None, ...]


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
    function: Callable[..., Any],
    in_axes: PyTree,
    out_axes: PyTree,
    *,
    left_to_xla: tuple[str, ...] = (),
    checked: bool = True,
) -> Any:
    """Returns ``function`` to be run by every device on its own pieces; it does its own communication.

    Args:
      function: sees arrays in the pieces that the logical names say; may use the collectives below.
      in_axes, out_axes: as the arguments and results of ``function``: logical names of the dims of each array.
      left_to_xla: mesh axes along which arrays stay whole to ``function`` and XLA divides its work; none of the logical
        names may lie on them.
      checked: whether JAX, while it traces, follows along which axes values differ and refuses a result that differs
        along an axis that ``out_axes`` says nothing of: a sum that is missing. A caller that says False says why.

    Where no mesh is in use the pieces are whole, and ``function`` itself is returned.
    """
    if not _sharded():
        return function
    is_axes = lambda x: type(x) is tuple and all(name is None or isinstance(name, str) for name in x)  # noqa: E731
    in_specs, out_specs = (jax.tree.map(partition_spec, axes, is_leaf=is_axes) for axes in (in_axes, out_axes))
    manual = set(jax.sharding.get_abstract_mesh().axis_names) - set(left_to_xla)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=checked)


def _sharded() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def sum_over(x: jax.Array, name: str) -> jax.Array:
    """Inside ``per_device``: the sum of ``x`` over the devices that hold the pieces of dims of this logical name."""
    return jax.lax.psum(x, RULES[name]) if _sharded() else x


def max_over(x: jax.Array, name: str) -> jax.Array:
    """Inside ``per_device``: the maximum of ``x`` over the devices that hold the pieces of dims of this name."""
    return jax.lax.pmax(x, RULES[name]) if _sharded() else x


def gather_pieces(x: jax.Array, name: str, dim: int) -> jax.Array:
    """Inside ``per_device``: the whole of a dim that is stored in pieces under this logical name."""
    return jax.lax.all_gather(x, RULES[name], axis=dim, tiled=True) if _sharded() else x


def sum_gradient(gradient: jax.Array, *names: str | None) -> jax.Array:
    """Inside ``per_device``: the gradient of a parameter, summed over all devices that have other tokens.

    Which these are follows from the table of axes, so that no axis can be forgotten: a gradient that misses one is
    too small by what the other devices found, and nothing else in a step would show it.

    Args:
      gradient: what the tokens of this device give, of the parameter as it is used: whole along ``GATHERED`` dims.
      names: logical names of the dims of the parameter; those of the last dims may be left out where they have no axis
        or one that is left to XLA.

    Returns:
      Of gathered dims the piece that this device stores.
    """
    if not _sharded():
        return gradient
    rest = list(TOKEN_AXES)
    for dim, name in enumerate(names):
        axes = () if name is None else RULES[name]
        if axes and name in GATHERED:
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
        rest = [axis for axis in rest if axis not in axes]
    return jax.lax.psum(gradient, tuple(rest)) if rest else gradient


def differing(x: jax.Array, *names: str) -> jax.Array:
    """Inside ``per_device``: the same numbers, taken for different ones on the devices that these names' axes separate.

    JAX refuses a loop that begins with a constant, the same everywhere, and adds to it what each device finds. The
    program gets no operation by it.
    """
    left = set(jax.sharding.get_abstract_mesh().manual_axes) - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axis for name in names for axis in RULES[name] if axis in left), to="varying")


def position_on(name: str) -> jax.Array | int:
    """Inside ``per_device``: which piece of dims of this logical name the device holds."""
    axes = RULES[name]
    if not axes or not _sharded():
        return 0
    return jax.lax.axis_index(axes if len(axes) > 1 else axes[0])  # a tuple of one would leave a product in the program


def using_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Makes ``mesh`` the one that ``constrain`` sees, while a function is traced; ``None`` changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


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
      mesh: with the axes of ``layout.axes.AXES``.
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
                raise UserError(
                    f"parameter {where}: dim {name!r} of size {size} cannot be cut into {_split(mesh, name)} pieces; "
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
            f"rows, which {_split(mesh, 'batch')} does not divide; use "
            f"train.batch_rows={' or '.join(str(choice * config.train.microbatches) for choice in choices)}"
        )
    check_row_order(
        config.model, "data.seq_len", config.data.seq_len, pieces_of(mesh, "tokens"), pieces_of(mesh, "heads")
    )


def check_evaluation(config: Config, mesh: Mesh) -> None:
    """Checks the same of the rows of an evaluation. Raises ``UserError``."""
    rows, pieces = config.eval.batch_rows, pieces_of(mesh, "batch")
    if rows % pieces:
        choices = _nearest_multiples(rows, pieces)
        raise UserError(
            f"{_split(mesh, 'batch')} does not divide the rows of "
            f"eval.batch_rows={rows}; use eval.batch_rows={' or '.join(map(str, choices))}, or other axes of the mesh"
        )
    check_row_order(
        config.model, "eval.seq_len", config.eval.seq_len, pieces_of(mesh, "tokens"), pieces_of(mesh, "heads")
    )


def _nearest_multiples(rows: int, pieces: int) -> list[int]:
    return sorted({max(1, rows // pieces) * pieces, -(-rows // pieces) * pieces})


def pieces_of(mesh: Mesh | None, name: str | None) -> int:
    """Returns into how many pieces ``mesh`` (default: the one in use) cuts the dims of this logical name."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if name is None or mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[name])


def _split(mesh: Mesh, name: str) -> str:
    return f"{' x '.join(f'{axis} {mesh.shape[axis]}' for axis in RULES[name])} = {pieces_of(mesh, name)}"
