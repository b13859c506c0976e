"""Which devices take part in a collective: the forms in which XLA prints groups, and the mesh axes they stand for."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from intttrain.layout.hardware import Chip

if TYPE_CHECKING:
    import jax

Groups = tuple[tuple[int, ...], ...]

_LIST = re.compile(r"replica_groups=\{((?:\{[\d, ]*\}[, ]*)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+, ?\d+\}[, ]*)*)\}")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(dims: list[int], order: str | None) -> np.ndarray:
    devices = np.arange(math.prod(dims)).reshape(dims)
    return devices.transpose(_ints(order)) if order else devices


def read_groups(attribute_text: str, devices: int) -> Groups:
    """Returns the groups of a collective, or the (source, target) pairs of a permute.

    Understood are ``{{0,1},{2,3}}``, ``[2,2]<=[2,2]T(1,0)`` and ``mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}``,
    also with parts of axes as ``'b':(1)2``. Without groups all devices form one.

    Args:
      attribute_text: of the instruction.
      devices: number of devices of the program.
    """
    if found := _PAIRS.search(attribute_text):
        return tuple(tuple(_ints(pair)) for pair in re.findall(r"\{([^{}]*)\}", found.group(1)))
    if found := _MESH.search(attribute_text):
        return _mesh_groups(*found.groups())
    if found := _IOTA.search(attribute_text):
        shape, dims, order = found.groups()
        rows = _iota(_ints(dims), order).reshape(_ints(shape))
        return tuple(tuple(row) for row in rows.tolist())
    found = _LIST.search(attribute_text)
    groups = re.findall(r"\{([^{}]*)\}", found.group(1)) if found else []
    return tuple(tuple(_ints(group)) for group in groups) or (tuple(range(devices)),)


def _mesh_groups(axes: str, dims: str | None, order: str | None, reduced: str) -> Groups:
    """Groups along the axes in ``reduced`` of a mesh; an axis that is used in part is split first."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(axes)}
    parts: dict[str, tuple[int, int]] = {}
    for name, _, before, size in _AXIS.findall(reduced):
        parts[name] = (int(before), int(size)) if size else (1, sizes[name])
    shape: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        grouped += [len(shape) + 1] if name in parts else []
        shape += [before, part, size // (before * part)]
    devices = _iota(_ints(dims), order) if dims else np.arange(math.prod(shape))
    arranged = np.moveaxis(devices.reshape(shape), grouped, range(len(shape) - len(grouped), len(shape)))
    size = math.prod(shape[d] for d in grouped)
    return tuple(tuple(row) for row in arranged.reshape(-1, size).tolist())


class MeshGroups:
    """The devices of a program as positions of its mesh, which may be those of one slice only.

    Attributes:
      devices: number of devices that the text of the program speaks of.
      sizes: length of every mesh axis, all slices together.
      slices: number of slices that the mesh covers.
    """

    def __init__(self, mesh: jax.sharding.Mesh, num_partitions: int) -> None:
        self.sizes: dict[str, int] = {str(name): size for name, size in mesh.shape.items()}
        flat = list(mesh.devices.flat)
        self.slices = len({getattr(device, "slice_index", 0) for device in flat})
        # A program over several slices is compiled once for each; slices lie along the outermost axis.
        local = num_partitions < len(flat) and num_partitions * self.slices == len(flat)
        self.devices = num_partitions if local else len(flat)
        self._local_devices = flat[: self.devices]
        first, *rest = self.sizes.values()
        shape = (first // self.slices if local else first, *rest)
        self._coordinates = np.stack(np.unravel_index(np.arange(self.devices), shape), axis=-1)
        self._shape = shape

    def axes(self, groups: Groups) -> tuple[tuple[str, ...], bool]:
        """Axes along which the devices of a group differ, and whether the groups are those axes as a whole."""
        varying: set[int] = set()
        for group in groups:
            where = self._coordinates[list(group)]
            varying |= set(np.flatnonzero((where != where[0]).any(axis=0)).tolist())
        names = tuple(name for n, name in enumerate(self.sizes) if n in varying)
        return names, {frozenset(group) for group in groups} == self._whole(sorted(varying))

    def _whole(self, axes: list[int]) -> set[frozenset[int]]:
        positions = np.arange(self.devices).reshape(self._shape)
        last = np.moveaxis(positions, axes, range(len(self._shape) - len(axes), len(self._shape)))
        rows = last.reshape(-1, math.prod(self._shape[a] for a in axes))
        return {frozenset(row) for row in rows.tolist()}

    def crosses_slices(self, group: tuple[int, ...]) -> bool:
        """Whether the devices at these positions lie in several slices."""
        return len({getattr(self._local_devices[n], "slice_index", 0) for n in group}) > 1

    def torus_lengths(self, group: tuple[int, ...], chip: Chip) -> list[tuple[int, bool]]:
        """How many places a group has along each torus dimension it extends over, and whether these close to a ring."""
        everywhere = np.array([getattr(device, "coords", (0,)) for device in self._local_devices])
        places = everywhere[list(group)]
        found = []
        for dim in range(everywhere.shape[1]):
            length, total = len(set(places[:, dim].tolist())), len(set(everywhere[:, dim].tolist()))
            if length > 1:
                found.append((length, length == total and total % chip.wrap_multiple == 0))
        return found
