"""Devices arranged as a mesh with the axes of ``layout/axes.py``, whose sizes are configured (``MeshConfig``)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from intttrain.config import MeshConfig
from intttrain.config.errors import UserError, nearest_divisors
from intttrain.layout.axes import AXES, ROW_AXIS, RULES, SLICES_AXIS, check_axes


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Size of every axis in the order of ``AXES``, ``None`` resolved."""

    sizes: Mapping[str, int]
    slices: int = 1

    def __str__(self) -> str:
        shown = [f"{axis} {size}" for axis, size in self.sizes.items() if size > 1]
        slices = f" over {self.slices} slices" if self.slices > 1 else ""
        return (" x ".join(shown) or "1 device") + slices


def resolve_mesh(config: MeshConfig, device_count: int) -> MeshShape:
    """Returns the mesh for ``device_count`` devices; an axis that is ``None`` takes the devices that are left.

    Raises:
      UserError: the axes do not multiply to the number of devices, or the slices cannot be equal.
      ValueError: the axes of the configuration are not those of the table.
    """
    values = dataclasses.asdict(config)
    check_axes(values.keys() - {"slices"})
    if device_count % config.slices:
        raise UserError(f"mesh.slices={config.slices} does not divide the {device_count} devices")
    sizes = {axis: values[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size is None]
    product = math.prod(size for size in sizes.values() if size is not None)
    given = "mesh: " + " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size is not None)
    if free:
        if device_count % product:
            raise UserError(
                f"{given} = {product} does not divide the {device_count} devices; use axes whose product is one of "
                f"{nearest_divisors(device_count, product)}"
            )
        sizes[free[0]] = device_count // product
    elif product != device_count:
        others = product // sizes["fsdp"]
        if device_count % others == 0:
            choice = f"use mesh.fsdp={device_count // others}, or leave it None"
        else:
            choice = f"use axes whose product is {device_count}, or run on {product} devices"
        raise UserError(f"{given} = {product}, but there are {device_count} devices; {choice}")
    return MeshShape(sizes, config.slices)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh over ``devices`` (default: all devices of all processes).

    Raises:
      UserError: as ``resolve_mesh``, or the devices form another number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_mesh(config, len(devices))
    groups = _slices(devices, shape.slices)
    inner = tuple(size // shape.slices if axis == SLICES_AXIS else size for axis, size in shape.sizes.items())
    arranged = np.concatenate([_arrange(inner, group) for group in groups], axis=AXES.index(SLICES_AXIS))
    return jax.sharding.Mesh(arranged, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def whole_rows_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Returns the same devices for rows that are read a token at a time: those that would cut a row take other rows."""
    sizes = dict(mesh.shape)
    inner = RULES["batch"][-1]
    sizes[inner], sizes[ROW_AXIS] = sizes[inner] * sizes[ROW_AXIS], 1
    beside = np.moveaxis(mesh.devices, AXES.index(ROW_AXIS), AXES.index(inner) + 1)  # the last of both varies fastest
    return jax.sharding.Mesh(beside.reshape(tuple(sizes[axis] for axis in AXES)), AXES, axis_types=mesh.axis_types)


def _slices(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """Groups devices by slice; devices that know no slice (CPU, GPU) are cut into equal consecutive groups."""
    index = lambda device: getattr(device, "slice_index", 0)  # noqa: E731
    groups = [list(group) for _, group in itertools.groupby(sorted(devices, key=index), key=index)]
    if len(groups) == slices:
        return groups
    if len(groups) > 1:
        raise UserError(f"mesh.slices={slices}, but there are {len(groups)} slices; use mesh.slices={len(groups)}")
    if devices[0].platform == "tpu":
        raise UserError(f"mesh.slices={slices}, but all {len(devices)} devices are in one slice; use mesh.slices=1")
    size = len(devices) // slices
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Returns the devices of one slice in an order that follows its torus where there is one."""
    assert math.prod(shape) == len(devices)
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
