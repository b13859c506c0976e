"""Estimates which arrays are in a device's main memory at the same time, from the schedule in an optimised module.

The compiler states a peak but not what makes it up, so its buffers are traced again here: an array lives from the
instruction that makes it to the last one that reads it. No new memory is taken by tuples, bitcasts, loop state (a
body writes what it returns into the loop's own arrays), outputs that the compiler says share an operand, and
elementwise results and updates in place that follow an array which ends there. Inside a loop the arrays of the body
come on top of those that live across it. Padding and alignment between buffers are not known, so the sum is an
estimate; ``memory.Memory`` shows it beside the compiler's number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from intttrain.planner.xla.hlo import Computation, Instruction, Module, read_aliases
from intttrain.planner.xla.shapes import Shape

MAIN, HOST = 0, 5  # memory spaces; the others are on the chip: VMEM, SMEM, semaphores

_SAME_VALUE = frozenset({"bitcast", "opt-barrier", "optimization-barrier", "domain", "add-dependency"})
_NO_READ = _SAME_VALUE | {"tuple", "get-tuple-element", "parameter", "constant"}
# Results that may take the place of an operand of the same size which nothing reads any more.
_IN_PLACE = frozenset(
    {"dynamic-update-slice", "scatter", "all-reduce", "add", "subtract", "multiply", "divide", "negate", "select"}
    | {"exponential", "tanh", "maximum", "minimum", "convert", "and", "or", "not", "sqrt", "rsqrt"}
)


@dataclasses.dataclass(eq=False)
class Buffer:
    """Memory of one array.

    Attributes:
      bytes: with padding; 0 where it lives in memory that is counted elsewhere (arguments, outputs, loop state).
      host_bytes: the same in the memory of the host.
      instruction: that makes it.
      shape: of the array.
    """

    bytes: int
    host_bytes: int
    instruction: Instruction
    shape: Shape


Value = frozenset[Buffer] | tuple[Any, ...]  # the buffers behind an array, or such values of the parts of a tuple


@dataclasses.dataclass(frozen=True)
class Peak:
    """The largest sum of bytes in main memory, the arrays alive at that moment, and the largest sum on the host."""

    bytes: int
    buffers: tuple[Buffer, ...]
    host_bytes: int


def estimate_peak(module: Module) -> Peak:
    """Returns the peak of temporary arrays of a scheduled module, without its arguments and outputs.

    Raises:
      ValueError: the module is not scheduled, so the order of its instructions means nothing.
    """
    if not module.is_scheduled:
        raise ValueError(f"HLO module {module.name!r} is not scheduled: when its arrays live is unknown")
    return _Estimate(module).peak(module.entry)


def _leaves(value: Value) -> Iterator[Buffer]:
    if isinstance(value, frozenset):
        yield from value
    else:
        for part in value:
            yield from _leaves(part)


def _fresh(shape: Shape, instruction: Instruction, *, counted: bool = True) -> Value:
    """New buffers for every array of a shape; uncounted ones have no bytes."""
    if shape.is_tuple:
        return tuple(_fresh(part, instruction, counted=counted) for part in shape.elements)
    main = shape.padded_bytes if counted and shape.memory_space == MAIN else 0
    host = shape.padded_bytes if counted and shape.memory_space == HOST else 0
    return frozenset({Buffer(main, host, instruction, shape)})


def _at(value: Value, path: tuple[int, ...]) -> Value:
    for index in path:
        if isinstance(value, frozenset):
            return value
        value = value[index]
    return value


def _replaced(value: Value, path: tuple[int, ...], part: Value) -> Value:
    if not path or isinstance(value, frozenset):
        return part
    changed = _replaced(value[path[0]], path[1:], part)
    return (*value[: path[0]], changed, *value[path[0] + 1 :])


class _Estimate:
    """Peaks of computations, each found once."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._peaks: dict[str, Peak] = {}

    def peak(self, computation: Computation) -> Peak:
        """Peak of what a computation makes itself; its parameters and results belong to its caller."""
        if computation.name not in self._peaks:
            self._peaks[computation.name] = self._sweep(computation)
        return self._peaks[computation.name]

    def _sweep(self, computation: Computation) -> Peak:
        values: dict[str, Value] = {}
        last_read: dict[Buffer, int] = {}
        made: list[list[Buffer]] = []
        for index, at in enumerate(computation.instructions):
            operands = [values[name] for name in at.operands if name in values]
            known = {b for operand in operands for b in _leaves(operand)}
            values[at.name] = self._value(at, operands)
            made.append([b for b in _leaves(values[at.name]) if b not in known])
            if at.opcode not in _NO_READ:
                last_read.update(dict.fromkeys(known, index))
        for buffer in _leaves(values[computation.root.name]):  # the caller's: its outputs or its loop's state
            buffer.bytes = buffer.host_bytes = 0
        return self._highest(computation, made, last_read)

    def _highest(self, computation: Computation, made: list[list[Buffer]], last_read: dict[Buffer, int]) -> Peak:
        ending: dict[int, list[Buffer]] = {}
        for buffer, index in last_read.items():
            ending.setdefault(index, []).append(buffer)
        alive: dict[Buffer, None] = {}
        total = host = highest = highest_host = 0
        buffers: tuple[Buffer, ...] = ()
        for index, at in enumerate(computation.instructions):
            ends = [b for b in ending.get(index, []) if b in alive]
            new = [b for b in made[index] if b.bytes or b.host_bytes]
            for buffer in self._overwritten(at, new, ends):
                ends.remove(buffer)
                del alive[buffer]
                total -= buffer.bytes
            alive.update(dict.fromkeys(new))
            total += sum(b.bytes for b in new)
            host += sum(b.host_bytes for b in new)
            inside = self._inside(at)
            if total + inside.bytes > highest:
                highest, buffers = total + inside.bytes, (*(b for b in alive if b.bytes), *inside.buffers)
            highest_host = max(highest_host, host + inside.host_bytes)
            for buffer in (*ends, *(b for b in new if b not in last_read)):
                del alive[buffer]
                total -= buffer.bytes
                host -= buffer.host_bytes
        return Peak(highest, buffers, highest_host)

    def _overwritten(self, at: Instruction, new: list[Buffer], ends: list[Buffer]) -> list[Buffer]:
        """Arrays that end here and whose memory a new one of the same size takes over."""
        if at.opcode == "fusion":
            root = self._module.computations[at.called[0]].root
            allowed = "kind=kLoop" in at.attribute_text or root.opcode == "dynamic-update-slice"
        else:
            allowed = at.opcode in _IN_PLACE
        taken: list[Buffer] = []
        for buffer in new if allowed else ():
            found = next((e for e in ends if e not in taken and e.bytes and e.bytes == buffer.bytes), None)
            taken += [found] if found else []
        return taken

    def _inside(self, at: Instruction) -> Peak:
        """What the computations that an instruction runs need on top; fusions keep their parts on the chip."""
        if at.opcode not in ("while", "call", "conditional", "async-start", "call-start"):
            return Peak(0, (), 0)
        peaks = [self.peak(self._module.computations[name]) for name in at.called]
        largest = max(peaks, key=lambda p: p.bytes, default=Peak(0, (), 0))
        return dataclasses.replace(largest, host_bytes=max((p.host_bytes for p in peaks), default=0))

    # --- which buffers a result lies in

    def _value(self, at: Instruction, operands: list[Value]) -> Value:
        if at.opcode == "parameter":
            return _fresh(at.shape, at, counted=False)
        if at.opcode == "constant":
            return _fresh(at.shape, at, counted=False)  # part of the program, not of its temporaries
        if at.opcode == "tuple":
            return tuple(operands)
        if at.opcode == "get-tuple-element":
            return _at(operands[0], (int(at.attributes["index"]),))
        if at.opcode == "custom-call-update" and len(operands) > 1:  # SparseCore: it gets its operands here
            return _replaced(_shared(at, operands), (0,), tuple(operands[1:]))
        if at.opcode in _SAME_VALUE or at.opcode == "while" or at.opcode.endswith("-update"):
            return operands[0]
        if at.opcode.endswith("-start") or at.opcode in ("send", "recv"):
            return _started(at, operands)
        if at.opcode.endswith("-done"):
            return _done(at, operands[0])
        if at.opcode == "custom-call" and '"ConcatBitcast"' in at.attribute_text:
            return frozenset(b for operand in operands for b in _leaves(operand))
        return _shared(at, operands)


def _started(at: Instruction, operands: list[Value]) -> Value:
    """Result of an asynchronous start, which holds the operands beside the coming result."""
    made = _fresh(at.shape, at)
    if at.opcode == "all-reduce-start" or isinstance(made, frozenset) or at.opcode == "recv":
        return made
    if at.opcode == "copy-start":
        return _replaced(made, (1,), operands[0])
    held = tuple(operands) if at.shape.elements[0].is_tuple else operands[0]
    return _replaced(made, (0,), held)


def _done(at: Instruction, started: Value) -> Value:
    if at.opcode == "all-reduce-done" or isinstance(started, frozenset):
        return started
    if at.opcode == "send-done":
        return frozenset()
    if at.opcode == "recv-done":
        return (started[0], frozenset())
    return started[0] if at.opcode == "copy-done" else started[1]


def _shared(at: Instruction, operands: list[Value]) -> Value:
    """New buffers, but for the results that the compiler says lie in an operand."""
    made = _fresh(at.shape, at)
    if "output_to_operand_aliasing" not in at.attribute_text:
        return made
    for alias in read_aliases(at.attributes["output_to_operand_aliasing"]):
        made = _replaced(made, alias.output_index, _at(operands[alias.parameter], alias.parameter_index))
    return made
