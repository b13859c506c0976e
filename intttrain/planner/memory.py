"""Memory of one device in a step: what the compiler says, what it is made of, whether it fits, and what to change.

Every number is of one device. The compiler's own peak decides; the arrays behind it are an estimate (``liveness``)
that stands beside it, so a reader sees how far the two agree.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import jax

from intttrain.config import Config
from intttrain.layout.hardware import GIB, Chip
from intttrain.planner.xla.flops import line_of, scope_of
from intttrain.planner.xla.hlo import Instruction, Module
from intttrain.planner.xla.liveness import Buffer, estimate_peak

PyTree = Any
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class LineBuffers:
    """Temporary arrays of one program line that are alive at the estimated peak.

    Attributes:
      line: "FILE:LINE"; "" if unknown.
      scope: pass and named scopes, as given by ``flops.scope_of``.
      bytes: all of them together.
      count: how many.
      shapes: the different ones, the largest first.
    """

    line: str
    scope: str
    bytes: int
    count: int
    shapes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes in the memory of one device.

    Attributes:
      peak: the most that is in use at one time, everything included, as the compiler says; at most all its space.
      arguments, outputs, aliased: of the program; ``aliased`` bytes of the outputs lie in arguments.
      temporaries: the compiler's space for everything else, unused gaps included.
      generated_code: the program itself.
      parameters, optimizer, batch, other_arguments: what the arguments are, by their shardings, without padding;
        ``other_arguments`` is the rest of ``arguments``, padding included.
      gradients: fp32 gradients of all parameters at their shardings; how much of it exists at once is up to the
        compiler.
      host: arguments, outputs and temporaries in the memory of the host.
      estimated_peak: ``peak`` as it follows from the schedule; None where the text has no schedule.
      largest: temporary arrays at the estimated peak by program line, the largest first.
    """

    peak: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    generated_code: int
    parameters: int
    optimizer: int
    batch: int
    other_arguments: int
    gradients: int
    host: int
    estimated_peak: int | None
    largest: tuple[LineBuffers, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self)


def read_memory(
    compiled: Any, module: Module, *, state: PyTree = None, batch: PyTree = None, folder: str | None = None
) -> Memory:
    """Reads the memory of a compiled step.

    Args:
      compiled: ``jax.stages.Compiled``.
      module: its text, parsed.
      state: shapes with shardings as in ``train.Program.state``, with the parts ``params`` and ``opt_state``; without
        it all arguments are ``other_arguments``.
      batch: the same of a batch.
      folder: lines are given to the innermost frame inside this folder where there is one.
    """
    said = compiled.memory_analysis()
    arguments, outputs = said.argument_size_in_bytes, said.output_size_in_bytes
    aliased = said.alias_size_in_bytes
    parameters = shard_bytes(state["params"]) if state is not None else 0
    optimizer = shard_bytes(state["opt_state"]) if state is not None else 0
    batch_bytes = shard_bytes(batch)
    estimate = estimate_peak(module) if module.is_scheduled else None
    static, space = arguments + outputs - aliased, said.temp_size_in_bytes
    return Memory(
        # Where the compiler places arrays on the chip (v5e, v6e), its peak counts these too.
        peak=min(said.peak_memory_in_bytes or static + space, static + space),
        arguments=arguments,
        outputs=outputs,
        aliased=aliased,
        temporaries=space,
        generated_code=said.generated_code_size_in_bytes,
        parameters=parameters,
        optimizer=optimizer,
        batch=batch_bytes,
        other_arguments=arguments - parameters - optimizer - batch_bytes,
        gradients=shard_bytes(state["params"], itemsize=4) if state is not None else 0,
        host=said.host_argument_size_in_bytes
        + said.host_output_size_in_bytes
        - said.host_alias_size_in_bytes
        + said.host_temp_size_in_bytes,
        estimated_peak=static + estimate.bytes if estimate else None,
        largest=_by_line(module, estimate.buffers, folder) if estimate else (),
    )


def shard_bytes(tree: PyTree, itemsize: int | None = None) -> int:
    """Bytes of the pieces that one device holds of a tree of shapes; a leaf without a sharding counts as a whole.

    Args:
      tree: leaves with ``shape``, ``dtype`` and, mostly, ``sharding``.
      itemsize: bytes of an element, if not that of the leaf's own dtype.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = leaf.sharding
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * (leaf.dtype.itemsize if itemsize is None else itemsize)
    return total


# --- the arrays at the peak ----------------------------------------------------------------------------------------


def _by_line(module: Module, buffers: Iterable[Buffer], folder: str | None) -> tuple[LineBuffers, ...]:
    rows: dict[tuple[str, str], list[Buffer]] = defaultdict(list)
    for buffer in buffers:
        source = _named(module, buffer.instruction)
        rows[line_of(source, folder), scope_of(source.op_name)].append(buffer)
    grouped = (
        LineBuffers(
            line=line,
            scope=scope,
            bytes=sum(b.bytes for b in row),
            count=len(row),
            shapes=tuple(dict.fromkeys(str(b.shape) for b in sorted(row, key=lambda b: -b.bytes))),
        )
        for (line, scope), row in rows.items()
    )
    return tuple(sorted(grouped, key=lambda g: -g.bytes))


def _named(module: Module, instruction: Instruction) -> Instruction:
    """The instruction, or the first one with a known line that uses its result, also inside of loops.

    The stack of a scan's outputs is allocated ahead of the loop, by an instruction without a line.
    """
    waiting, seen = [instruction], {instruction.name}
    while waiting:
        at = waiting.pop(0)
        if at.frames:
            return at
        for follower in _followers(module, at):
            if follower.name not in seen:
                seen.add(follower.name)
                waiting.append(follower)
    return instruction


def _followers(module: Module, at: Instruction) -> list[Instruction]:
    """Users of a result; of a tuple that enters a loop, only what reads the element that ``at`` put there."""
    computation = module.computations[at.computation]
    found: list[Instruction] = []
    for user in computation.instructions:
        if at.name not in user.operands:
            continue
        if user.opcode != "tuple":
            found.append(user)
            continue
        index = str(user.operands.index(at.name))
        loops = [i for i in computation.instructions if i.opcode == "while" and user.name in i.operands]
        for body in (module.computations[loop.callee("body")] for loop in loops):
            found += [i for i in body.instructions if _reads(i, index) and body[i.operands[0]].opcode == "parameter"]
    return found


def _reads(at: Instruction, index: str) -> bool:
    return at.opcode == "get-tuple-element" and at.attributes["index"] == index


# --- does it fit ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a step fits into a device.

    Attributes:
      fits: with the reserve left free.
      needed, available: bytes; ``available`` is what the chip has for a program, less the reserve.
      text: one line for a reader.
      suggestions: changes of the configuration that would make it smaller, the cheapest first; () where it fits.
    """

    fits: bool
    needed: int
    available: int
    text: str
    suggestions: tuple[str, ...]


def verdict(needed: int, chip: Chip, config: Config, *, batch_pieces: int, reserve: float = 0.0) -> Verdict:
    """Compares a peak with the memory of a device.

    Args:
      needed: bytes: ``Memory.peak``, or ``Refusal.needed``.
      chip: of the device.
      config: the suggestions are changes of it.
      batch_pieces: devices that a microbatch's rows are cut over (``data`` x ``fsdp``).
      reserve: fraction of the device that is to stay free.
    """
    available = int(chip.device_hbm_bytes * (1 - reserve))
    spare = available - needed
    kept = f" with {reserve:.0%} kept free" if reserve else ""
    share = f"{needed / GIB:.2f} of {available / GIB:.2f} GiB of a {chip.name} device{kept}"
    if spare >= 0:
        text = f"fits with {spare / GIB:.2f} GiB to spare ({spare / available:.0%}): {share}"
        return Verdict(True, needed, available, text, ())
    suggestions = smaller_steps(config, batch_pieces)
    text = f"does not fit by {-spare / GIB:.2f} GiB: {share}; try {', or '.join(suggestions)}"
    return Verdict(False, needed, available, text, suggestions)


def smaller_steps(config: Config, batch_pieces: int) -> tuple[str, ...]:
    """Changes of a configuration that make a step smaller, the one that costs least time first."""
    found: list[str] = []
    model, train, mesh = config.model, config.train, config.mesh
    more = [
        pieces
        for pieces in range(train.microbatches + 1, train.batch_rows // batch_pieces + 1)
        if train.batch_rows % (pieces * batch_pieces) == 0
    ]
    if more:
        found.append(f"train.microbatches={more[0]} (now {train.microbatches})")
    if model.remat != "full":
        found.append(f'model.remat="full" (now {model.remat!r}; keeps the least)')
    if model.loss_chunk_tokens > 128:
        found.append(f"model.loss_chunk_tokens={model.loss_chunk_tokens // 2} (now {model.loss_chunk_tokens})")
    inner = mesh.data // mesh.slices
    if inner > 1:
        found.append(f"mesh.data={mesh.slices} and mesh.fsdp {inner} times as large")
    else:
        found.append("more devices, which mesh.fsdp=None or mesh.context=None takes")
    if not more and mesh.context is not None and mesh.context < config.data.seq_len:
        found.append(f"mesh.context={mesh.context * 2} (now {mesh.context}; a row over more devices)")
    return tuple(found)


# --- a program that the compiler refuses ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Allocation:
    """An array that a refusal names; ``line`` and ``op_name`` are "" where it does not say."""

    bytes: int
    shape: str
    op_name: str
    line: str


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A program that libtpu did not compile because it is too large for the device.

    Attributes:
      needed, available: bytes, to the digits of the message.
      largest: the arrays that the message names; recent versions of libtpu name none.
    """

    needed: int
    available: int
    largest: tuple[Allocation, ...]


_TEMPORARIES = re.compile(r"total memory required for .*? \(([\d.]+\w?)\) exceeds available \w+ \(([\d.]+\w?)\)")
_USED = re.compile(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm", re.IGNORECASE)
_ALLOCATION = re.compile(r"^\s*\d+\. Size: ", re.MULTILINE)
_OPERATOR = re.compile(r'op_name="([^"]*)"')
_SOURCE = re.compile(r'source_file="([^"]*)"(?:\s+source_line=(\d+))?')
_SHAPE = re.compile(r"Shape: (\w+\[[\d,]*\])")


def read_refusal(error: BaseException) -> Refusal | None:
    """Reads the error of a compilation that ran out of device memory; None for any other error."""
    message = str(error)
    found = _TEMPORARIES.search(message) or _USED.search(message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    needed, available = (_bytes(text) for text in found.groups())
    return Refusal(needed, available, tuple(_allocation(text) for text in _ALLOCATION.split(message)[1:]))


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([A-Z]?)", text.upper()).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit])


def _allocation(text: str) -> Allocation:
    size = re.match(r"[\d.]+\w?", text)
    shape, op_name, source = _SHAPE.search(text), _OPERATOR.search(text), _SOURCE.search(text)
    return Allocation(
        bytes=_bytes(size.group(0)) if size else 0,
        shape=shape.group(1) if shape else "",
        op_name=op_name.group(1) if op_name else "",
        line=f"{source.group(1)}:{source.group(2) or 0}" if source else "",
    )
