"""Finds arrays that every device holds as a whole although the mesh could cut them: arguments and activations.

Arguments are judged by their shardings. An activation is judged in the optimised program, from two signs together,
because neither is enough:

- It follows from a collective that put the rows or tokens of several devices side by side (an all-gather along an axis
  that batches are cut over, of something made from the batch). Weights are gathered too, but do not come from the
  batch; what is cut as it should be never follows from such a collective.
- Its shape still has those rows and tokens: a gather of a few numbers, of gradients or of a loop's state has not.

Rows that every device computes because the batch itself came in whole are seen at the arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding

from intttrain.layout.axes import COPY_AXES, RULES
from intttrain.planner.collectives import stands_for
from intttrain.planner.xla.flops import line_of, scope_of
from intttrain.planner.xla.groups import MeshGroups, read_groups
from intttrain.planner.xla.hlo import Computation, Instruction, Module
from intttrain.planner.xla.loops import ExecutionCounts

if TYPE_CHECKING:
    from jax.sharding import Mesh

PyTree = Any
MIN_BYTES = 2**20  # smaller arrays are not worth a line


@dataclasses.dataclass(frozen=True)
class Replicated:
    """An array, or several of one program line, of which every device holds more than its piece.

    Attributes:
      kind: "argument" or "activation".
      name: path of an argument; the named scopes of an activation.
      line: "FILE:LINE" of an activation's program line; "" for an argument.
      shape: on one device; the largest one of an activation's line.
      bytes: on one device, of that shape.
      count: arrays of this line.
      axes: mesh axes that could cut it and do not.
    """

    kind: str
    name: str
    line: str
    shape: str
    bytes: int
    count: int
    axes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self)


# --- arguments -----------------------------------------------------------------------------------------------------


def replicated_arguments(
    tree: PyTree, *, min_bytes: int = MIN_BYTES, by_design: Iterable[str] = COPY_AXES
) -> tuple[Replicated, ...]:
    """Returns the leaves that leave a mesh axis unused although one of their dims could be cut by it further.

    Args:
      tree: shapes with ``NamedSharding``s, e.g. ``train.Program.state`` or ``.batch``.
      min_bytes: smaller pieces are left out.
      by_design: axes over which copies are wanted; data parallelism keeps a copy of the parameters by definition.
    """
    wanted = frozenset(by_design)
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding):
            continue
        shard = sharding.shard_shape(leaf.shape)
        size = math.prod(shard) * leaf.dtype.itemsize
        unused = [a for a in sharding.mesh.shape if a not in _used_axes(sharding) and a not in wanted]
        axes = tuple(str(a) for a in unused if _cuts(shard, sharding.mesh.shape[a]))
        if axes and size >= min_bytes:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            shape = f"{leaf.dtype.name}[{','.join(map(str, shard))}]"
            found.append(Replicated("argument", name, "", shape, size, 1, axes))
    return tuple(sorted(found, key=lambda r: -r.bytes))


def _used_axes(sharding: NamedSharding) -> set[str]:
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec)
    return {axis for entry in entries for axis in entry if axis is not None}


def _cuts(shard: tuple[int, ...], pieces: int) -> bool:
    return pieces > 1 and any(size >= pieces and size % pieces == 0 for size in shard)


# --- activations ---------------------------------------------------------------------------------------------------

# What a value is made from, as bits: the batch; rows, and tokens, of several devices put side by side.
_NOTHING, _OWN, _ROWS, _TOKENS = 0, 1, 2, 4
Mark = int | tuple[Any, ...]  # or of the parts of a tuple


def replicated_activations(
    module: Module,
    counts: ExecutionCounts,
    mesh: Mesh,
    *,
    rows: int,
    tokens: int,
    min_bytes: int = MIN_BYTES,
    batch_argument: str = "batch",
    tokens_gathered_in: Iterable[str] = ("attention",),
    folder: str | None = None,
) -> tuple[Replicated, ...]:
    """Returns the program lines that make activations of more rows or tokens than a device's own, largest first.

    Args:
      module: an optimised module.
      counts: from ``execution_counts``; computations that never run are left out.
      mesh: that it was compiled for.
      rows: global rows of a microbatch.
      tokens: tokens of a row.
      min_bytes: smaller arrays are left out.
      batch_argument: name of the step's argument that holds the batch.
      tokens_gathered_in: named scopes where the tokens of a row may come together: attention needs them all.
      folder: lines are given to the innermost frame inside this folder where there is one.
    """
    allowed = tuple(tokens_gathered_in)
    marks = _Marks(module, mesh, batch_argument, allowed, min_bytes)
    marks.run()
    shapes = _GlobalShapes(mesh, rows, tokens)
    lines: dict[tuple[str, str], list[tuple[Instruction, tuple[str, ...]]]] = {}
    for computation in marks.executed():
        for at in computation.instructions if counts[computation.name] else ():
            if at.opcode in _NOT_MADE or at.shape.is_tuple or at.shape.bytes < min_bytes:
                continue
            axes = shapes.axes(at.shape.dims, marks.of(at) & (_ROWS if _is_in(at, allowed) else _ROWS | _TOKENS))
            if axes:
                lines.setdefault((line_of(at, folder), scope_of(at.op_name)), []).append((at, axes))
    found = []
    for (line, scope), made in lines.items():
        largest, axes = max(made, key=lambda pair: pair[0].shape.bytes)
        shape = largest.shape
        found.append(Replicated("activation", scope, line, str(shape), shape.bytes, len(made), axes))
    return tuple(sorted(found, key=lambda r: -r.bytes))


_NOT_MADE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"})


class _GlobalShapes:
    """Recognises dims that hold the rows or tokens of several devices."""

    def __init__(self, mesh: Mesh, rows: int, tokens: int) -> None:
        self._batch = tuple(a for a in RULES["batch"] if mesh.shape[a] > 1)
        self._context = tuple(a for a in RULES["tokens"] if mesh.shape[a] > 1)
        self._rows = self._sizes(mesh, self._batch, rows)
        self._tokens = self._sizes(mesh, self._context, tokens)

    @staticmethod
    def _sizes(mesh: Mesh, axes: tuple[str, ...], total: int) -> dict[tuple[str, ...], int]:
        """Lengths of a dim that is left whole over some of the axes that could cut it."""
        own = total // math.prod(mesh.shape[a] for a in axes)
        subsets = itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1))
        return {subset: own * math.prod(mesh.shape[a] for a in subset) for subset in subsets}

    def axes(self, dims: tuple[int, ...], gathered: int) -> tuple[str, ...]:
        """Axes that do not cut these dims although they hold rows and tokens; () where each is cut.

        Of the axes of rows and of tokens, those alone count whose bit is set in ``gathered``.
        """
        best: tuple[str, ...] = ()
        own_tokens = self._tokens[()]
        for (row_axes, rows), (token_axes, tokens) in itertools.product(self._rows.items(), self._tokens.items()):
            counted = (not row_axes or gathered & _ROWS) and (not token_axes or gathered & _TOKENS)
            axes = (*row_axes, *token_axes) if counted else ()
            # In one dim, in one each, or piece behind piece as a gather over both leaves them.
            pieces = rows * (tokens // own_tokens)
            whole = rows * tokens in dims or _contains(dims, rows, tokens) or _contains(dims, pieces, own_tokens)
            if whole and len(axes) > len(best):
                best = axes
        return best


def _contains(dims: tuple[int, ...], rows: int, tokens: int) -> bool:
    rest = list(dims)
    for size in (tokens, rows):
        if size == 1:
            continue
        if size not in rest:
            return False
        rest.remove(size)
    return True


class _Marks:
    """Follows through the program what every value is made from."""

    def __init__(
        self, module: Module, mesh: Mesh, batch_argument: str, tokens_gathered_in: tuple[str, ...], min_bytes: int
    ) -> None:
        self._module = module
        self._groups = MeshGroups(mesh, module.num_partitions)
        self._batch_argument = batch_argument
        self._tokens_gathered_in = tokens_gathered_in
        self._min_bytes = min_bytes
        self._parameters: dict[str, list[Mark]] = {}
        self._marks: dict[str, Mark] = {}
        self._executed: dict[str, Computation] = {}
        self._fusions: dict[str, list[Instruction]] = {}  # by channel: fusions with a collective in their body
        self._bodies: dict[str, list[str]] = {}
        for at in module.instructions():
            for name in at.called if at.opcode == "fusion" else ():
                for channel in {_channel(i) for i in module.computations[name].instructions} - {""}:
                    self._fusions.setdefault(channel, []).append(at)
                    self._bodies.setdefault(channel, []).append(name)

    def executed(self) -> Iterable[Computation]:
        """Computations whose instructions leave their results in memory: not the bodies of fusions."""
        return self._executed.values()

    def of(self, at: Instruction) -> int:
        """The bits of an instruction of an executed computation."""
        return _bits(self._marks.get(at.name, _NOTHING))

    def run(self) -> None:
        """Marks the whole program."""
        entry = self._module.entry
        arguments = [_OWN if self._is_batch(p) else _NOTHING for p in entry.parameters]
        self._computation(
            entry, [_like(p, mark) for p, mark in zip(entry.parameters, arguments, strict=True)], keep=True
        )

    def _is_batch(self, parameter: Instruction) -> bool:
        name = parameter.op_name
        return name.startswith(self._batch_argument) and name[len(self._batch_argument) :][:1] in ("", ".", "[")

    def _computation(self, computation: Computation, arguments: list[Mark], *, keep: bool) -> Mark:
        """Marks of a computation's result; keeps those of its instructions if their results lie in memory."""
        known: dict[str, Mark] = {}
        for at in computation.instructions:
            known[at.name] = self._instruction(computation, at, known, arguments, keep=keep)
        if keep:
            self._executed[computation.name] = computation
            for name, mark in known.items():
                self._marks[name] = _joined(self._marks.get(name, _NOTHING), mark)
        return known[computation.root.name]

    def _instruction(
        self, computation: Computation, at: Instruction, known: Mapping[str, Mark], arguments: list[Mark], *, keep: bool
    ) -> Mark:
        operands = [known[name] for name in at.operands]
        if at.opcode == "parameter":
            return arguments[int(at.argument)]
        if at.opcode == "tuple":
            return tuple(operands)
        if at.opcode == "get-tuple-element":
            value = operands[0]
            return value[int(at.attributes["index"])] if isinstance(value, tuple) else value
        if at.opcode == "while":
            return self._loop(at, operands[0], keep=keep)
        if at.opcode in ("fusion", "call", "async-start") and at.called:
            callee = self._module.computations[at.called[0]]
            inside = self._computation(callee, operands, keep=keep and at.opcode != "fusion")
            return inside if at.opcode != "async-start" else _like(at, _bits(inside))
        if at.opcode == "conditional":
            branches = [self._module.computations[name] for name in at.called]
            marks = [self._computation(b, [o], keep=keep) for b, o in zip(branches, operands[1:], strict=True)]
            return _all_joined(marks)
        if at.opcode in _SAME:
            return operands[0]
        mark = functools.reduce(operator.or_, map(_bits, operands), _NOTHING)
        return _like(at, mark | self._gathers(computation, at) if mark else mark)

    def _loop(self, at: Instruction, start: Mark, *, keep: bool) -> Mark:
        """Marks of a loop's state, repeated until one more trip changes nothing."""
        body = self._module.computations[at.callee("body")]
        state = start
        while True:
            following = _joined(state, self._computation(body, [state], keep=keep))
            if following == state:
                return state
            state = following

    def _gathers(self, computation: Computation, at: Instruction) -> int:
        """Bits for what a collective puts side by side although every device has its own part of it.

        A number per token, such as the document it belongs to, may be known to all devices of a row.
        """
        kind = at.opcode.removesuffix("-start")
        if kind == "all-reduce" and stands_for(self._module, computation, at) != "all-gather":
            return _NOTHING
        if kind not in ("all-gather", "all-reduce"):
            return _NOTHING
        axes, _ = self._groups.axes(read_groups(at.attribute_text, self._groups.devices))
        rows = _ROWS if set(axes) & set(RULES["batch"]) else _NOTHING
        # The partitioner may give its collective the name of what comes before; then the readers tell.
        near = (at, *self._readers(computation, at))
        free = at.shape.bytes < self._min_bytes or any(_is_in(i, self._tokens_gathered_in) for i in near)
        return rows | (_TOKENS if set(axes) & set(RULES["tokens"]) and not free else _NOTHING)

    def _readers(self, computation: Computation, at: Instruction) -> Iterator[Instruction]:
        """What reads a collective's result, also behind copies and other parts of an asynchronous one."""
        channel = _channel(at)
        fused = [c for c in self._fusions.get(channel, ()) if computation.name in self._bodies.get(channel, ())]
        waiting = [(computation, at.name), *((self._module.computations[c.computation], c.name) for c in fused)]
        seen = {name for _, name in waiting}
        while waiting:
            where, name = waiting.pop()
            for reader in where.instructions:
                if name in reader.operands and reader.name not in seen:
                    seen.add(reader.name)
                    yield reader
                    unnamed = not reader.op_name or reader.op_name.endswith("/sharding_constraint")
                    if unnamed or reader.opcode in _MOVES:
                        waiting.append((where, reader.name))


def _channel(at: Instruction) -> str:
    found = re.search(r"\bchannel_id=(\d+)", at.attribute_text)
    return found.group(1) if found else ""


_MOVES = frozenset({"bitcast", "copy", "copy-start", "copy-done", "get-tuple-element", "transpose", "convert"})
_SAME = frozenset({"bitcast", "copy", "opt-barrier", "optimization-barrier", "domain"})


def _is_in(at: Instruction, scopes: tuple[str, ...]) -> bool:
    return any(scope in at.op_name for scope in scopes)


def _bits(mark: Mark) -> int:
    return mark if isinstance(mark, int) else functools.reduce(operator.or_, map(_bits, mark), _NOTHING)


def _like(at: Instruction, mark: int) -> Mark:
    """A mark for every part of an instruction's result."""

    def part(shape: Any) -> Mark:
        return tuple(part(s) for s in shape.elements) if shape.is_tuple else mark

    return part(at.shape)


def _joined(a: Mark, b: Mark) -> Mark:
    if isinstance(a, int) and isinstance(b, int):
        return a | b
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(_joined(x, y) for x, y in zip(a, b, strict=True))
    whole, parts = (a, b) if isinstance(a, int) else (b, a)
    assert isinstance(whole, int)
    assert isinstance(parts, tuple)
    return tuple(_joined(whole, p) for p in parts)


def _all_joined(marks: list[Mark]) -> Mark:
    return functools.reduce(_joined, marks)
