"""Plans as text for people: one page for a plan, one line a plan for a sweep or a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from intttrain.layout.hardware import GIB
from intttrain.logs.progress import human_count
from intttrain.planner.cost import COLLECTIVE, OFFLOADED, Cost
from intttrain.planner.plan import Plan, Prediction

_SHOWN = 12


def describe_plan(plan: Plan) -> str:
    """Returns the page of one plan."""
    head = [
        f"{plan.name} on {plan.topology}: {plan.devices} devices, mesh {plan.mesh}, "
        f"{human_count(plan.tokens_per_step)} tokens a step, remat {plan.remat}, microbatches {plan.microbatches}",
        f"compiled in {plan.compile_seconds:.0f} s with "
        + ", ".join(f"{name} {version}" for name, version in plan.versions.items())
        + "; every time below is predicted, not measured",
        "",
        f"{plan.verdict.text}",
    ]
    sections = [head, _memory(plan), _time(plan), _lines(plan), _traffic(plan), _replicated(plan), _notes(plan)]
    return "\n".join("\n".join(section) for section in sections if section)


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    if memory is None:
        largest = plan.refusal.largest if plan.refusal is not None else ()
        return [f"  {_gib(array.bytes)}  {array.shape}  {array.line} {array.op_name}" for array in largest[:_SHOWN]]
    parts = {
        "parameters": memory.parameters,
        "optimizer state": memory.optimizer,
        "batch": memory.batch,
        "gradients (fp32; part of the temporaries)": memory.gradients,
        "temporaries": memory.temporaries,
        f"kept of all layers by remat {plan.remat} (part of the temporaries, by its rule)": plan.kept_bytes or 0,
        "peak": memory.peak,
        "on the host": memory.host,
    }
    lines = ["", "memory of a device"]
    lines += [f"  {_gib(size)}  {name}" for name, size in parts.items() if size]
    if memory.largest and memory.estimated_peak:
        share = memory.estimated_peak / memory.peak
        lines += ["", f"largest temporaries at the peak (from the schedule, which gives {share:.0%} of the peak)"]
        lines += [
            f"  {_gib(b.bytes)}  {_short(b.line)}  {b.scope}  {b.count} x {b.shapes[0]}"
            for b in memory.largest[:_SHOWN]
        ]
    return lines


def _time(plan: Plan) -> list[str]:
    if plan.prediction is None or plan.cost is None:
        return []
    p, cost = plan.prediction, plan.cost
    least, most = ("at least ", "at most ") if p.unknown else ("", "")
    lines = [
        "",
        f"predicted step {least}{p.step_seconds:.2f} s = {p.compute_seconds:.2f} s of work + "
        f"{p.synchronous_seconds:.2f} s of collectives that nothing hides "
        f"({p.overlapped_seconds:.2f} s more are hidden)",
        f"  {most}{p.tokens_per_second_per_chip:.0f} tokens/s/chip, MFU {most}{p.mfu:.3f}; {p.flop_rule}",
        f"  matmuls outside of kernels: {cost.matmul_flops / 1e12:.1f} TFLOP a device",
        "",
        "estimated cycles by kind of work (millions, a device and step)",
    ]
    for name, work in cost.by_category.items():
        if work.cycles and name not in (COLLECTIVE, OFFLOADED):
            lines.append(f"  {work.cycles / 1e6:9.1f}  {work.cycles / cost.cycles:5.1%}  {name}")
    for kernel in cost.kernels:
        known = "no price" if kernel.cycles is None else f"{kernel.cycles * kernel.runs / 1e6:.1f}"
        lines.append(f"             {known} {kernel.name} x {kernel.runs} ({kernel.basis or 'no cost model'})")
    return lines


def _lines(plan: Plan) -> list[str]:
    if plan.cost is None:
        return []
    tables = (
        ("by pass and scope of the model", plan.cost.cycles_by_scope),
        ("by line of the program", {_short(line) or "no line": row for line, row in plan.cost.cycles_by_line.items()}),
    )
    lines = []
    for title, rows in tables:
        lines += ["", title]
        for name, categories in list(rows.items())[:_SHOWN]:
            kinds = ", ".join(f"{kind} {cycles / 1e6:.1f}" for kind, cycles in categories.items() if cycles >= 5e4)
            lines.append(f"  {sum(categories.values()) / 1e6:9.1f}  {name}  {kinds}")
    return lines


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return []
    lines = ["", "collectives (GiB a device and step; seconds alone | beside other work)"]
    for row in plan.traffic[:_SHOWN]:
        where = " x ".join(row.axes) + (" across slices" if row.crosses_slices else "")
        lines.append(
            f"  {_gib(row.bytes)}  {row.kind} over {where}, {row.executions} times, "
            f"{row.synchronous_seconds:.3f} | {row.overlapped_seconds:.3f} s"
        )
    return lines


def _replicated(plan: Plan) -> list[str]:
    if not plan.replicated:
        return ["", "nothing large is replicated that could be sharded"] if plan.replicated is not None else []
    lines = ["", "replicated although it could be sharded"]
    for item in plan.replicated[:_SHOWN]:
        place = _short(item.line) or item.name
        lines.append(f"  {_gib(item.bytes)}  {item.kind} {place}  {item.shape}  over {', '.join(item.axes)}")
    return lines


def _notes(plan: Plan) -> list[str]:
    if plan.cost is None or plan.prediction is None:
        return []
    notes = _unpriced(plan.cost, plan.prediction)
    if plan.cost.unresolved_loops:
        notes.append(f"note: trips unknown, counted once: {', '.join(map(str, plan.cost.unresolved_loops))}")
    return ["", *notes] if notes else []


def _unpriced(cost: Cost, prediction: Prediction) -> list[str]:
    """Says what has no estimate, how much of the step that is, and whether it is missing in its time."""
    missing = cost.missing
    beside = [item for item in cost.unpriced if item not in missing]
    lines = []
    if missing:
        seconds = prediction.unknown_seconds
        lines.append(
            f"note: {len(missing)} operations have no estimate ({sum(i.runs for i in missing)} of {cost.runs} "
            "executions in a step). Their time is missing: the step is longer. Moving their arrays once takes "
            f"{seconds:.3f} s, {seconds / prediction.step_seconds:.1%} of the time above"
        )
    if beside:
        lines.append(
            f"note: {len(beside)} offloaded operations or collectives carry a number that is no estimate. They are not "
            "part of the work above; what nothing hides of offloaded ones is missing, collectives have their own prices"
        )
    for item in (*missing, *beside)[:_SHOWN]:
        written = f", the compiler wrote {item.written}" if item.written else ""
        lines.append(f"  {item.runs} x {item.opcode} {item.name} {item.shape} {_short(item.line)}{written}")
    if len(cost.unpriced) > _SHOWN:
        lines.append(f"  and {len(cost.unpriced) - _SHOWN} more (--json)")
    return lines


def describe_plans(plans: Sequence[tuple[str, Plan]]) -> str:
    """Returns a table with one labelled plan a line.

    ``*`` marks those that no other beats in both memory and time, ``>`` a time that is a lower bound, because
    something has no estimate.
    """
    best = pareto([plan for _, plan in plans])
    width = max([len(label) for label, _ in plans] + [5])
    lines = [f"  {'':{width}}  peak GiB  spare GiB   step s     MFU  tokens/s/chip"]
    for label, plan in plans:
        mark = "*" if any(plan is one for one in best) else " "
        spare = (plan.verdict.available - plan.verdict.needed) / GIB
        peak = f"{mark} {label:{width}}  {plan.verdict.needed / GIB:8.2f}  {spare:9.2f}"
        p = plan.prediction
        lines.append(
            f"{peak}  {'does not fit':>12}" if p is None or not plan.verdict.fits
            else f"{peak} {'>' if p.unknown else ' '}{p.step_seconds:7.2f}  {p.mfu:6.3f}  "
            f"{p.tokens_per_second_per_chip:13.0f}"
        )  # fmt: skip
    unknown = sorted({name for _, plan in plans if plan.prediction is not None for name in plan.prediction.unknown})
    if unknown:
        lines.append(f"> at least so long: no estimate for {', '.join(map(_short_kind, unknown))}")
    return "\n".join(lines)


def _short_kind(name: str) -> str:
    opcode, _, line = name.partition(" at ")
    return f"{opcode} at {_short(line)}"


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Returns the plans that fit and that no other beats in tokens/s/chip with as little memory.

    What has no estimate is not fast: a plan with unknown work that another plan of as little memory lacks is not
    among them, and it beats none that lacks it.
    """
    fitting = [(plan, plan.prediction) for plan in plans if plan.verdict.fits and plan.prediction is not None]

    def beats(other: Plan, p: Prediction, plan: Plan, q: Prediction) -> bool:
        if other.verdict.needed > plan.verdict.needed:
            return False
        if set(p.unknown) != set(q.unknown):
            return not set(q.unknown) <= set(p.unknown)
        rates = p.tokens_per_second_per_chip, q.tokens_per_second_per_chip
        return rates[0] >= rates[1] and (other.verdict.needed, rates[0]) != (plan.verdict.needed, rates[1])

    return [plan for plan, q in fitting if not any(beats(other, p, plan, q) for other, p in fitting)]


def describe_ttt_share(with_ttt: Plan, dense: Plan) -> str:
    """Returns what the TTT layers cost, from the plan of a configuration and that of the same with ``ttt=None``."""
    table = describe_plans([("with TTT", with_ttt), ("ttt=None", dense)])
    if with_ttt.prediction is None or dense.prediction is None:
        return table
    time = with_ttt.prediction.step_seconds / dense.prediction.step_seconds - 1
    memory = (with_ttt.verdict.needed - dense.verdict.needed) / GIB
    known = set(with_ttt.prediction.unknown) == set(dense.prediction.unknown)
    doubt = "" if known else "; the time compares lower bounds that leave out different work"
    return f"{table}\nTTT costs {time:+.1%} of the step and {memory:+.2f} GiB a device (predicted){doubt}"


def _gib(size: int) -> str:
    return f"{size / GIB:8.3f}"


def _short(line: str) -> str:
    """The part of "FILE:LINE" from the package on."""
    at = line.rfind("/intttrain/")
    return line[at + 1 :] if at >= 0 else "/".join(line.split("/")[-2:])
