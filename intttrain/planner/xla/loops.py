"""How often each computation of an optimised XLA module runs in one step.

The compiler's own sums count the body of a loop once, and on TPU its text does not say how often a loop runs. Here the
scalars that the loop's condition depends on are followed from their start values through the body, trip by trip, until
the condition fails. That covers every direction of comparison and step, bounds carried through the loop unchanged,
counters behind copies, tuples and fusions, and bounds that an outer loop hands in. What depends on data stays
unresolved: it is reported by name and counted as one trip.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping

from intttrain.planner.xla.hlo import Computation, Instruction, Module

MAX_TRIPS = 200_000  # a longer loop is reported as unresolved: each trip is followed, at some 10 microseconds

Path = tuple[int, ...]
Parameters = Callable[[int, Path], int | None]  # (number of a parameter, path into it) -> value

# The value, or the part at the same path, is that of the first operand.
_SAME = {"copy", "bitcast", "reshape", "broadcast", "convert", "copy-done", "optimization-barrier", "opt-barrier"}
_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_BINARY: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "divide": lambda a, b: _truncated(a, b),
    "remainder": lambda a, b: a - b * _truncated(a, b),
}


def _truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@dataclasses.dataclass(frozen=True)
class Loop:
    """A ``while`` instruction: its trips per entry (None if unresolved) and how often it is entered in a step."""

    name: str
    computation: str
    trips: int | None
    entries: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class ExecutionCounts:
    """How often computations run in one step on one device.

    Attributes:
      counts: by computation name; 0 for those that are never reached. A computation that a reduction or a sort applies
        to elements counts once per execution of that instruction.
      loops: every loop that is reached.
      unresolved: names of the loops whose trips are unknown; they are counted as one trip.
      conditionals: names of the conditionals; of each, the most expensive usual branch alone is counted, see
        ``execution_counts``.
    """

    counts: Mapping[str, int]
    loops: tuple[Loop, ...]
    unresolved: tuple[str, ...]
    conditionals: tuple[str, ...]

    def __getitem__(self, computation: str) -> int:
        return self.counts[computation]


class _Scalars:
    """Evaluates integer scalars of a module; None wherever a value depends on data."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._callers: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in module.instructions():
            if not instruction.opcode.endswith(("-done", "-update")):
                for name in instruction.called:
                    self._callers[name].append(instruction)

    def value(self, computation: Computation, name: str, path: Path, parameters: Parameters) -> int | None:
        """Value of the part at ``path`` of instruction ``name``, with the computation's parameters given."""
        at = computation[name]
        opcode = at.opcode
        if opcode == "get-tuple-element":
            return self.value(computation, at.operands[0], (int(at.attributes["index"]), *path), parameters)
        if opcode == "tuple" and path:
            return self.value(computation, at.operands[path[0]], path[1:], parameters)
        if opcode == "parameter":
            return parameters(int(at.argument), path)
        if opcode in _SAME:
            return self.value(computation, at.operands[0], path, parameters)
        if opcode == "copy-start":
            return self.value(computation, at.operands[0], path[1:], parameters)
        if opcode == "constant":
            return _literal(at.argument)
        if opcode in ("fusion", "call"):
            return self._called(computation, at, path, parameters)
        if opcode == "while":
            body = self._module.computations[at.callee("body")]
            return self.value(computation, at.operands[0], path, parameters) if self.carried(body, path) else None
        return self._arithmetic(computation, at, parameters)

    def _called(self, computation: Computation, at: Instruction, path: Path, parameters: Parameters) -> int | None:
        callee = self._module.computations[at.called[0]]

        def inner(number: int, inner_path: Path) -> int | None:
            return self.value(computation, at.operands[number], inner_path, parameters)

        return self.value(callee, callee.root.name, path, inner)

    def _arithmetic(self, computation: Computation, at: Instruction, parameters: Parameters) -> int | None:
        opcode = at.opcode
        known = opcode in _BINARY or opcode in ("compare", "select", "clamp", "negate", "not", "abs")
        if not known or at.shape.size != 1:
            return None
        found = [self.value(computation, name, (), parameters) for name in at.operands]
        if opcode == "select":
            return None if found[0] is None else found[1] if found[0] else found[2]
        values = [v for v in found if v is not None]
        if len(values) < len(found) or (opcode in ("divide", "remainder") and values[1] == 0):
            return None
        if opcode == "compare":
            return int(_COMPARE[at.attributes["direction"]](*values))
        if opcode == "clamp":
            return max(values[0], min(values[1], values[2]))
        if opcode in ("negate", "abs"):
            return -values[0] if opcode == "negate" else abs(values[0])
        if opcode == "not":
            return 1 - values[0] if at.shape.dtype == "pred" else ~values[0]
        return _BINARY[opcode](*values)

    def carried(self, body: Computation, path: Path) -> bool:
        """Whether a loop's body hands the element at ``path`` on unchanged."""
        return self._origin(body, body.root.name, path) == (0, path)

    def _origin(self, computation: Computation, name: str, path: Path) -> tuple[int, Path] | None:
        """The parameter, and the path into it, that the part at ``path`` of ``name`` is a copy of."""
        at = computation[name]
        if at.opcode == "parameter":
            return int(at.argument), path
        if at.opcode == "get-tuple-element":
            return self._origin(computation, at.operands[0], (int(at.attributes["index"]), *path))
        if at.opcode == "tuple" and path:
            return self._origin(computation, at.operands[path[0]], path[1:])
        if at.opcode in ("copy", "bitcast", "copy-done", "optimization-barrier", "opt-barrier"):
            return self._origin(computation, at.operands[0], path)
        if at.opcode == "copy-start":
            return self._origin(computation, at.operands[0], path[1:])
        if at.opcode == "while" and self.carried(self._module.computations[at.callee("body")], path):
            return self._origin(computation, at.operands[0], path)
        if at.opcode in ("fusion", "call"):
            callee = self._module.computations[at.called[0]]
            inner = self._origin(callee, callee.root.name, path)
            return self._origin(computation, at.operands[inner[0]], inner[1]) if inner else None
        return None

    def parameters_of(self, computation: Computation) -> Parameters:
        """Values of a computation's parameters, the same for all its callers; what a loop changes is unknown."""

        def find(number: int, path: Path) -> int | None:
            callers = self._callers[computation.name]
            values = {self._from_caller(caller, computation, number, path) for caller in callers}
            return values.pop() if len(values) == 1 else None

        return find

    def _from_caller(self, caller: Instruction, computation: Computation, number: int, path: Path) -> int | None:
        outer = self._module.computations[caller.computation]
        if caller.opcode == "while":
            if not self.carried(self._module.computations[caller.callee("body")], path):
                return None
            return self.value(outer, caller.operands[0], path, self.parameters_of(outer))
        if caller.opcode == "conditional":
            operand = caller.operands[1 + caller.called.index(computation.name)]
            return self.value(outer, operand, path, self.parameters_of(outer))
        if caller.opcode in ("fusion", "call") or caller.opcode.endswith("-start"):
            return self.value(outer, caller.operands[number], path, self.parameters_of(outer))
        return None


def _literal(argument: str) -> int | None:
    """An integer or truth value, alone or as the only element of an array."""
    text = argument.strip("{} ")
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text)
    except ValueError:
        return None


def _known_trip_count(loop: Instruction) -> int | None:
    known = loop.backend_config.get("known_trip_count") if "known_trip_count" in loop.attribute_text else None
    return int(known["n"]) if isinstance(known, dict) and "n" in known else None


def _followed(scalars: _Scalars, module: Module, loop: Instruction) -> int | None:
    """Runs the scalars of a loop until its condition fails; None if a value is missing or the loop does not end."""
    outer = module.computations[loop.computation]
    condition, body = (module.computations[loop.callee(role)] for role in ("condition", "body"))
    start = scalars.parameters_of(outer)
    state: dict[Path, int | None] = {}

    def current(number: int, path: Path) -> int | None:
        if path not in state:  # asked for the first time, in the first trip
            state[path] = scalars.value(outer, loop.operands[0], path, start)
        return state[path]

    # The elements that the condition reads, and those that their next values are made from.
    scalars.value(condition, condition.root.name, (), current)
    while True:
        before = len(state)
        for path in list(state):
            scalars.value(body, body.root.name, path, current)
        if len(state) == before:
            break
    fixed = {path for path in state if scalars.carried(body, path)}
    for trips in range(MAX_TRIPS):
        proceed = scalars.value(condition, condition.root.name, (), current)
        if proceed is None:
            return None
        if not proceed:
            return trips
        following = {p: v if p in fixed else scalars.value(body, body.root.name, p, current) for p, v in state.items()}
        if following == state:
            return None
        state.update(following)
    return None


def trip_count(module: Module, loop: Instruction, scalars: _Scalars | None = None) -> int | None:
    """Returns how often the body of a ``while`` instruction runs each time it is entered.

    A ``known_trip_count`` of the compiler (CPU and GPU write it) is taken as it is.

    Returns:
      The number of trips, or None where it depends on data, differs between callers or exceeds ``MAX_TRIPS``.
    """
    known = _known_trip_count(loop)
    if known is not None:
        return known
    return _followed(scalars or _Scalars(module), module, loop)


def _callers_first(module: Module) -> list[Computation]:
    """The computations reached from the entry, each after all of its callers."""
    order: list[Computation] = []
    seen: set[str] = set()
    stack: list[tuple[str, bool]] = [(module.entry_name, False)]
    while stack:
        name, done = stack.pop()
        if done:
            order.append(module.computations[name])
        elif name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack.extend((callee, False) for i in module.computations[name].instructions for callee in i.called)
    return order[::-1]


def _weights(order: list[Computation], trips: Mapping[str, int | None]) -> dict[str, tuple[bool, int, int]]:
    """What branches are compared by, of each computation with all that it calls.

    Whether the compiler wrote a number that is no estimate (a time that is unknown is not a short one), estimated
    cycles, and bytes written.
    """
    weights: dict[str, tuple[bool, int, int]] = {}
    for computation in reversed(order):
        unknown, cycles, written = False, 0, 0
        for instruction in computation.instructions:
            times = trips.get(instruction.name) or 1
            inner = [weights[name] for name in instruction.called]
            invalid = bool(instruction.written_cycles) and instruction.estimated_cycles is None
            unknown = unknown or invalid or any(w[0] for w in inner)
            cycles += (instruction.estimated_cycles or 0) + times * sum(w[1] for w in inner)
            written += instruction.shape.bytes + times * sum(w[2] for w in inner)
        weights[computation.name] = (unknown, cycles, written)
    return weights


def _rare(module: Module, scope: str | None) -> frozenset[str]:
    """Returns the computations with an instruction in the scope."""
    if scope is None:
        return frozenset()
    return frozenset(name for name, c in module.computations.items() if any(scope in i.op_name for i in c.instructions))


def _shares(
    instruction: Instruction, trips: int | None, weights: Mapping[str, tuple[bool, int, int]], rare: frozenset[str]
) -> dict[str, int]:
    """How often one execution of ``instruction`` runs each computation that it calls."""
    if instruction.opcode == "while":
        once = 1 if trips is None else trips
        return {instruction.callee("body"): once, instruction.callee("condition"): once + 1}
    if instruction.opcode == "conditional":
        usual = [name for name in instruction.called if name not in rare] or list(instruction.called)
        return {max(usual, key=lambda name: weights[name]): 1}
    if instruction.opcode.endswith(("-done", "-update")):  # the start has run it
        return {}
    return dict.fromkeys(instruction.called, 1)


def execution_counts(module: Module, rare_scope: str | None = None) -> ExecutionCounts:
    """Returns how often every computation runs in one execution of the module on one device.

    A loop's body runs trips times and its condition once more. Of a conditional one branch is counted, the one with
    the larger sum of estimated cycles (or, without estimates, of bytes written; one with an estimate that cannot be
    true comes first): a step is priced at its worst case, not at the sum of alternatives. A branch in the named scope
    ``rare_scope`` is counted only if all are. The completion of an asynchronous operation runs nothing again.
    """
    scalars = _Scalars(module)
    order = _callers_first(module)
    whiles = [i for c in order for i in c.instructions if i.opcode == "while"]
    trips = {loop.name: trip_count(module, loop, scalars) for loop in whiles}
    weights, rare = _weights(order, trips), _rare(module, rare_scope)
    counts = dict.fromkeys(module.computations, 0)
    counts[module.entry_name] = 1
    loops, conditionals = [], []
    for computation in order:
        runs = counts[computation.name]
        for instruction in computation.instructions if runs else ():
            for name, times in _shares(instruction, trips.get(instruction.name), weights, rare).items():
                counts[name] += runs * times
            if instruction.opcode == "while":
                loops.append(
                    Loop(instruction.name, computation.name, trips[instruction.name], runs, instruction.op_name)
                )
            elif instruction.opcode == "conditional":
                conditionals.append(instruction.name)
    return ExecutionCounts(
        counts=counts,
        loops=tuple(loops),
        unresolved=tuple(loop.name for loop in loops if loop.trips is None),
        conditionals=tuple(conditionals),
    )
