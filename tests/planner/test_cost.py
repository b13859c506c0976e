# ruff: noqa: E501 - lines as compilers write them
from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.planner.cost import CATEGORIES, Transfer, Work, step_cost
from intttrain.planner.xla.flops import Window, matmul_flops, scope_of, valid_taps
from intttrain.planner.xla.hlo import Module, parse_module
from intttrain.planner.xla.kernels import KernelCost, is_kernel, kernel_name, stated_cost, stated_kernel_cost
from intttrain.planner.xla.loops import execution_counts
from tests.planner.planted import PROGRAMS, TARGETS, compiled, topology

# --- FLOPs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_planted_matmuls(name, target):
    module = compiled(name, target)
    flops = matmul_flops(module, execution_counts(module))
    assert flops.total == pytest.approx(PROGRAMS[name].flops, rel=1e-3)
    assert sum(flops.by_line.values()) == sum(flops.by_scope.values()) == flops.total


def test_taps_are_those_of_a_plain_loop():
    def counted(inputs, outputs, w):
        positions = [o * w.stride + k * w.rhs_dilate - w.pad_low for o in range(outputs) for k in range(w.size)]
        return sum(0 <= p <= (inputs - 1) * w.lhs_dilate and p % w.lhs_dilate == 0 for p in positions)

    cases = [
        (n, out, Window(size, stride, pad, holes, spread))
        for n in (1, 4, 7)
        for out in (1, 5)
        for size in (1, 4)
        for stride in (1, 3, 4)
        for pad in (-2, 0, 3)
        for holes in (1, 4, 6)
        for spread in (1, 2)
    ]
    assert [valid_taps(*case) for case in cases] == [counted(*case) for case in cases]


def _one(shape_lhs, shape_rhs, shape_out, rest, opcode="convolution") -> int:
    text = (
        f"HloModule one\n\nENTRY %main (l: f32[], r: f32[]) -> f32[] {{\n  %l = {shape_lhs} parameter(0)\n"
        f"  %r = {shape_rhs} parameter(1)\n  ROOT %out = {shape_out} {opcode}(%l, %r), {rest}\n}}\n"
    )
    module = parse_module(text)
    return matmul_flops(module, execution_counts(module)).total


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "rest", "flops"),
    [
        ("f32[8,16]", "f32[16,32]", "f32[8,32]", "dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        ("f32[16,8]", "f32[32,16]", "f32[8,32]", "dim_labels=fb_oi->bf", 2 * 8 * 16 * 32),
        # A batch of 4 as a window of 4 over a dilated input: one tap in four is real.
        (
            "f32[4,64,32]",
            "f32[4,32,16]",
            "f32[4,64,16]",
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            2 * 4 * 64 * 32 * 16,
        ),
        # Three weights as a window that reaches over the padding of one input.
        (
            "f32[1,64,32]",
            "f32[3,32,16]",
            "f32[3,64,16]",
            "window={size=3 pad=2_2}, dim_labels=0bf_0io->0bf",
            2 * 3 * 64 * 32 * 16,
        ),
        # Causal depthwise convolution over 16 positions with 4 taps: 4 * 16 - 6 of them inside.
        (
            "f32[2,16,8]",
            "f32[4,1,8]",
            "f32[2,16,8]",
            "window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f, feature_group_count=8",
            2 * 2 * 8 * 58,
        ),
        # Two spatial dims, "same" padding on one of them.
        (
            "f32[1,5,6,3]",
            "f32[3,1,3,7]",
            "f32[1,5,6,7]",
            "window={size=3x1 pad=1_1x0_0}, dim_labels=b01f_01io->b01f",
            2 * 7 * 3 * (15 - 2) * 6,
        ),
        # Groups in the batch: 3 groups of 2 rows share the outputs.
        ("f32[6,5]", "f32[5,9]", "f32[2,9]", "dim_labels=bf_io->bf, batch_group_count=3", 2 * 2 * 9 * 5),
    ],
)
def test_convolutions(lhs, rhs, out, rest, flops):
    assert _one(lhs, rhs, out, rest) == flops


def test_dot_with_batch_and_two_contracted_dims():
    rest = "lhs_batch_dims={0}, lhs_contracting_dims={1,3}, rhs_batch_dims={0}, rhs_contracting_dims={2,1}"
    assert _one("f32[2,3,5,7]", "f32[2,7,3,11]", "f32[2,5,11]", rest, "dot") == 2 * 2 * 5 * 11 * 3 * 7


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(f)/jvp()/while/body/eval_jaxpr/mlp/dot_general", "forward/mlp"),
        ("jit(f)/transpose(jvp())/while/body/closed_call/mlp/dot_general", "backward/mlp"),
        ("jit(f)/transpose(jvp(a))/while/body/checkpoint/rematted_computation/b/dot_general", "recompute/a/b"),
        ("jit(f)/jvp(bij,bkj->bik)/dot_general", "forward/bij,bkj->bik"),
        ("jit(f)/vmap(head)/jit(silu)/mul", "forward/head"),
        ("jit(f)/cond/branch_1_fun/x/add", "forward/x"),
        ("", "forward"),
    ],
)
def test_scopes(op_name, scope):
    assert scope_of(op_name) == scope


def _scoped(x, w):
    with jax.named_scope("first"):
        y = jnp.tanh(x @ w)
    with jax.named_scope("second"):
        return jnp.sum(jnp.tanh(y @ w))


def test_flops_by_scope_and_line():
    argument = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    gradient = jax.jit(jax.value_and_grad(_scoped, argnums=(0, 1)))
    module = parse_module(gradient.lower(argument, argument).compile().as_text())
    one = 2 * 64**3
    flops = matmul_flops(module, execution_counts(module), folder=str(pytest.__file__))
    passes = {
        f"{work}/{scope}": n * one for work, n in (("forward", 1), ("backward", 2)) for scope in ("first", "second")
    }
    assert flops.by_scope == passes
    first = _scoped.__code__.co_firstlineno
    assert flops.by_line == {f"{__file__}:{first + 2}": 3 * one, f"{__file__}:{first + 4}": 3 * one}


# --- cycles --------------------------------------------------------------------------------------------------------

CYCLES = """HloModule step, is_scheduled=true

%mm (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %conv = f32[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf, EST(999999)
}

%addresses (i: s32[], v: f32[9,8,8]) -> f32[8,8] {
  %i = s32[] parameter(0)
  %ii = s32[] add(%i, %i)
  %v = f32[9,8,8]{2,1,0} parameter(1)
  %ds = f32[1,8,8]{2,1,0} dynamic-slice(%v, %ii, %i, %i), dynamic_slice_sizes={1,8,8}
  ROOT %dsb = f32[8,8]{1,0} bitcast(%ds)
}

%slice_and_add (j: s32[], u: f32[9,8,8]) -> f32[1,8,8] {
  %j = s32[] parameter(0)
  %u = f32[9,8,8]{2,1,0} parameter(1)
  %us = f32[1,8,8]{2,1,0} dynamic-slice(%u, %j, %j, %j), dynamic_slice_sizes={1,8,8}
  ROOT %ua = f32[1,8,8]{2,1,0} add(%us, %us)
}

%relayout (k: f32[8,8]) -> bf16[8,8] {
  %k = f32[8,8]{1,0} parameter(0)
  %kc = f32[8,8]{0,1} copy(%k)
  ROOT %kb = bf16[8,8]{0,1} convert(%kc)
}

%plus (p0: f32[], p1: f32[]) -> f32[] {
  %p0 = f32[] parameter(0)
  %p1 = f32[] parameter(1)
  ROOT %p2 = f32[] add(%p0, %p1)
}

%total (t: f32[8,8]) -> f32[] {
  %t = f32[8,8]{1,0} parameter(0)
  %z = f32[] constant(0)
  ROOT %tr = f32[] reduce(%t, %z), dimensions={0,1}, to_apply=%plus
}

%scatter_sum (q: f32[8,8]) -> f32[2,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %rs = f32[2,8]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%plus
}

%spread (g: f32[8,8], h: f32[2,8]) -> f32[8,8] {
  %h = f32[2,8]{1,0} parameter(1)
  %ag = f32[8,8]{1,0} all-gather(%h), dimensions={0}
  %g = f32[8,8]{1,0} parameter(0)
  ROOT %gg = f32[8,8]{1,0} convolution(%g, %g), dim_labels=bf_io->bf
}

%sparse (o: f32[8,8]) -> f32[8,8] {
  %o = f32[8,8]{1,0} parameter(0)
  ROOT %o1 = f32[8,8]{1,0} add(%o, %o), EST(777)
}, execution_thread="sparsecore"

%body (b: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %b = (s32[], f32[8,8]{1,0}) parameter(0)
  %bi = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %bn = s32[] add(%bi, %one)
  %bx = f32[8,8]{1,0} get-tuple-element(%b), index=1
  %matmul = f32[8,8]{1,0} fusion(%bx), kind=kOutput, calls=%mm, metadata={op_name="jit(f)/mlp/dot_general" source_file="/code/a.py" source_line=1}, EST(1000)
  ROOT %bt = (s32[], f32[8,8]{1,0}) tuple(%bn, %matmul)
}

%condition (c: (s32[], f32[8,8])) -> pred[] {
  %c = (s32[], f32[8,8]{1,0}) parameter(0)
  %ci = s32[] get-tuple-element(%c), index=0
  %three = s32[] constant(3)
  ROOT %cl = pred[] compare(%ci, %three), direction=LT
}

ENTRY %main (x: f32[8,8], v: f32[9,8,8], i: s32[]) -> f32[8,8] {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %v = f32[9,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,8]{1,0}) while(%init), condition=%condition, body=%body
  %y = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %slice = f32[8,8]{1,0} fusion(%i, %v), kind=kLoop, calls=%addresses, metadata={source_file="/code/b.py" source_line=2}, EST(100)
  %mixed = f32[1,8,8]{2,1,0} fusion(%i, %v), kind=kLoop, calls=%slice_and_add, EST(20)
  %turn = bf16[8,8]{0,1} fusion(%y), kind=kLoop, calls=%relayout, EST(300)
  %move = f32[8,8]{0,1} copy(%y), EST(40)
  %all = f32[] fusion(%y), kind=kLoop, calls=%total, EST(5)
  %fill = f32[8,8]{1,0} broadcast(%all), dimensions={}, EST(6)
  %order = f32[8,8]{1,0} sort(%y), dimensions={0}, to_apply=%plus, EST(7000)
  %reduce = f32[2,8]{1,0} fusion(%y), kind=kCustom, calls=%scatter_sum, EST(50)
  %gather = f32[8,8]{1,0} all-gather(%reduce), dimensions={0}
  %gs = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%reduce), dimensions={0}
  %gd = f32[8,8]{1,0} all-gather-done(%gs)
  %async-collective-start = (f32[2,8]{1,0}, f32[8,8]{1,0}) fusion(%y), kind=kCustom, calls=%scatter_sum
  %overlapped = f32[8,8]{1,0} fusion(%y, %reduce), kind=kOutput, calls=%spread, EST(2000)
  %async-collective-done = f32[8,8]{1,0} fusion(%y), kind=kCustom, calls=%scatter_sum
  %cs = (f32[8,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %cd = f32[8,8]{1,0:T(8,128)S(1)} copy-done(%cs)
  %buffer = f32[8,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %off = ((f32[8,8]{1,0}), f32[8,8]{1,0}, u32[]) async-start(%y), async_execution_thread="sparsecore", calls=%sparse
  %offd = f32[8,8]{1,0} async-done(%off), async_execution_thread="sparsecore", calls=%sparse
  %kernel.2 = f32[8,8]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/shard_map/my_kernel/pallas_call" source_file="/code/a.py" source_line=1}, backend_config={"custom_call_config":{"body":"QUJD","cost_estimate":{"flops":"4000","transcendentals":"3","bytes_accessed":"200"}}}
  %silent = f32[8,8]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/silent/pallas_call"}
  ROOT %mystery = f32[8,8]{1,0} tanh(%y), metadata={source_file="/code/c.py" source_line=3}
}
"""


def _parsed(text: str) -> Module:
    written = r'backend_config={"window_config":{"estimated_cycles":"\1"}}'
    return parse_module(re.sub(r"EST\((\d+)\)", written, text))


def _cycles() -> Module:
    return _parsed(CYCLES)


MODEL = stated_kernel_cost(
    peak_flops_per_second=1000.0, matmul_efficiency=0.5, bytes_per_second=100.0, cycles_per_second=10.0
)


def test_cycles_by_category():
    cost = step_cost(_cycles(), kernel_cost=MODEL)
    assert set(cost.by_category) == set(CATEGORIES)
    assert cost.by_category == {
        "matmul": Work(3 + 1, 3 * 1000.0 + 2000, 0),  # what stands inside of a fusion is not added
        "kernel": Work(2, 4000 / 500 * 10, 1),
        "copy": Work(2, 340.0, 0),
        "elementwise": Work(4, 20.0 + 5 + 6, 1),
        "slice": Work(1, 100.0, 0),
        "other": Work(1, 7000.0, 0),
        "collective": Work(4, 50.0, 3),  # a start and its done are one
        "offloaded": Work(1, 777.0, 0),
    }
    assert cost.cycles == 5000 + 80 + 340 + 31 + 100 + 7000
    assert cost.matmul_flops == 4 * 2 * 8**3


def test_nothing_is_dropped_in_silence():
    cost = step_cost(_cycles(), kernel_cost=MODEL)
    assert [(u.name, u.runs, u.line) for u in cost.unpriced] == [("silent", 1, ""), ("mystery", 1, "/code/c.py:3")]
    assert cost.transfers == {"copy": Transfer(1, 8 * 128 * 4), "async": Transfer(1, 256)}
    assert cost.scalar_runs == 3 + 4  # the counter and its test
    assert cost.unresolved_loops == () and cost.conditionals == ()


@pytest.mark.parametrize(
    "written", ["9223372036854775807", "-12", "9223372036854775808", "18000000000000", "nan", "1e30"]
)
def test_a_number_that_is_no_estimate_is_unknown_and_never_added(written):
    """2^63 - 1 is what libtpu 0.0.50 writes for work of a SparseCore; the others are of the same kind."""
    text = re.sub(
        r"EST\((777|7000|50)\)", f'backend_config={{"window_config":{{"estimated_cycles":"{written}"}}}}', CYCLES
    )
    cost = step_cost(_parsed(text), kernel_cost=MODEL)
    assert cost.by_category["other"] == Work(1, 0.0, 1)
    assert cost.by_category["offloaded"] == Work(1, 0.0, 1)
    assert cost.by_category["collective"] == Work(4, 0.0, 4)
    assert cost.cycles == 5000 + 80 + 340 + 31 + 100
    assert sum(c for row in cost.cycles_by_line.values() for c in row.values()) == cost.cycles
    found = {u.name: (u.category, u.runs, u.bytes, u.written) for u in cost.unpriced if u.written}
    assert found.pop("order") == ("other", 1, 2 * 256, written)
    assert found.pop("reduce") == ("collective", 1, 256 + 64, written)
    assert [entry[0] for entry in found.values()] == ["offloaded"]
    assert {u.name for u in cost.missing} == {"silent", "mystery", "order"}


def test_work_of_a_sparse_core_with_a_number_that_is_no_estimate_is_beside_the_rest():
    """As libtpu 0.0.50 writes it on all three parts; 0.0.52 writes none, and the plan is the same."""
    text = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %s = ((f32[8,8]{1,0}), f32[8,8]{1,0}, u32[]) custom-call-start(%x), custom_call_target="SparseCore"NUMBER
  %u = ((f32[8,8]{1,0}), f32[8,8]{1,0}, u32[]) custom-call-update(%s)NUMBER
  %d = f32[8,8]{1,0} custom-call-done(%u)NUMBER
  ROOT %c = f32[8,8]{1,0} copy(%d), EST(40)
}
"""
    number = ', backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}'
    with_numbers, without = (step_cost(_parsed(text.replace("NUMBER", x)), kernel_cost=MODEL) for x in (number, ""))
    assert with_numbers.cycles == without.cycles == 40
    assert with_numbers.by_category == without.by_category and with_numbers.transfers == without.transfers
    assert without.unpriced == with_numbers.missing == ()
    ((name, category, written),) = ((u.name, u.category, u.written) for u in with_numbers.unpriced)
    assert (name, category, written) == ("s", "offloaded", "9223372036854775807")


def test_cycles_by_line_and_scope():
    cost = step_cost(_cycles(), kernel_cost=MODEL)
    assert list(cost.cycles_by_line)[1:] == ["/code/a.py:1", "/code/b.py:2"]
    assert cost.cycles_by_line["/code/a.py:1"] == {"matmul": 3000, "kernel": 80}
    assert cost.cycles_by_scope["forward/mlp"] == {"matmul": 3000}
    assert sum(c for row in cost.cycles_by_line.values() for c in row.values()) == cost.cycles + 50 + 777


def test_the_result_is_json():
    cost = step_cost(_cycles(), kernel_cost=MODEL)
    read = json.loads(json.dumps(cost.to_json()))
    assert read["by_category"]["slice"] == {"runs": 1, "cycles": 100, "unpriced_runs": 0}
    assert read["kernels"][0]["name"] == "my_kernel"


def test_a_kernel_priced_by_the_caller():
    cost = step_cost(_cycles(), kernel_cost=lambda call: KernelCost(9.0, "mine") if call.name == "silent" else None)
    assert [(k.name, k.cycles, k.basis) for k in cost.kernels] == [("my_kernel", None, ""), ("silent", 9.0, "mine")]
    assert [u.name for u in cost.unpriced] == ["kernel.2", "mystery"]


def test_a_kernel_bound_by_bytes():
    kernel = _cycles().entry["kernel.2"]
    assert stated_cost(kernel).transcendentals == 3
    slow = stated_kernel_cost(
        peak_flops_per_second=1e9, matmul_efficiency=1.0, bytes_per_second=100.0, cycles_per_second=10.0
    )
    assert slow(kernel) == KernelCost(20.0, "stated bytes")
    assert MODEL(kernel) == KernelCost(80.0, "stated flops")


# --- what the TPU compiler writes today ----------------------------------------------------------------------------


ROWS = PartitionSpec("data")


def _tpu_text(function, *shapes, target="v5p:2x2x1", specs=(ROWS, ROWS, ROWS), dtype=jnp.bfloat16) -> str:
    described = topology(target)
    mesh = topologies.make_mesh(described, (len(described.devices),), ("data",))
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=False)
    ]
    return jax.jit(function(mesh)).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("fused", [False, True])
def test_splash_attention_is_recognised(fused):
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((256, 256))] * 2)
    sizes = dict.fromkeys(["block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"], 128)
    if not fused:
        sizes |= {"block_q_dq": 128, "block_kv_dq": 128}
    blocks = splash_attention_kernel.BlockSizes(**sizes, use_fused_bwd_kernel=fused)

    def gradient(mesh):
        attend = splash_attention_kernel.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
        attend = jax.shard_map(jax.vmap(attend), mesh=mesh, in_specs=(ROWS,) * 3, out_specs=ROWS, check_vma=False)

        def loss(q, k, v):
            y, _ = jax.lax.scan(lambda q, _: (attend(q, k, v), None), q, None, length=3)
            return jnp.sum(y.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        text = _tpu_text(gradient, *[(4, 2, 256, 128)] * 3)
    cost = step_cost(parse_module(text), kernel_cost=lambda call: KernelCost(1000.0, kernel_name(call)))
    names = [
        "splash_mha_fwd_residuals",
        "splash_mha_dkv_no_residuals",
        *([] if fused else ["splash_mha_dq_no_residuals"]),
    ]
    assert sorted((k.name, k.runs, k.basis) for k in cost.kernels) == sorted((n, 3, n) for n in names)
    assert cost.by_category["kernel"] == Work(3 * len(names), 3000.0 * len(names), 0)
    forward = next(k for k in cost.kernels if "fwd" in k.name)
    assert forward.settings["block_q"] == 128 and forward.flops is None
    assert "bf16[2,256,128]" in forward.operands and "bf16[2,256,128]" in forward.results
    assert cost.unpriced == ()


def test_what_a_kernel_states_survives_compilation():
    stated = pl.CostEstimate(flops=12345, bytes_accessed=6789, transcendentals=11)

    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.tanh(x_ref[...])

    def run(mesh):
        shape = jax.ShapeDtypeStruct((64, 128), jnp.float32)
        call = pl.pallas_call(kernel, out_shape=shape, cost_estimate=stated, name="my_kernel")
        return jax.shard_map(call, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False)

    module = parse_module(_tpu_text(run, (256, 128), dtype=jnp.float32))
    (call,) = (i for i in module.instructions() if is_kernel(i))
    found = stated_cost(call)
    assert (found.flops, found.bytes_accessed, found.transcendentals) == (12345, 6789, 11)
    assert kernel_name(call) == "my_kernel" and call.estimated_cycles is None


def test_matmuls_that_gather_their_weights_piecewise_are_counted_once():
    """On v5e the gather of the next weight is spread over the matmul fusions, and named in each of them."""

    def gradient(mesh):
        whole = NamedSharding(mesh, PartitionSpec())

        def layer(x_BD, w_4DD):
            for w_DD in w_4DD:
                x_BD = jnp.tanh(x_BD @ jax.lax.with_sharding_constraint(w_DD, whole))
            return x_BD, None

        def loss(w_L4DD, x_BD):
            y_BD, _ = jax.lax.scan(jax.checkpoint(layer), x_BD, w_L4DD)
            return jnp.sum(y_BD.astype(jnp.float32))

        return jax.value_and_grad(loss)

    D, rows, layers = 2048, 16384, 3
    specs = (PartitionSpec(None, None, "data"), ROWS)
    text = _tpu_text(gradient, (layers, 4, D, D), (rows, D), target="v5e:4x4", specs=specs)
    assert "async_collective_fusion" in text
    cost = step_cost(parse_module(text), kernel_cost=lambda call: None)
    # Forward, recomputed, and two products in the backward pass.
    assert cost.matmul_flops == layers * 4 * 4 * (2 * rows // 16 * D * D)
    assert cost.by_category["matmul"].unpriced_runs == 0
