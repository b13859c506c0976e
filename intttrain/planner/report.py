"""Plans as text for people: one page for a plan, one line a plan for a sweep or a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from intttrain.core.hardware import GIB
from intttrain.core.progress import human_count
from intttrain.planner.cost import COLLECTIVE, OFFLOADED
from intttrain.planner.plan import Plan

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
    lines = [
        "",
        f"predicted step {p.step_seconds:.2f} s = {p.compute_seconds:.2f} s of work + {p.synchronous_seconds:.2f} s of "
        f"collectives that nothing hides ({p.overlapped_seconds:.2f} s more are hidden)",
        f"  {p.tokens_per_second_per_chip:.0f} tokens/s/chip, MFU {p.mfu:.3f}; {p.flop_rule}",
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
    if plan.cost is None:
        return []
    notes = []
    if plan.cost.unresolved_loops:
        notes.append(f"note: trips unknown, counted once: {', '.join(map(str, plan.cost.unresolved_loops))}")
    if plan.cost.unpriced:
        notes.append(f"note: {len(plan.cost.unpriced)} instructions have no estimate; their time is missing (--json)")
    return ["", *notes] if notes else []


def describe_plans(plans: Sequence[tuple[str, Plan]]) -> str:
    """Returns a table with one labelled plan a line; ``*`` marks those that no other beats in both memory and time."""
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
            else f"{peak}  {p.step_seconds:7.2f}  {p.mfu:6.3f}  {p.tokens_per_second_per_chip:13.0f}"
        )  # fmt: skip
    return "\n".join(lines)


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Returns the plans that fit and that no other beats in tokens/s/chip with as little memory."""
    fitting = [(plan, plan.prediction) for plan in plans if plan.verdict.fits and plan.prediction is not None]

    def beaten(plan: Plan, rate: float) -> bool:
        return any(
            other.verdict.needed <= plan.verdict.needed
            and p.tokens_per_second_per_chip >= rate
            and (other.verdict.needed, -p.tokens_per_second_per_chip) != (plan.verdict.needed, -rate)
            for other, p in fitting
        )

    return [plan for plan, p in fitting if not beaten(plan, p.tokens_per_second_per_chip)]


def describe_ttt_share(with_ttt: Plan, dense: Plan) -> str:
    """Returns what the TTT layers cost, from the plan of a configuration and that of the same with ``ttt=None``."""
    table = describe_plans([("with TTT", with_ttt), ("ttt=None", dense)])
    if with_ttt.prediction is None or dense.prediction is None:
        return table
    time = with_ttt.prediction.step_seconds / dense.prediction.step_seconds - 1
    memory = (with_ttt.verdict.needed - dense.verdict.needed) / GIB
    return f"{table}\nTTT costs {time:+.1%} of the step and {memory:+.2f} GiB a device (predicted)"


def _gib(size: int) -> str:
    return f"{size / GIB:8.3f}"


def _short(line: str) -> str:
    """The part of "FILE:LINE" from the package on."""
    at = line.rfind("/intttrain/")
    return line[at + 1 :] if at >= 0 else "/".join(line.split("/")[-2:])
