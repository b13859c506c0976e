"""Reads the text of an optimised XLA module: computations, instructions, shapes with their layouts, source lines.

The text comes from ``jax.stages.Compiled.as_text()``. Reading is linear in its length and made for tens of megabytes:
what is rarely asked for (attributes, the backend configuration) is split when it is asked for.

Two dialects are understood. Newer compilers keep source positions in tables ahead of the computations
(``FileNames`` ... ``StackFrames``) and instructions point into them with ``stack_frame_id``; older ones write
``source_file`` and ``source_line`` into each instruction.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from intttrain.planner.xla.shapes import ARRAY, COMMENT, Shape, closing_bracket, parse_shape, split_top_level

# --- instructions --------------------------------------------------------------------------------------------------

_CALLING = (
    "condition",
    "body",
    "calls",
    "to_apply",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)
_NAME = re.compile(r"%?([\w.\-]+)")
_CYCLES = re.compile(r'\\?"estimated_cycles\\?":\\?"?([^"\\,}\s]+)')
# Of one execution; an hour of any chip. Beyond, the number is no estimate: libtpu 0.0.50 writes 2^63 - 1 for what it
# gives to a SparseCore.
MOST_CYCLES = 10**13


def possible_cycles(written: str) -> int | None:
    """Returns an estimate as a number; None for what cannot be one: negative, beyond ``MOST_CYCLES``, or no number."""
    return int(written) if written.isdecimal() and int(written) <= MOST_CYCLES else None


@dataclasses.dataclass(frozen=True)
class Frame:
    """One line of the program that made an instruction; ``line`` is 0 and ``function`` "" where unknown."""

    file: str
    line: int
    function: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction.

    Attributes:
      name: without the leading ``%``; unique in the module.
      opcode: "fusion", "while", "custom-call", "all-gather-start", ...
      shape: of the result.
      operands: names of instructions of the same computation.
      argument: what stands between the parentheses; the number of a parameter, the literal of a constant.
      computation: name of the computation that it stands in.
      is_root: whether its result is the computation's.
      attribute_text: everything after the operands, metadata and backend configuration included.
      op_name: path of named scopes and the primitive, e.g. "jit(f)/while/body/mlp/dot_general"; "" if unknown.
      frames: the program lines that made it, innermost first; empty if unknown.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    argument: str
    computation: str
    is_root: bool
    attribute_text: str
    op_name: str
    frames: tuple[Frame, ...]

    @functools.cached_property
    def attributes(self) -> Mapping[str, str]:
        """Attributes by name as raw text: ``{"index": "0", "calls": "%fused", "dimensions": "{0,1}"}``."""
        pairs = (part.partition("=") for part in split_top_level(self.attribute_text))
        return {key.strip(): value.strip() for key, _, value in pairs}

    def attribute_ints(self, key: str) -> tuple[int, ...]:
        """The integers of a list attribute: ``lhs_contracting_dims={1,2}`` is (1, 2); () where it is absent."""
        return tuple(int(n) for n in re.findall(r"-?\d+", self.attributes.get(key, "")))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, in the order condition, body, calls, to_apply, branches."""
        texts = [self.attributes[k] for k in _CALLING if k in self.attributes]
        return tuple(name for text in texts for name in _NAME.findall(text))

    def callee(self, role: str) -> str:
        """Name of the computation called as ``role`` ("condition", "body", "calls", "to_apply")."""
        return self.attributes[role].lstrip("%")

    @functools.cached_property
    def backend_config(self) -> Mapping[str, Any]:
        """The backend configuration, from JSON or from a string that holds JSON; {} if absent or anything else."""
        text = self.attributes.get("backend_config", "")
        try:
            value = json.loads(text) if text else {}
            if isinstance(value, str):
                value = json.loads(value)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @functools.cached_property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate for one execution on one device, in cycles; None without one that can be true."""
        return possible_cycles(self.written_cycles)

    @functools.cached_property
    def written_cycles(self) -> str:
        """What the compiler wrote in the place of an estimate, as it stands there; "" where it wrote nothing."""
        found = _CYCLES.search(self.attribute_text)
        return found.group(1) if found else ""

    @property
    def source(self) -> Frame | None:
        """The innermost program line that is known."""
        return self.frames[0] if self.frames else None

    def source_in(self, folder: str) -> Frame | None:
        """The innermost program line whose file lies inside ``folder``, e.g. a package's; None if there is none."""
        root = PurePath(folder)
        return next((f for f in self.frames if PurePath(f.file).is_relative_to(root)), None)


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A computation: its instructions in the order of the text, which is the schedule where there is one."""

    name: str
    instructions: tuple[Instruction, ...]
    execution_thread: str = ""

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Instructions by name."""
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Parameters, by number."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.argument)))

    def __getitem__(self, name: str) -> Instruction:
        return self.by_name[name]


@dataclasses.dataclass(frozen=True)
class Alias:
    """An output that is written into the memory of an input: of a program (a donated argument) or of an instruction.

    Indices are paths into tuples; ``parameter`` is the number of the input; ``kind`` is "may-alias" or "must-alias".
    """

    output_index: tuple[int, ...]
    parameter: int
    parameter_index: tuple[int, ...]
    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A module: its computations by name, in the order of the text (callees first), and what its header says."""

    name: str
    num_partitions: int
    is_scheduled: bool
    entry_name: str
    computations: Mapping[str, Computation]
    input_output_alias: tuple[Alias, ...]

    @property
    def entry(self) -> Computation:
        """The computation that runs first."""
        return self.computations[self.entry_name]

    def instructions(self) -> Iterator[Instruction]:
        """Every instruction of every computation."""
        for computation in self.computations.values():
            yield from computation.instructions


# --- reading -------------------------------------------------------------------------------------------------------

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_FIELD = re.compile(r"(\w+)=(\d+)")
_HEAD = re.compile(r"\s+(ROOT )?%?([^\s=%]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s({]+) (?:\(.*)?\{\s*$")
_END = re.compile(r'\}(?:, execution_thread="([^"]*)")?\s*$')  # "}}, metadata=" ends an attribute of several lines
_OPERAND = re.compile(r"%([\w.\-]+)")
_BARE_OPERAND = re.compile(r"([\w.\-]+)\s*$")
_OP_NAME = re.compile(r'op_name="([^"\\]*(?:\\.[^"\\]*)*)"')
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_SOURCE_FILE = re.compile(r'source_file="([^"]*)"')
_SOURCE_LINE = re.compile(r"source_line=(\d+)")
_ALIAS = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}(?:, ([\w\-]+))?\)")


class _Frames:
    """The tables of source positions in the header: a chain of frames, innermost first, for each ``stack_frame_id``."""

    def __init__(self, tables: Mapping[str, Mapping[int, str]]) -> None:
        fields = {t: {n: dict(_FIELD.findall(row)) for n, row in tables.get(t, {}).items()} for t in _TABLES[2:]}
        names = [{n: row.strip().strip('"') for n, row in tables.get(t, {}).items()} for t in _TABLES[:2]]
        self._locations = {
            n: Frame(
                file=names[0].get(int(f.get("file_name_id", 0)), ""),
                line=int(f.get("line", 0)),
                function=names[1].get(int(f.get("function_name_id", 0)), ""),
            )
            for n, f in fields["FileLocations"].items()
        }
        self._frames = {
            n: (int(f.get("file_location_id", 0)), int(f.get("parent_frame_id", 0)))
            for n, f in fields["StackFrames"].items()
        }
        # The first frame has no parent. Where it names itself, parents are counted from one too many.
        self._shift = 1 if self._frames.get(1, (0, 0))[1] == 1 else 0
        self._chains: dict[int, tuple[Frame, ...]] = {}

    def chain(self, frame_id: int) -> tuple[Frame, ...]:
        """The frames of ``frame_id``, innermost first; () for an unknown one."""
        if frame_id in self._chains:
            return self._chains[frame_id]
        chain, seen, at = [], set(), frame_id
        while at in self._frames and at not in seen:
            seen.add(at)
            location, parent = self._frames[at]
            if location in self._locations:
                chain.append(self._locations[location])
            at = parent - self._shift
        self._chains[frame_id] = tuple(chain)
        return self._chains[frame_id]


def _metadata(attribute_text: str, frames: _Frames) -> tuple[str, tuple[Frame, ...]]:
    """Returns ``op_name`` and the chain of frames of an instruction."""
    at = attribute_text.find("metadata={")
    if at < 0:
        return "", ()
    op_name = _OP_NAME.search(attribute_text, at)
    frame_id = _FRAME_ID.search(attribute_text, at)
    if frame_id:
        chain = frames.chain(int(frame_id.group(1)))
    else:
        file = _SOURCE_FILE.search(attribute_text, at)
        line = _SOURCE_LINE.search(attribute_text, at)
        chain = (Frame(file.group(1), int(line.group(1)) if line else 0),) if file else ()
    return (op_name.group(1) if op_name else ""), chain


def _operands(opcode: str, argument: str) -> tuple[str, ...]:
    if opcode in ("constant", "parameter") or not argument:
        return ()
    if "%" in argument:
        return tuple(_OPERAND.findall(argument))
    found = (_BARE_OPERAND.search(part) for part in split_top_level(COMMENT.sub("", argument)))
    return tuple(f.group(1) for f in found if f)


def _instruction(text: str, computation: str, frames: _Frames) -> Instruction:
    head = _HEAD.match(text)
    if head is None:
        raise ValueError(f"not an HLO instruction: {text[:120]!r}")
    start = head.end()
    if text[start] == "(":
        end = closing_bracket(text, start) + 1
    else:
        array = ARRAY.match(text, start)
        if array is None:
            raise ValueError(f"no shape in HLO instruction: {text[:120]!r}")
        end = array.end()
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"no opcode in HLO instruction: {text[:120]!r}")
    close = closing_bracket(text, opcode.end() - 1)
    argument = text[opcode.end() : close].strip()
    attribute_text = text[close + 1 :].lstrip(", ")
    op_name, chain = _metadata(attribute_text, frames)
    return Instruction(
        name=head.group(2),
        opcode=opcode.group(1),
        shape=parse_shape(text[start:end]),
        operands=_operands(opcode.group(1), argument),
        argument=argument,
        computation=computation,
        is_root=head.group(1) is not None,
        attribute_text=attribute_text,
        op_name=op_name,
        frames=chain,
    )


def _header(line: str) -> tuple[str, dict[str, str]]:
    name, _, rest = line.removeprefix("HloModule ").partition(",")
    pairs = (part.partition("=") for part in split_top_level(rest))
    return name.strip(), {key: value for key, _, value in pairs}


def read_aliases(text: str) -> tuple[Alias, ...]:
    """Reads ``{0}: (2, {1}, may-alias)`` of a header, and ``{0}: (2, {1})`` of an instruction's operands."""

    def ints(numbers: str) -> tuple[int, ...]:
        return tuple(int(n) for n in numbers.split(",") if n.strip())

    found = _ALIAS.findall(text)
    return tuple(Alias(ints(out), int(p), ints(index), kind or "may-alias") for out, p, index, kind in found)


def _tables(lines: list[str], start: int) -> tuple[dict[str, dict[int, str]], int]:
    """Reads the tables between the header and the first computation; returns them and where that begins."""
    tables: dict[str, dict[int, str]] = {}
    at = start
    while at < len(lines):
        line = lines[at]
        if line.strip() in _TABLES:
            rows = tables.setdefault(line.strip(), {})
        elif line[:1].isdigit() and tables:
            number, _, row = line.partition(" ")
            rows[int(number)] = row
        elif line.strip():
            break
        at += 1
    return tables, at


def _computations(lines: list[str], start: int, frames: _Frames) -> tuple[dict[str, Computation], str]:
    """Reads all computations; returns them by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    body: list[str] = []
    for line in lines[start:]:
        if not name:
            if (found := _COMPUTATION.match(line)) is not None:
                name = found.group(2)
                entry = name if found.group(1) else entry
        elif (end := _END.match(line)) is not None:
            made = tuple(_instruction(text, name, frames) for text in body)
            computations[name] = Computation(name, made, end.group(1) or "")
            name, body = "", []
        elif _HEAD.match(line):
            body.append(line)
        elif body:
            body[-1] += " " + line.strip()  # attributes of kernels and long literals take several lines
    return computations, entry or next(reversed(computations), "")


def parse_module(text: str) -> Module:
    """Reads the text of an HLO module, as printed by ``Compiled.as_text()``.

    Raises:
      ValueError: ``text`` does not begin with an HLO header, or an instruction cannot be read.
    """
    lines = text.lstrip().split("\n")
    if not lines[0].startswith("HloModule "):
        raise ValueError(f"not the text of an HLO module, it begins with {lines[0][:80]!r}")
    name, header = _header(lines[0])
    tables, start = _tables(lines, 1)
    computations, entry = _computations(lines, start, _Frames(tables))
    if not computations:
        raise ValueError(f"HLO module {name!r} has no computations")
    return Module(
        name=name,
        num_partitions=int(header.get("num_partitions", 1)),
        is_scheduled=header.get("is_scheduled") == "true",
        entry_name=entry,
        computations=computations,
        input_output_alias=read_aliases(header.get("input_output_alias", "")),
    )
