"""The TPU kernels in interpret mode: the scans of XLA in value and every gradient, without races between the cores."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from intttrain import ttt
from intttrain.config.errors import UserError
from intttrain.ttt import api, chunked, kernel_blocks, kernel_parts, kernel_scans, kernel_suffix
from intttrain.ttt.kernel_blocks import Kernels, fitting, recurrence_ledger, suffix_ledger
from intttrain.ttt.kernel_parts import Machine
from intttrain.ttt.kernel_recurrence import RecurrenceBlocks
from intttrain.ttt.kernel_suffix import SuffixBlocks
from intttrain.ttt.layout import make_layout
from tests.planner.planted import topology
from tests.ttt.cases import BY_NAME, assert_close, cotangents, gradients

# The interpreter's threads wait for each other: with one they would wait for ever.
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two interpreted cores need two threads")
INTERPRET = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
BLOCKS = RecurrenceBlocks(128, 128)
# Tokens of the documents of a row of 5 chunks of 24, of the first of which a state came in: one that ends inside a
# chunk, on a chunk's edge, several in one chunk, padding between them and at the end.
DOCUMENTS = ((1, 27), (2, 45), (3, 30), (0, 2), (4, 3), (5, 5), (0, 8))
CHUNKS = 5


@dataclasses.dataclass(frozen=True)
class Scan:
    """Arguments of both scans."""

    width: int
    d_ff: int
    dtype: str
    cores: int
    tokens: int  # of a block of the suffix scan

    @property
    def kernels(self) -> Kernels:
        shape = tuple(kernel_blocks.padded(size, 128) for size in (self.width, self.d_ff))
        return Kernels(Machine(2**26, INTERPRET), self.cores, shape, BLOCKS, BLOCKS, SuffixBlocks(128, self.tokens))

    def inputs(self) -> tuple[jax.Array, jax.Array, jax.Array, chunked.Chunks, jax.Array, jax.Array]:
        """W0, eta, the incoming state, chunks, the gradient of what is read, and that of the last state."""
        rng = np.random.default_rng(0)
        normal = lambda *shape, dtype="float32": jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
        ids = np.concatenate([np.full(tokens, document) for document, tokens in DOCUMENTS])
        layout = make_layout(jnp.asarray(ids[None], jnp.int32), len(ids) // CHUNKS, jnp.asarray([1], jnp.int32))
        tokens = len(ids) // CHUNKS
        chunks = chunked.Chunks(
            normal(CHUNKS, tokens, self.d_ff, dtype=self.dtype), normal(CHUNKS, tokens, self.width, dtype=self.dtype),
            layout.reads_BMC[0], layout.writes_BMC[0], layout.keeps_BM[0], jnp.asarray([0.5, 1.0, 0.0, 2.0, 1.0]),
        )  # fmt: skip
        w_DF, s_in_DF, g_end_DF = (0.1 * normal(self.width, self.d_ff) for _ in range(3))
        do_MCD = normal(CHUNKS, tokens, self.width, dtype=self.dtype)
        return w_DF, jnp.float32(0.05), s_in_DF, chunks, do_MCD, g_end_DF


ODD = Scan(200, 250, "float32", cores=2, tokens=16)  # padded to 256 x 256: one launch of the suffix scan on two cores
BF16 = Scan(128, 256, "bfloat16", cores=1, tokens=32)  # two launches
# Sums of products of the same numbers in another order; bf16 results are rounded once from these.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8}


def compare(actual, wanted, tolerance):
    for name, x, y in zip(wanted._fields, actual, wanted, strict=True):
        if y is not None:
            assert x.dtype == y.dtype, name
            assert_close(x.astype(jnp.float32), y.astype(jnp.float32), tolerance, name)


def compare_forward(scan: Scan) -> None:
    w_DF, eta, s_in_DF, chunks, *_ = scan.inputs()
    wanted_DF, wanted = jax.jit(chunked.forward_scan, static_argnums=0)(ttt.UpdateRule(), w_DF, eta, s_in_DF, chunks)
    s_end_DF, actual = kernel_scans.forward_scan(scan.kernels, w_DF, eta, s_in_DF, chunks)
    assert not interpreter.races.races_found
    assert_close(s_end_DF, wanted_DF, TOLERANCE["float32"], "state")
    compare(actual, wanted, TOLERANCE[scan.dtype])


def compare_backward(scan: Scan, *, given: bool) -> None:
    w_DF, eta, s_in_DF, chunks, do_MCD, g_end_DF = scan.inputs()
    arguments = (w_DF, eta, 0.5 * w_DF, s_in_DF, chunks, do_MCD, g_end_DF if given else None)
    wanted_DF, wanted = jax.jit(chunked.backward_scans, static_argnums=0)(ttt.UpdateRule(), *arguments)
    dw_DF, actual = kernel_scans.backward_scans(scan.kernels, *arguments)
    assert not interpreter.races.races_found
    assert_close(dw_DF, wanted_DF, TOLERANCE["float32"], "W0")
    compare(actual, wanted, TOLERANCE[scan.dtype])


@needs_two_cores
@pytest.mark.parametrize("scan", [ODD, BF16], ids=["odd", "bf16"])
def test_forward_is_that_of_xla(scan):
    compare_forward(scan)


@needs_two_cores
@pytest.mark.parametrize(
    ("scan", "given", "at_once"),
    [
        pytest.param(ODD, True, 32, id="odd"),
        pytest.param(BF16, False, 4, id="bf16, a launch for every chunk", marks=pytest.mark.slow),
    ],
)
def test_backward_is_that_of_xla(scan, given, at_once, monkeypatch):
    monkeypatch.setattr(kernel_scans, "GROUP_CHUNKS", at_once)
    compare_backward(scan, given=given)


def test_long_rows_are_cut_into_groups_of_equal_size_if_that_pays():
    assert [kernel_scans._groups(chunks) for chunks in (1, 32, 33, 64, 96, 256, 37)] == [1, 1, 3, 2, 3, 8, 1]


def test_the_documents_meet_every_kind_of_chunk():
    """Whole, read by none, and mixed with the state kept or not; otherwise the comparisons above would miss one."""
    chunks = ODD.inputs()[3]
    reads_M, kept = np.asarray(chunks.reads_MC).mean(1), np.asarray(chunks.keep_M) > 0
    mixed = (reads_M > 0) & (reads_M < 1)
    assert (kept & (reads_M == 1)).any() and (~kept & (reads_M == 0)).any()
    assert (~kept & mixed).any()


@needs_two_cores
@pytest.mark.parametrize(("name", "fresh"), [("one_row", False), ("aligned_with_padding", True)])
def test_the_whole_layer_is_the_reference(monkeypatch, name, fresh):
    """Through the door, in value and every gradient: rows with states of their own, and rows run as one."""
    kernels = Kernels(Machine(2**26, INTERPRET), 1, (128, 128), BLOCKS, BLOCKS, SuffixBlocks(128, 16))
    monkeypatch.setattr(api, "supports", lambda _: "")
    monkeypatch.setattr(api, "choose_kernels", lambda *_: kernels)
    case = BY_NAME[name]
    along_o_BTD, along_s_BDF = cotangents(case)
    along = (along_o_BTD, 0.0 * along_s_BDF if fresh else along_s_BDF)
    wanted, reference = gradients(case, "reference", along=along)
    actual, output = gradients(case, "pallas", along=along, fresh=fresh)
    assert_close(output.o_BTD, reference.o_BTD, 1e-5, "o")
    for leaf in set(wanted) - ({"s_in"} if fresh else set()):
        assert_close(actual[leaf], wanted[leaf], 2e-5, leaf)


# --- planted faults ----------------------------------------------------------------------------------------------


@needs_two_cores
def test_documents_that_begin_inside_a_chunk_are_seen(monkeypatch):
    monkeypatch.setattr(kernel_parts, "either", lambda condition, usual, other: usual())
    with pytest.raises(AssertionError, match="o_MCD: error"):
        compare_forward(ODD)


@needs_two_cores
def test_a_gradient_that_is_not_handed_over_is_seen(monkeypatch):
    monkeypatch.setattr(kernel_suffix, "_AFTER", kernel_suffix._BEFORE)
    with pytest.raises(AssertionError, match="dz_MCF: error"):
        compare_backward(ODD, given=True)


@needs_two_cores
def test_cores_that_write_the_same_tile_are_a_race(monkeypatch):
    copy = kernel_parts.tile_copy
    monkeypatch.setattr(kernel_parts, "tile_copy", lambda *arguments, **back: copy(*arguments[:4], 0, **back))
    with pytest.raises(AssertionError, match="races_found"):
        compare_forward(ODD)


# --- shapes and blocks ---------------------------------------------------------------------------------------------

SHAPES = ((1024, 3072), (2048, 6144), (2560, 9728), (4096, 12288), (4096, 14336), (5120, 17408))


@pytest.mark.parametrize("chip", sorted(kernel_blocks.VMEM_MIB))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_shipped_shapes_have_blocks_that_divide_them_and_fit(chip, shape):
    cores, (width, d_ff) = 2 if chip == "v5p" else 1, shape
    for chunk_tokens in (256, 1024):
        found = fitting(chip, cores, chunk_tokens, width, d_ff, itemsize=2)
        assert isinstance(found, Kernels), found
        for blocks, rows, columns in ((found.forward, width, d_ff), (found.prefix, d_ff, width)):
            assert rows % (cores * blocks.tile) == columns % blocks.columns == 0
            ledger = recurrence_ledger(blocks, chunk_tokens, columns, 2, forward=blocks is found.forward)
            assert sum(ledger.values()) <= found.machine.vmem_bytes
        assert d_ff % (cores * found.suffix.tile) == chunk_tokens % found.suffix.tokens == 0
        assert sum(suffix_ledger(found.suffix, width, 2).values()) <= found.machine.vmem_bytes


def test_what_cannot_run_is_refused_in_one_line_or_left_to_xla(monkeypatch):
    arguments = (ttt.UpdateRule(), 1024, (2560, 9728), 2)
    with pytest.raises(UserError, match="TPUs only, not on cpu; or use"):
        api._kernels("pallas", *arguments)
    assert api._kernels("auto", *arguments) is None
    monkeypatch.setattr(kernel_blocks, "platform", lambda: "tpu")
    for kind, said in (("TPU v4", "too little on-chip memory"), ("TPU v5", "no bounds")):
        monkeypatch.setattr(kernel_blocks, "device_kind", lambda kind=kind: kind)
        with pytest.raises(UserError, match=said):
            api._kernels("pallas", ttt.UpdateRule(clip=1.0), *arguments[1:])
    with pytest.raises(UserError, match="smaller chunk_tokens"):
        api._kernels("pallas", ttt.UpdateRule(), 65536, *arguments[2:])
    assert api._kernels("auto", ttt.UpdateRule(), 65536, *arguments[2:]) is None
    assert isinstance(api._kernels("pallas", *arguments), Kernels)
    assert isinstance(api._kernels("auto", *arguments), Kernels)
    assert api._kernels("auto", ttt.UpdateRule(), 2048, *arguments[2:]) is None  # XLA is as fast, for all we know
    assert api._kernels("auto", ttt.UpdateRule(), 1024, (1024, 3072), 2) is None  # not compared
    assert api._kernels("chunked", *arguments) is None
    monkeypatch.setattr(kernel_blocks, "pieces_of", lambda *_: 2)
    with pytest.raises(UserError, match=r"mesh.tensor=2 cuts the state"):
        api._kernels("pallas", *arguments)


@pytest.mark.parametrize("name", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_compile_for_every_chip(name):
    """Ahead of time, for one device of a described topology: the compiler takes the layouts, copies and conditions."""
    chip, tokens, width, d_ff = name.split(":")[0], 128, 256, 512
    kernels = fitting(chip, 2 if chip == "v5p" else 1, tokens, width, d_ff, itemsize=2)
    sharding = jax.sharding.SingleDeviceSharding(topology(name).devices[0])
    shaped = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    chunks = chunked.Chunks(
        shaped(2, tokens, d_ff, dtype="bfloat16"), shaped(2, tokens, width, dtype="bfloat16"),
        shaped(2, tokens), shaped(2, tokens), shaped(2), shaped(2),
    )  # fmt: skip
    state = shaped(width, d_ff)

    def run(w_DF, eta, s_in_DF, chunks, do_MCD):
        forward = kernel_scans.forward_scan(kernels, w_DF, eta, s_in_DF, chunks)
        return forward, kernel_scans.backward_scans(kernels, w_DF, eta, w_DF, s_in_DF, chunks, do_MCD, s_in_DF)

    text = jax.jit(run).lower(state, shaped(), state, chunks, chunks.v_MCD).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 + d_ff // (kernels.suffix.tile * kernels.cores)
