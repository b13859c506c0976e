"""What one step costs on one device: matmul FLOPs, and the compiler's own cycle estimates by kind of work and by line.

All numbers are the compiler's predictions for the program it made, not measurements. ``estimated_cycles`` stands on
the instructions that are executed as a whole (a fusion, not the parts in its body) and is per device. What has no
estimate is never dropped: Pallas kernels are priced by a model that the caller states, collectives and asynchronous
copies are kept apart, and the rest is listed as unpriced. So is what carries a number that cannot be an estimate, like
a negative one or 2^63 - 1: that is never added to anything.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from intttrain.planner.xla.flops import line_of, matmul_flops, scope_of
from intttrain.planner.xla.hlo import Instruction, Module
from intttrain.planner.xla.kernels import KernelModel, is_kernel, kernel_name, kernel_settings, stated_cost
from intttrain.planner.xla.loops import ExecutionCounts, execution_counts

# Categories. The last two run beside the rest or wait for other devices, so they are not part of ``Cost.cycles``.
MATMUL, KERNEL, COPY, ELEMENTWISE, SLICE, OTHER = "matmul", "kernel", "copy", "elementwise", "slice", "other"
COLLECTIVE, OFFLOADED = "collective", "offloaded"
CATEGORIES = (MATMUL, KERNEL, COPY, ELEMENTWISE, SLICE, OTHER, COLLECTIVE, OFFLOADED)
_APART = frozenset({COLLECTIVE, OFFLOADED})

_COLLECTIVES = frozenset(
    {"all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all"}
    | {"reduce-scatter", "send", "recv"}
)
_COPIES = frozenset({"copy", "transpose", "reshape", "bitcast-convert", "reverse"})
_SLICES = frozenset({"dynamic-slice", "dynamic-update-slice", "slice", "gather", "scatter", "concatenate", "pad"})
_FILLS = frozenset({"broadcast", "iota", "convert"})
_OPAQUE = frozenset({"custom-call", "sort", "fft", "rng", "rng-bit-generator", "topk", "cholesky", "triangular-solve"})
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
    | {"while", "call", "conditional", "opt-barrier", "optimization-barrier", "domain", "add-dependency"}
)
_FREE_TARGETS = frozenset({"AllocateBuffer", "ConcatBitcast"})
_RUNS_INSTRUCTIONS = frozenset({"while", "call", "conditional", "async-start", "call-start"})


@dataclasses.dataclass(frozen=True)
class Work:
    """One kind of work in a step: executions, their estimated cycles, and how many of them have no estimate."""

    runs: int
    cycles: float
    unpriced_runs: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas call and all that the text says about it.

    Attributes:
      name: of the kernel.
      instruction: name of the custom call.
      runs: executions in a step.
      cycles: of one execution, by the caller's model; None if that had no answer.
      basis: what the price rests on; "" without one.
      flops, transcendentals, bytes_accessed: the kernel author's ``cost_estimate``; None without one.
      settings: what the kernel's author wrote into its metadata, e.g. block sizes.
      operands, results: shapes on one device.
      line: "FILE:LINE" of the call.
      scope: pass and named scopes, as given by ``flops.scope_of``.
    """

    name: str
    instruction: str
    runs: int
    cycles: float | None
    basis: str
    flops: int | None
    transcendentals: int | None
    bytes_accessed: int | None
    settings: Mapping[str, Any]
    operands: tuple[str, ...]
    results: str
    line: str
    scope: str


@dataclasses.dataclass(frozen=True)
class Unpriced:
    """An instruction on arrays whose time is unknown.

    Attributes:
      category: "collective" and "offloaded" only where the compiler wrote a number that is no estimate: their time is
        not part of ``Cost.cycles`` anyway.
      runs: executions in a step.
      bytes: of its operands and results on one device.
      written: what stands in the place of the estimate, for example "9223372036854775807"; "" where nothing does.
    """

    name: str
    opcode: str
    category: str
    shape: str
    runs: int
    bytes: int
    written: str
    line: str


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Asynchronous work that is not a collective: completions, and bytes written in a step.

    Copies and slices between main and on-chip memory, and custom calls that a SparseCore carries out.
    """

    runs: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one step on one device, as predicted by the compiler.

    Attributes:
      matmul_flops: of all dots and convolutions outside of kernels.
      flops_by_line: matmul FLOPs by "FILE:LINE", largest first.
      flops_by_scope: matmul FLOPs by "PASS/SCOPE", largest first.
      cycles: sum over the categories but "collective" and "offloaded".
      by_category: every name of ``CATEGORIES``.
      cycles_by_line: by "FILE:LINE", then category; the line with the largest sum first. "" where unknown.
      cycles_by_scope: the same by "PASS/SCOPE".
      kernels: every Pallas call that runs.
      transfers: asynchronous copies and offloaded calls by opcode; they overlap with the rest and have no cycles.
      unpriced: instructions on arrays whose time is unknown; that of ``missing`` is missing in ``cycles``.
      scalar_runs: executions of instructions on single numbers, which have no estimate and are taken as free.
      unresolved_loops: loops that are counted as one trip because their trips are unknown.
      conditionals: of each, only the most expensive branch is counted.
    """

    matmul_flops: int
    flops_by_line: Mapping[str, int]
    flops_by_scope: Mapping[str, int]
    cycles: float
    by_category: Mapping[str, Work]
    cycles_by_line: Mapping[str, Mapping[str, float]]
    cycles_by_scope: Mapping[str, Mapping[str, float]]
    kernels: tuple[Kernel, ...]
    transfers: Mapping[str, Transfer]
    unpriced: tuple[Unpriced, ...]
    scalar_runs: int
    unresolved_loops: tuple[str, ...]
    conditionals: tuple[str, ...]

    @property
    def missing(self) -> tuple[Unpriced, ...]:
        """Work that belongs into ``cycles`` and whose time is unknown: with any, ``cycles`` is a lower bound."""
        return tuple(item for item in self.unpriced if item.category not in _APART)

    @property
    def runs(self) -> int:
        """Executions of everything that belongs into ``cycles``."""
        return sum(work.runs for category, work in self.by_category.items() if category not in _APART)

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers."""
        return dataclasses.asdict(self)


# --- kinds of work -------------------------------------------------------------------------------------------------


class Categories:
    """Says what kind of work an instruction is; for a fusion, from what its body does to arrays.

    A fusion with a matmul is a matmul, whatever else was fused into it; one with a collective is a collective; one
    that computes is elementwise even where it also slices. Arithmetic on single numbers (addresses) does not count.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._does: dict[str, frozenset[str]] = {}

    def of(self, instruction: Instruction) -> str:
        """The category of an instruction, one of ``CATEGORIES``."""
        if self._module.computations[instruction.computation].execution_thread not in ("", "main"):
            return OFFLOADED
        if is_kernel(instruction):
            return KERNEL
        does = self._opcodes(instruction)
        if does & {"dot", "convolution"}:
            return MATMUL
        if does & _COLLECTIVES:
            return COLLECTIVE
        if does & _OPAQUE:
            return OTHER
        if does - _COPIES - _SLICES - _FILLS:
            return ELEMENTWISE
        if does & _SLICES:
            return SLICE
        return ELEMENTWISE if does and not does & _COPIES else COPY

    def _opcodes(self, instruction: Instruction) -> frozenset[str]:
        if instruction.opcode == "fusion":
            return frozenset().union(*(self._body(name) for name in instruction.called))
        return frozenset({instruction.opcode.removesuffix("-start").removesuffix("-done")}) - _FREE

    def _body(self, name: str) -> frozenset[str]:
        """The opcodes at work on arrays in a fusion's body, bodies of fusions in it included."""
        if name not in self._does:
            computation = self._module.computations[name]
            found: set[str] = set()
            for at in computation.instructions:
                sizes = [at.shape.size, *(computation[operand].shape.size for operand in at.operands)]
                if max(sizes) > 1 or at.shape.is_tuple:
                    found |= self._opcodes(at)
            self._does[name] = frozenset(found)
        return self._does[name]


def _is_free(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return instruction.attributes.get("custom_call_target", "").strip('"') in _FREE_TARGETS
    return instruction.opcode in _FREE


def _executed(module: Module) -> set[str]:
    """Computations whose instructions are executed one by one: all but the bodies of fusions, reductions and such."""
    found, waiting = {module.entry_name}, [module.entry_name]
    while waiting:
        for instruction in module.computations[waiting.pop()].instructions:
            if instruction.opcode in _RUNS_INSTRUCTIONS:
                fresh = [name for name in instruction.called if name not in found]
                found.update(fresh)
                waiting.extend(fresh)
    return found


# --- adding up -----------------------------------------------------------------------------------------------------


class _Ledger:
    """Collects the entries of a ``Cost``, one executed instruction after the other."""

    def __init__(self, module: Module, kernel_cost: KernelModel, folder: str | None) -> None:
        self._categories = Categories(module)
        self._kernel_cost = kernel_cost
        self._folder = folder
        self.runs: Counter[str] = Counter()
        self.unpriced_runs: Counter[str] = Counter()
        self.cycles: dict[str, float] = defaultdict(float)
        self.lines: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.scopes: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.kernels: list[Kernel] = []
        self.unpriced: list[Unpriced] = []
        self.transfer_runs: Counter[str] = Counter()
        self.transfer_bytes: Counter[str] = Counter()
        self.scalar_runs = 0
        self._begun: set[str] = set()  # asynchronous instructions with a number that is no estimate

    def add(self, at: Instruction, runs: int, operands: Mapping[str, Instruction]) -> None:
        """Enters an instruction that runs ``runs`` times in a step."""
        category = self._categories.of(at)
        cycles: float | None = at.estimated_cycles
        if category == KERNEL:
            cycles = self._kernel(at, runs, operands)
        elif _is_free(at):
            return
        elif cycles is None and at.opcode.endswith(("-start", "-update", "-done")):
            self._asynchronous(at, runs, category, operands)
            return
        elif (
            cycles is None
            and not at.written_cycles
            and category not in _APART
            and at.shape.size <= 1
            and not at.shape.is_tuple
        ):
            self.scalar_runs += runs
            return
        if category == COLLECTIVE and at.name.startswith("async-collective-done"):
            runs = 0  # the second half of a collective that is spread over several fusions
        if cycles is None:
            self._unknown(at, runs, category, operands)
            return
        self.runs[category] += runs
        self.cycles[category] += runs * cycles
        self.lines[line_of(at, self._folder)][category] += runs * cycles
        self.scopes[scope_of(at.op_name)][category] += runs * cycles

    def _unknown(self, at: Instruction, runs: int, category: str, operands: Mapping[str, Instruction]) -> None:
        self.runs[category] += runs
        self.unpriced_runs[category] += runs
        if category not in _APART or at.written_cycles:
            self._list(at, runs, category, operands)

    def _list(self, at: Instruction, runs: int, category: str, operands: Mapping[str, Instruction]) -> None:
        size = at.shape.bytes + sum(operands[name].shape.bytes for name in at.operands)
        line = line_of(at, self._folder)
        self.unpriced.append(Unpriced(at.name, at.opcode, category, str(at.shape), runs, size, at.written_cycles, line))

    def _asynchronous(self, at: Instruction, runs: int, category: str, operands: Mapping[str, Instruction]) -> None:
        if at.written_cycles:  # no estimate: listed once, at its first instruction
            if not self._begun.intersection(at.operands):
                self._list(at, runs, category if category in _APART else OFFLOADED, operands)
            self._begun.add(at.name)
        if category in _APART:
            if at.opcode.endswith("-start"):
                self.runs[category] += runs
                self.unpriced_runs[category] += runs
        elif at.opcode.endswith("-done"):
            kind = at.opcode.removesuffix("-done")
            self.transfer_runs[kind] += runs
            self.transfer_bytes[kind] += runs * at.shape.padded_bytes

    def _kernel(self, at: Instruction, runs: int, operands: Mapping[str, Instruction]) -> float | None:
        price = self._kernel_cost(at)
        stated = stated_cost(at)
        self.kernels.append(
            Kernel(
                name=kernel_name(at),
                instruction=at.name,
                runs=runs,
                cycles=price.cycles if price else None,
                basis=price.basis if price else "",
                flops=stated.flops if stated else None,
                transcendentals=stated.transcendentals if stated else None,
                bytes_accessed=stated.bytes_accessed if stated else None,
                settings=kernel_settings(at),
                operands=tuple(str(operands[name].shape) for name in at.operands),
                results=str(at.shape),
                line=line_of(at, self._folder),
                scope=scope_of(at.op_name),
            )
        )
        return price.cycles if price else None


def _largest_first(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    ranked = sorted(rows.items(), key=lambda row: -sum(row[1].values()))
    return {key: dict(row) for key, row in ranked}


def step_cost(
    module: Module,
    *,
    kernel_cost: KernelModel,
    counts: ExecutionCounts | None = None,
    folder: str | None = None,
) -> Cost:
    """Adds up what one execution of the module costs on one device.

    Args:
      module: an optimised, scheduled module.
      kernel_cost: prices a Pallas call, or returns None where it cannot; see ``kernels.stated_kernel_cost``.
      counts: how often the computations run, from ``execution_counts``; made here if absent.
      folder: lines are given to the innermost frame inside this folder where there is one, e.g. a package's.
    """
    counts = counts or execution_counts(module)
    flops = matmul_flops(module, counts, folder=folder)
    ledger = _Ledger(module, kernel_cost, folder)
    executed = _executed(module)
    for name in (n for n in module.computations if n in executed):
        computation = module.computations[name]
        for instruction in computation.instructions if counts[name] else ():
            ledger.add(instruction, counts[name], computation.by_name)
    by_category = {c: Work(ledger.runs[c], ledger.cycles.get(c, 0.0), ledger.unpriced_runs[c]) for c in CATEGORIES}
    return Cost(
        matmul_flops=flops.total,
        flops_by_line=flops.by_line,
        flops_by_scope=flops.by_scope,
        cycles=sum(work.cycles for category, work in by_category.items() if category not in _APART),
        by_category=by_category,
        cycles_by_line=_largest_first(ledger.lines),
        cycles_by_scope=_largest_first(ledger.scopes),
        kernels=tuple(ledger.kernels),
        transfers={k: Transfer(n, ledger.transfer_bytes[k]) for k, n in ledger.transfer_runs.items()},
        unpriced=tuple(ledger.unpriced),
        scalar_runs=ledger.scalar_runs,
        unresolved_loops=counts.unresolved,
        conditionals=counts.conditionals,
    )
