"""Communication of a step: every collective of an optimised module, its mesh axes, bytes, and a predicted time.

Bytes are what one device sends (and receives) in a bandwidth-optimal ring over its group of n devices, from the bytes
``b`` that it puts in, without padding:

    all-gather          b (n - 1)            each shard travels to all others
    reduce-scatter      b (n - 1) / n
    all-reduce          2 b (n - 1) / n      a reduce-scatter, then an all-gather
    all-to-all          b (n - 1) / n        ragged ones: the same, an upper bound
    collective-permute  b                    also broadcasts

The predicted time is a model, not a measurement and not the compiler's estimate (it has none): bytes divided by the
bandwidth of the links that a group can use. A group that varies along k dimensions of the torus has k links, 2 k
where it covers whole dimensions that close to a ring; a permute has one. An all-to-all travels several links: its
bytes count a quarter of each length it covers if that closes to a ring, else a third. Between slices the
data-center network takes the place of the links. Latency, and other traffic on the same links, are left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from intttrain.layout.axes import SLICES_AXIS
from intttrain.layout.hardware import CHIPS, Chip
from intttrain.planner.xla.flops import line_of, scope_of
from intttrain.planner.xla.groups import MeshGroups, read_groups
from intttrain.planner.xla.hlo import Computation, Instruction, Module
from intttrain.planner.xla.loops import ExecutionCounts

if TYPE_CHECKING:
    import jax

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program, executed ``executions`` times in a step on every device.

    Attributes:
      name: of the instruction.
      kind: one of ``KINDS``.
      stands_for: "all-gather" or "reduce-scatter" where the compiler wrote an all-reduce of zero-padded or later
        sliced arrays in its place, which moves twice the bytes; else "".
      axes: mesh axes along which a group extends, outermost first.
      whole_axes: whether the groups are exactly those axes, not parts of them.
      group_size: devices that take part in one group.
      shape: what one device puts in.
      bytes: moved per device and execution; see the module.
      executions: per step.
      overlapped: whether it runs beside other work, by the compiler's schedule.
      crosses_slices: whether it uses the data-center network.
      seconds: predicted for one execution; None on devices without known links.
      line: "FILE:LINE" of the program.
      scope: pass and named scopes, as given by ``flops.scope_of``.
    """

    name: str
    kind: str
    stands_for: str
    axes: tuple[str, ...]
    whole_axes: bool
    group_size: int
    shape: str
    bytes: int
    executions: int
    overlapped: bool
    crosses_slices: bool
    seconds: float | None
    line: str
    scope: str

    @property
    def total_bytes(self) -> int:
        """Bytes per device and step."""
        return self.bytes * self.executions

    @property
    def total_seconds(self) -> float | None:
        """Predicted seconds per step."""
        return None if self.seconds is None else self.seconds * self.executions

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, totals included."""
        return dataclasses.asdict(self) | {"total_bytes": self.total_bytes, "total_seconds": self.total_seconds}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Sums over collectives of a kind along the same axes; predicted seconds per step, 0.0 where unknown."""

    kind: str
    axes: tuple[str, ...]
    executions: int
    bytes: int
    synchronous_seconds: float
    overlapped_seconds: float
    crosses_slices: bool


def read_collectives(
    module: Module, counts: ExecutionCounts, mesh: jax.sharding.Mesh, *, folder: str | None = None
) -> tuple[Collective, ...]:
    """Returns the collectives of groups with more than one device, the most bytes per step first.

    Args:
      module: an optimised module.
      counts: from ``execution_counts``.
      mesh: that the program was compiled for; position i of ``mesh.devices.flat`` is device i of the text.
      folder: lines are given to the innermost frame inside this folder where there is one.
    """
    reader = _Reader(module, mesh, folder)
    found = []
    for computation in module.computations.values():
        for instruction in computation.instructions if counts[computation.name] else ():
            collective = reader.read(computation, instruction, counts[computation.name])
            if collective is not None and collective.group_size > 1:
                found.append(collective)
    return tuple(sorted(found, key=lambda c: -c.total_bytes))


def sum_traffic(collectives: tuple[Collective, ...]) -> tuple[Traffic, ...]:
    """Adds collectives up by kind and axes, the most bytes first."""
    rows: dict[tuple[str, tuple[str, ...], bool], list[Collective]] = defaultdict(list)
    for collective in collectives:
        rows[collective.kind, collective.axes, collective.crosses_slices].append(collective)
    sums = (
        Traffic(
            kind=kind,
            axes=axes,
            executions=sum(c.executions for c in row),
            bytes=sum(c.total_bytes for c in row),
            synchronous_seconds=sum((c.total_seconds or 0.0 for c in row if not c.overlapped), 0.0),
            overlapped_seconds=sum((c.total_seconds or 0.0 for c in row if c.overlapped), 0.0),
            crosses_slices=crosses,
        )
        for (kind, axes, crosses), row in rows.items()
    )
    return tuple(sorted(sums, key=lambda t: -t.bytes))


# --- reading -------------------------------------------------------------------------------------------------------


def moved_bytes(kind: str, own_bytes: int, devices: int) -> int:
    """Bytes that a device sends in one collective, by the table of the module.

    Args:
      kind: one of ``KINDS``.
      own_bytes: bytes of all operands on one device.
      devices: size of its group.
    """
    if devices <= 1:
        return 0
    if kind == "all-gather":
        return own_bytes * (devices - 1)
    if kind == "all-reduce":
        return 2 * own_bytes * (devices - 1) // devices
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return own_bytes * (devices - 1) // devices
    return own_bytes


class _Reader:
    """Reads one collective after the other; remembers which pieces of a fused asynchronous one it has met."""

    def __init__(self, module: Module, mesh: jax.sharding.Mesh, folder: str | None) -> None:
        self._module = module
        self._folder = folder
        self._groups = MeshGroups(mesh, module.num_partitions)
        self._chip = next((c for c in CHIPS.values() if c.device_kind == mesh.devices.flat[0].device_kind), None)
        self._callers: dict[str, Instruction] = {}
        for instruction in module.instructions():
            if instruction.opcode == "fusion" or instruction.opcode.endswith("-start"):
                self._callers.update(dict.fromkeys(instruction.called, instruction))
        self._met: set[tuple[str, str, str]] = set()

    def read(self, computation: Computation, at: Instruction, executions: int) -> Collective | None:
        """The collective that begins with this instruction, if any."""
        if at.opcode == "send" and (found := _MEGASCALE.search(at.attribute_text)):
            return self._between_slices(at, found.group(1).lower().replace("_", "-"), executions)
        kind = at.opcode.removesuffix("-start")
        if kind not in KINDS:
            return None
        caller = self._callers.get(computation.name)
        asynchronous = at.opcode.endswith("-start")
        own_bytes = sum(computation[name].shape.bytes for name in _payload(at, kind))
        devices, axes, whole, positions = self._group(at, kind)
        if caller is not None and caller.opcode == "fusion":
            if self._repeated(at, kind, caller):
                return None
            asynchronous = self._is_spread(at, kind, caller)
            if kind == "all-reduce" and any(i.opcode == "dynamic-slice" for i in computation.instructions):
                kind, own_bytes = "reduce-scatter", caller.shape.bytes * devices
        elif caller is not None:
            asynchronous = True
        moved = moved_bytes(kind, own_bytes, devices)
        named = at if at.frames or caller is None else caller
        return Collective(
            name=at.name,
            kind=kind,
            stands_for=stands_for(self._module, computation, at) if kind == "all-reduce" else "",
            axes=axes,
            whole_axes=whole,
            group_size=devices,
            shape=", ".join(str(computation[name].shape) for name in _payload(at, kind)),
            bytes=moved,
            executions=executions,
            overlapped=asynchronous,
            crosses_slices=self._groups.crosses_slices(positions),
            seconds=None if self._chip is None else self._seconds(self._chip, kind, moved, positions),
            line=line_of(named, self._folder),
            scope=scope_of(named.op_name),
        )

    def _group(self, at: Instruction, kind: str) -> tuple[int, tuple[str, ...], bool, tuple[int, ...]]:
        """Devices of a group, its axes, whether it covers them, and the positions of the largest group."""
        groups = read_groups(at.attribute_text, self._groups.devices)
        axes, whole = self._groups.axes(groups)
        largest = max(groups, key=len)
        devices = len(largest)
        if kind == "collective-permute":
            moving = [pair for pair in groups if pair[0] != pair[1]]
            devices, largest = (2, moving[0]) if moving else (1, largest)
        return devices, axes, whole, largest

    def _repeated(self, at: Instruction, kind: str, caller: Instruction) -> bool:
        """Whether another fusion of the same asynchronous collective was met already: all hold a copy of it."""
        channel = _CHANNEL.search(at.attribute_text)
        if channel is None:
            return False
        key = (kind, channel.group(1), caller.computation)
        known = key in self._met
        self._met.add(key)
        return known

    def _is_spread(self, at: Instruction, kind: str, caller: Instruction) -> bool:
        """Whether a collective in a fusion begins here and ends in another fusion."""
        if caller.name.startswith("async-collective"):
            return True
        channel = _CHANNEL.search(at.attribute_text)
        same = rf"\bchannel_id={channel.group(1)}\b" if channel else r"(?!)"
        return any(
            name != at.computation and user.computation == caller.computation and self._holds(name, kind, same)
            for name, user in self._callers.items()
        )

    def _holds(self, name: str, kind: str, pattern: str) -> bool:
        return any(
            i.opcode == kind and re.search(pattern, i.attribute_text)
            for i in self._module.computations[name].instructions
        )

    # --- time

    def _seconds(self, chip: Chip, kind: str, moved: int, positions: tuple[int, ...]) -> float:
        if self._groups.crosses_slices(positions):
            return moved / (chip.dcn_bytes_per_second / chip.devices)
        lengths = self._groups.torus_lengths(positions, chip)
        if kind == "collective-permute" or not lengths:
            return moved / chip.link_bytes_per_second
        links = sum(2 if rings else 1 for _, rings in lengths)
        hops = 1.0
        if kind in ("all-to-all", "ragged-all-to-all"):
            hops = max(1.0, sum(length / (4 if rings else 3) for length, rings in lengths))
        return hops * moved / (links * chip.link_bytes_per_second)

    def _between_slices(self, at: Instruction, kind: str, executions: int) -> Collective:
        """A transfer that libtpu hands to the data-center network: an all-reduce of the slices is a send and a recv."""
        own_bytes = at.shape.elements[0].bytes
        slices = self._groups.slices
        moved = moved_bytes(kind, own_bytes, slices)
        return Collective(
            name=at.name,
            kind=kind,
            stands_for="",
            axes=(SLICES_AXIS,),
            whole_axes=slices == self._groups.sizes.get(SLICES_AXIS, 1),
            group_size=slices,
            shape=str(at.shape.elements[0]),
            bytes=moved,
            executions=executions,
            overlapped=True,
            crosses_slices=True,
            seconds=moved / (self._chip.dcn_bytes_per_second / self._chip.devices) if self._chip else None,
            line=line_of(at, self._folder),
            scope=scope_of(at.op_name),
        )


def _payload(at: Instruction, kind: str) -> tuple[str, ...]:
    """The operands that travel; the others of a permute or a ragged all-to-all are where it writes, and sizes."""
    return at.operands[:1] if kind in ("collective-permute", "ragged-all-to-all") else at.operands


# --- all-reduces in the place of something cheaper -----------------------------------------------------------------


def stands_for(module: Module, computation: Computation, at: Instruction) -> str:
    """What a synchronous all-reduce is used for: "all-gather", "reduce-scatter", or "" for a sum that all need."""
    if at.opcode != "all-reduce":
        return ""
    if all(_is_padded(module, computation, name) for name in at.operands):
        return "all-gather"
    return "reduce-scatter" if _only_sliced(module, computation, at.name) else ""


def _is_padded(module: Module, computation: Computation, name: str) -> bool:
    """Whether an array is one piece written into a constant: a device's own part among zeros."""
    at = computation[name]
    if at.opcode == "dynamic-update-slice":
        return _is_constant(module, computation, at.operands[0])
    if at.opcode != "fusion":
        return False
    body = module.computations[at.called[0]]
    if body.root.opcode != "dynamic-update-slice":
        return False
    base = body[body.root.operands[0]]
    if base.opcode == "parameter":
        return _is_constant(module, computation, at.operands[int(base.argument)])
    return _is_constant(module, body, base.name)


def _is_constant(module: Module, computation: Computation, name: str) -> bool:
    at = computation[name]
    if at.opcode == "fusion":
        body = module.computations[at.called[0]]
        return _is_constant(module, body, body.root.name)
    if at.opcode == "broadcast":
        return computation[at.operands[0]].opcode == "constant"
    return at.opcode == "constant"


def _only_sliced(module: Module, computation: Computation, name: str) -> bool:
    """Whether all that reads an array takes a part of it."""
    users = [i for i in computation.instructions if name in i.operands]
    return bool(users) and all(_takes_part(module, computation, user, name) for user in users)


def _takes_part(module: Module, computation: Computation, user: Instruction, name: str) -> bool:
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name
    if user.opcode in ("bitcast", "get-tuple-element", "reshape"):
        return _only_sliced(module, computation, user.name)
    if user.opcode != "fusion":
        return False
    body = module.computations[user.called[0]]
    inside = [p.name for p, operand in zip(body.parameters, user.operands, strict=False) if operand == name]
    return bool(inside) and all(_only_sliced(module, body, parameter) for parameter in inside)
