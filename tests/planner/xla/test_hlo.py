# ruff: noqa: E501 - lines as compilers write them
from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from intttrain.planner.xla.hlo import Frame, parse_module
from intttrain.planner.xla.shapes import Shape, parse_shape, split_top_level
from tests.planner.planted import TARGETS, compiled_text, topology

HEADER = (
    "HloModule jit_step, is_scheduled=true, input_output_alias={ {1}: (0, {}, may-alias), {2, 0}: (3, {1}, must-alias) },"
    " entry_computation_layout={(f32[4]{0:T(128)})->f32[4]{0:T(128)}}, num_partitions=64\n"
)
TABLES = """
FileNames
1 "/code/pkg/model.py"
2 "/code/run.py"

FunctionNames
1 "mlp"
2 "<module>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=14 end_line=14 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=99 end_line=99 column=1 end_column=2}

StackFrames
"""
BODY = r"""
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0:T(128)} parameter(0)
  ROOT %tanh.1 = f32[4]{0:T(128)} tanh(%p), metadata={op_name="jit(step)/mlp/tanh" stack_frame_id=2}
}

%offload (q: f32[4]) -> f32[4] {
  %q = f32[4]{0:T(128)} parameter(0)
  ROOT %copy.9 = f32[4]{0:T(128)} copy(%q)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[4], y: (f32[4], /*index=1*/bf16[2,3])) -> f32[4] {
  %y = (f32[4]{0:T(128)}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)S(1)}) parameter(1)
  %x = f32[4]{0:T(128)} parameter(0), sharding={devices=[4,1]<=[4] last_tile_dim_replicate}
  %c = s32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %kernel.3 = (f32[4]{0:T(128)}, f32[2,8]{1,0}) custom-call(%x, /*index=1*/%c), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"{\"block\": 256, \"brace\": \"}\"}"
}}, metadata={op_name="jit(step)/a \"quoted\" scope/pallas_call" stack_frame_id=1}, backend_config={"custom_call_config":{"body":"QUJD{,"}}
  %got = f32[4]{0:T(128)} get-tuple-element(%kernel.3), index=0
  ROOT %out = f32[4]{0:T(128)} fusion(%got), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"321"}}
}
"""


def _module(frames: str, body: str = BODY):
    return parse_module(HEADER + TABLES + frames + "\n" + body)


SHIFTED = "1 {file_location_id=2 parent_frame_id=1}\n2 {file_location_id=1 parent_frame_id=2}\n"
PLAIN = "1 {file_location_id=2 parent_frame_id=0}\n2 {file_location_id=1 parent_frame_id=1}\n"


def test_header():
    module = _module(SHIFTED)
    assert (module.name, module.num_partitions, module.is_scheduled) == ("jit_step", 64, True)
    assert (module.entry_name, list(module.computations)) == ("main", ["fused", "offload", "main"])
    aliases = [(a.output_index, a.parameter, a.parameter_index, a.kind) for a in module.input_output_alias]
    assert aliases == [((1,), 0, (), "may-alias"), ((2, 0), 3, (1,), "must-alias")]


def test_instructions():
    entry = _module(SHIFTED).entry
    assert [i.name for i in entry.instructions] == ["y", "x", "c", "kernel.3", "got", "out"]
    assert entry.root.name == "out" and [p.name for p in entry.parameters] == ["x", "y"]
    assert entry["kernel.3"].operands == ("x", "c") and entry["c"].operands == ()
    assert entry["kernel.3"].shape.elements[1].dims == (2, 8)
    assert entry["got"].attribute_ints("index") == (0,)
    assert entry["out"].called == ("fused",) and entry["out"].attributes["kind"] == "kLoop"
    assert [entry[n].estimated_cycles for n in ("out", "got")] == [321, None]
    assert entry["x"].attributes["sharding"] == "{devices=[4,1]<=[4] last_tile_dim_replicate}"


def test_an_attribute_over_several_lines_does_not_end_the_computation():
    kernel = _module(SHIFTED).entry["kernel.3"]
    assert kernel.attributes["custom_call_target"] == '"tpu_custom_call"'
    assert r"\"block\": 256" in kernel.attributes["frontend_attributes"]
    assert kernel.backend_config["custom_call_config"]["body"] == "QUJD{,"
    assert kernel.op_name == r"jit(step)/a \"quoted\" scope/pallas_call"


def test_the_thread_of_a_computation():
    module = _module(SHIFTED)
    assert [c.execution_thread for c in module.computations.values()] == ["", "sparsecore", ""]


@pytest.mark.parametrize("frames", [SHIFTED, PLAIN])
def test_frames_whichever_way_parents_are_counted(frames):
    tanh = _module(frames).computations["fused"]["tanh.1"]
    assert tanh.frames == (Frame("/code/pkg/model.py", 14, "mlp"), Frame("/code/run.py", 99, "<module>"))
    assert tanh.source_in("/code/pkg") == tanh.frames[0]
    assert tanh.source_in("/code") == tanh.frames[0]
    assert tanh.source_in("/code/run.py") == tanh.frames[1]
    assert tanh.source_in("/code/pk") is None


def test_source_written_into_the_instruction():
    body = BODY.replace("stack_frame_id=2", 'source_file="/old/model.py" source_line=7')
    tanh = _module(SHIFTED, body).computations["fused"]["tanh.1"]
    assert tanh.frames == (Frame("/old/model.py", 7),)
    assert _module(SHIFTED, body).entry["got"].source is None


def test_operands_with_shapes_and_names_without_percent():
    text = (
        HEADER
        + "\nENTRY main {\n  a = f32[4]{0} parameter(0)\n  ROOT b.1 = f32[4]{0} add(f32[4]{0} a, f32[4]{0} a)\n}\n"
    )
    assert parse_module(text).entry["b.1"].operands == ("a", "a")


def test_a_literal_over_several_lines():
    body = BODY.replace("constant({ { 1, 2 }, { 3, 4 } })", "constant({\n{ 1, 2 },\n{ 3, 4 }\n})")
    entry = _module(SHIFTED, body).entry
    assert entry["c"].argument == "{ { 1, 2 }, { 3, 4 } }" and len(entry.instructions) == 6


def test_backend_config_as_a_string():
    body = BODY.replace(
        'backend_config={"window_config":{"estimated_cycles":"321"}}', r'backend_config="{\"n\":{\"m\":5}}"'
    )
    assert _module(SHIFTED, body).entry["out"].backend_config == {"n": {"m": 5}}


@pytest.mark.parametrize("text", ["", "module @jit_f {", "HloModule x, is_scheduled=true\n"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="HLO"):
        parse_module(text)


def test_split_top_level():
    assert split_top_level(r'a={1,2}, b="x,\"}", c=(d, [e, f]),, g') == ["a={1,2}", r'b="x,\"}"', "c=(d, [e, f])", "g"]


@pytest.mark.parametrize(
    ("text", "plain", "padded"),
    [
        ("bf16[5,100]{1,0:T(8,128)(2,1)}", 1000, 8 * 128 * 2),
        ("f32[33,3,200]{2,0,1:T(8,128)S(1)}", 33 * 3 * 200 * 4, 3 * 40 * 256 * 4),  # the middle dim is not padded
        ("f32[33,3,200]{2,1,0:T(8,128)}", 33 * 3 * 200 * 4, 33 * 8 * 256 * 4),
        ("f32[]{:T(128)}", 4, 512),
        ("bf16[1000]{0:T(1024)(128)(2,1)}", 2000, 2048),
        ("s4[9,130]{1,0:T(8,128)(8,1)E(4)}", 585, 16 * 256 // 2),
        ("s4[9,130]{1,0}", 9 * 130, 9 * 130),  # no layout packs it
        ("f8e4m3fn[9,130]{1,0:T(8,128)(4,1)}", 1170, 16 * 256),
        ("pred[7]{0}", 7, 7),
        ("f32[0,5]{1,0:T(8,128)}", 0, 0),
        ("c64[3]", 24, 24),
        ("s32[<=6]{0}", 24, 24),
        ("u32[]{:S(2)}", 4, 4),
        ("token[]", 0, 0),
        ("()", 0, 0),
        ("(f32[5,100]{1,0:T(8,128)}, /*index=1*/(s32[]{:T(128)}, token[]))", 2004, 4096 + 512),
    ],
)
def test_bytes(text, plain, padded):
    shape = parse_shape(text)
    assert (shape.bytes, shape.padded_bytes) == (plain, padded)


def test_layout():
    assert parse_shape("bf16[2,3]{0,1:T(8,128)(2,1)S(5)}") == Shape(
        "bf16", (2, 3), minor_to_major=(0, 1), tiles=((8, 128), (2, 1)), memory_space=5, element_bits=16
    )
    with pytest.raises(ValueError, match="not an HLO shape"):
        parse_shape("bf16 2 by 3")


# --- what compilers write today ------------------------------------------------------------------------------------


def _tanh_of_sum(x, y):
    return {"out": jnp.tanh(x + y), "x": x + 1}


@pytest.mark.parametrize("target", TARGETS)
def test_whole_texts_are_consistent(target):
    module = parse_module(compiled_text(_tanh_of_sum, ((9, 130), (9, 130)), target))
    for computation in module.computations.values():
        assert sum(i.is_root for i in computation.instructions) == 1
        for instruction in computation.instructions:
            assert set(instruction.operands) <= set(computation.by_name)
            assert set(instruction.called) <= set(module.computations)
    tanh = next(i for i in module.instructions() if i.opcode == "tanh")
    line = _tanh_of_sum.__code__.co_firstlineno + 1
    assert tanh.source is not None and (tanh.source.file, tanh.source.line) == (__file__, line)
    assert "tanh" in tanh.op_name


def test_donation():
    donating = jax.jit(lambda x, y: (y * 2, x + y), donate_argnums=0)
    argument = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    (alias,) = parse_module(donating.lower(argument, argument).compile().as_text()).input_output_alias
    assert alias.parameter == 0 and alias.parameter_index == () and alias.output_index in [(0,), (1,)]


@pytest.mark.parametrize("target", TARGETS[1:])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8, jnp.int4, jnp.bool_])
def test_padded_bytes_are_those_of_the_allocation(target, dtype):
    mesh = jax.sharding.Mesh(topology(target).devices[:1], ("one",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = [(9, 130), (33, 3, 200), (1000,), (2, 3000), ()]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape in shapes]
    program = jax.jit(lambda *xs: sum(jnp.sum(x.astype(jnp.float32)) for x in xs)).lower(*arguments).compile()
    parameters = parse_module(program.as_text()).entry.parameters
    allocated = program.memory_analysis().argument_size_in_bytes
    assert sum(p.shape.padded_bytes for p in parameters) == allocated > sum(p.shape.bytes for p in parameters)


@pytest.mark.parametrize(
    ("written", "cycles"),
    [("321", 321), ("0", 0), ("9223372036854775807", None), ("-5", None), ("10000000000001", None), ("inf", None)],
)
def test_an_estimate_is_a_number_that_can_be_true(written, cycles):
    instruction = _module(SHIFTED, BODY.replace('"321"', f'"{written}"')).entry["out"]
    assert (instruction.estimated_cycles, instruction.written_cycles) == (cycles, written)
