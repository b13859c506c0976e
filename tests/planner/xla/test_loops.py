from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from intttrain.planner.xla import loops
from intttrain.planner.xla.hlo import Module, parse_module
from intttrain.planner.xla.loops import execution_counts, trip_count
from tests.planner.planted import PROGRAMS, TARGETS, compiled, compiled_text


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [n for n, p in PROGRAMS.items() if p.trips or n == "one trip"])
def test_planted_loops(name, target):
    counts = execution_counts(compiled(name, target))
    assert sorted(loop.trips or -1 for loop in counts.loops) == sorted(PROGRAMS[name].trips)
    assert counts.unresolved == ()


@pytest.mark.parametrize("name", [n for n, p in PROGRAMS.items() if p.trips])
def test_following_agrees_with_the_compilers_own_count(name):
    """The CPU compiler writes its count for most loops; hide it and compare."""
    program = PROGRAMS[name]
    text = compiled_text(program.function, program.shapes, "cpu")
    assert "known_trip_count" in text
    hidden = execution_counts(parse_module(text.replace("known_trip_count", "hidden")))
    assert hidden == execution_counts(parse_module(text))


def test_nested_loops_multiply():
    module = compiled("nested scans", "cpu")
    counts = execution_counts(module)
    outer, inner = (next(loop for loop in counts.loops if loop.trips == n) for n in (5, 3))
    assert (outer.entries, inner.entries) == (1, 5)
    inner_while = module.computations[inner.computation][inner.name]
    assert counts[inner_while.callee("body")] == 15
    assert counts[inner_while.callee("condition")] == 5 * (3 + 1)
    assert counts[module.entry_name] == 1


def test_a_loop_over_data_is_reported_and_counted_once():
    program = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x))
    text = program.lower(jnp.ones((64, 64)), jnp.int32(3)).compile().as_text()
    counts = execution_counts(parse_module(text))
    (loop,) = counts.loops
    assert loop.trips is None and counts.unresolved == (loop.name,)
    body = parse_module(text).computations[loop.computation][loop.name].callee("body")
    assert counts[body] == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_bound_that_the_outer_loop_changes_is_reported(target):
    def triangle(x):
        def outer(carry, _):
            x, bound = carry
            _, x = jax.lax.while_loop(lambda c: c[0] < bound, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[1])), (0, x))
            return (x, bound + 1), None

        return jax.lax.scan(outer, (x, 1), None, length=5)[0][0]

    counts = execution_counts(parse_module(compiled_text(triangle, ((64, 64),), target)))
    assert sorted((loop.trips or -1, loop.entries) for loop in counts.loops) == [(-1, 5), (5, 1)]
    assert len(counts.unresolved) == 1


# --- forms that compilers write now and then ------------------------------------------------------------------------

LOOP = """HloModule loop, is_scheduled=true

%step (s: s32[]) -> s32[] {
  %s = s32[]{:T(128)} parameter(0)
  %by = s32[]{:T(128)} constant(STEP)
  ROOT %next = s32[]{:T(128)} add(%s, %by)
}

%test (i: s32[], n: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %is = pred[] compare(%i, %n), direction=DIRECTION
}

%body (b: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %b = (s32[], s32[], f32[8]{0}) parameter(0)
  %bi = s32[] get-tuple-element(%b), index=0
  %bc = s32[]{:T(128)S(6)} copy(%bi)
  %bn = s32[] get-tuple-element(%b), index=1
  %bx = f32[8]{0} get-tuple-element(%b), index=2
  %bf = s32[] fusion(%bc), kind=kLoop, calls=%step
  ROOT %bt = (s32[], s32[], f32[8]{0}) tuple(%bf, %bn, %bx)
}

%condition (c: (s32[], s32[], f32[8])) -> pred[] {
  %c = (s32[], s32[], f32[8]{0}) parameter(0)
  %ci = s32[] get-tuple-element(%c), index=0
  %cn = s32[] get-tuple-element(%c), index=1
  ROOT %cf = pred[] fusion(%ci, %cn), kind=kLoop, calls=%test
}

ENTRY %main (x: f32[8], d: s32[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %d = s32[] parameter(1)
  %start = s32[] constant(START)
  %bound = s32[] constant(BOUND)
  %init = (s32[], s32[], f32[8]{0}) tuple(%start, %bound, %x)
  %while.1 = (s32[], s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%while.1), index=2
}
"""


def _loop(start=0, bound=10, step=1, direction="LT", text=LOOP) -> Module:
    values = {"START": start, "BOUND": bound, "STEP": step, "DIRECTION": direction}
    for key, value in values.items():
        text = text.replace(key, str(value))
    return parse_module(text)


def _trips(module: Module) -> int | None:
    return trip_count(module, module.entry["while.1"])


@pytest.mark.parametrize(
    ("start", "bound", "step", "direction", "trips"),
    [
        (0, 10, 1, "LT", 10),
        (0, 10, 3, "LT", 4),
        (1, 15, 2, "LE", 8),
        (10, 0, -1, "GT", 10),
        (10, 0, -4, "GE", 3),
        (-5, 7, 4, "NE", 3),
        (6, 6, 1, "EQ", 1),
        (10, 10, 1, "LT", 0),
        (0, 10, 0, "LT", None),  # does not end
        (0, 7, 2, "NE", None),  # jumps over the bound
    ],
)
def test_directions_and_steps(start, bound, step, direction, trips, monkeypatch):
    monkeypatch.setattr(loops, "MAX_TRIPS", 100)
    assert _trips(_loop(start, bound, step, direction)) == trips


def test_a_loop_that_is_too_long_to_follow(monkeypatch):
    assert _trips(_loop(0, 300)) == 300
    monkeypatch.setattr(loops, "MAX_TRIPS", 299)
    assert _trips(_loop(0, 300)) is None


def test_a_known_trip_count_is_taken():
    text = LOOP.replace("body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"36"}}\n')
    assert _trips(_loop(text=text)) == 36


def test_a_bound_that_is_data():
    module = _loop(text=LOOP.replace("tuple(%start, %bound", "tuple(%start, %d"))
    assert _trips(module) is None
    counts = execution_counts(module)
    assert counts.unresolved == ("while.1",) and counts["body"] == 1 and counts["condition"] == 2


def test_a_bound_that_the_body_changes():
    text = LOOP.replace("tuple(%bf, %bn, %bx)", "tuple(%bf, %half, %bx)")
    text = text.replace("  %bx =", "  %minus = s32[] constant(-1)\n  %half = s32[] add(%bn, %minus)\n  %bx =")
    assert _trips(_loop(0, 10, 1, text=text)) == 5  # they meet in the middle


def test_a_condition_with_two_tests():
    text = LOOP.replace("ROOT %is = pred[] compare", "%is = pred[] compare").replace(
        "direction=DIRECTION\n",
        "direction=DIRECTION\n  %six = s32[] constant(6)\n  %two = pred[] compare(%i, %six), direction=NE\n"
        "  ROOT %both = pred[] and(%is, %two)\n",
    )
    assert _trips(_loop(0, 10, 1, text=text)) == 6


def test_start_values_behind_asynchronous_copies():
    text = LOOP.replace(
        "  %init =",
        "  %cs = (s32[], s32[]{:S(6)}, u32[]) copy-start(%bound)\n  %cd = s32[]{:S(6)} copy-done(%cs)\n  %init =",
    ).replace("tuple(%start, %bound", "tuple(%start, %cd")
    assert _trips(_loop(text=text)) == 10


CALLS = """HloModule calls, is_scheduled=true

%cheap (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %a1 = f32[8]{0} copy(%a), backend_config={"window_config":{"estimated_cycles":"10"}}
}

%dear (e: f32[8]) -> f32[8] {
  %e = f32[8]{0} parameter(0)
  ROOT %e1 = f32[8]{0} call(%e), to_apply=%work
}

%work (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  ROOT %w1 = f32[8]{0} tanh(%w), backend_config={"window_config":{"estimated_cycles":"11"}}
}

%wrapped (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %r1 = f32[8]{0} tanh(%r)
}

%never (n: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8], p: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %p = pred[] parameter(1)
  %either = f32[8]{0} conditional(%p, %x, %x), true_computation=%cheap, false_computation=%dear
  %index = s32[] constant(0)
  %one = f32[8]{0} conditional(%index, %x, %x), branch_computations={%cheap, %work}
  %begin = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%wrapped
  %end = f32[8]{0} async-done(%begin), calls=%wrapped
  %again = f32[8]{0} call(%end), to_apply=%work
  ROOT %sum = f32[8]{0} add(%either, %again)
}
"""


def test_calls_branches_and_asynchronous_calls():
    counts = execution_counts(parse_module(CALLS))
    assert counts.conditionals == ("either", "one")
    assert dict(counts.counts) == {"cheap": 0, "dear": 1, "work": 3, "wrapped": 1, "never": 0, "main": 1}


def test_a_branch_without_a_valid_estimate_is_not_the_cheap_one():
    unknown = CALLS.replace('"estimated_cycles":"10"', '"estimated_cycles":"9223372036854775807"')
    counts = execution_counts(parse_module(unknown)).counts
    assert (counts["cheap"], counts["dear"], counts["work"]) == (2, 0, 1)


def test_a_branch_for_rare_chunks_is_not_counted():
    """The dearest branch is what rows cost in which documents begin inside chunks; plans are of long documents."""
    call = "%e1 = f32[8]{0} call(%e), to_apply=%work"
    rare = f'{call}, metadata={{op_name="jit(f)/cond/branch_0_fun/mixed_chunk/tanh"}}'
    counts = execution_counts(parse_module(CALLS.replace(call, rare)), "mixed_chunk")
    assert (counts["cheap"], counts["dear"]) == (1, 0)
