"""The one table of packed rows on which every form of the method is compared.

A row is written as lengths: ``(7, 5, -4)`` is a document of 7 tokens, one of 5, and 4 tokens of padding.

Letters: B row, T tokens, C tokens per chunk, M chunks, D model width, F feed-forward width, W conv taps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intttrain import ttt
from intttrain.layout.row_order import stored_units
from intttrain.ttt.layout import NO_DOCUMENT
from tests.ttt import loop
from tests.ttt.other_rules import DeltaRule, Forgets

D, F, T, C = 8, 12, 16, 4
PLAIN = ttt.UpdateRule()
Leaves = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows, and how the fast weight moves in them.

    ``carried`` names the document that came in, per row; the gates of the chunks ``shut`` are 0.
    """

    name: str
    rows: tuple[tuple[int, ...], ...]
    carried: tuple[int, ...] | None = None
    chunk_tokens: int = C
    conv: bool = True
    update: ttt.UpdateRule = PLAIN
    shut: tuple[int, ...] = ()

    @property
    def segments_BT(self) -> np.ndarray:
        return np.stack([segments(row) for row in self.rows])

    @property
    def document_B(self) -> np.ndarray:
        return np.array(self.carried or (NO_DOCUMENT,) * len(self.rows), np.int32)


def segments(row: tuple[int, ...]) -> np.ndarray:
    """Returns the segment ids (T) of a row written as lengths."""
    ids, document = [], 0
    for length in row:
        document += length > 0
        ids += [document if length > 0 else 0] * abs(length)
    assert len(ids) == T, row
    return np.array(ids, np.int32)


# Three rows each where nothing else is meant, so that cases share their compiled programs.
MIXED = ((1, 2, 5, 8), (4, 3, 1, 8), (1, 1, 2, 1, 7, 4))
CASES = (
    Case("one_document", ((16,), (8, 8), (15, 1))),
    Case("several_in_a_chunk", ((1, 2, 5, 8), (5, 1, 1, 1, 8), (9, 2, 1, 2, 2))),
    Case("ends_on_chunk_edge", ((4, 12), (8, 4, 4), (3, 1, 4, 8))),
    Case("single_tokens", ((1, 1, 2, 1, 7, 4), (1,) * 16, (3, 1, 1, 10, 1))),
    Case("trailing_padding", ((7, 5, -4), (8, -8), (15, -1))),
    Case("aligned_with_padding", ((3, -1, 5, -3, 4), (4, 1, -3, 8), (7, -1, 7, -1))),
    Case("chunk_of_padding", ((3, -5, 8), (-16,), (4, -4, 4, -4))),
    Case("state_in", ((7, 4, -5), (3, 13), (16,)), carried=(1, 1, 1)),
    Case("state_of_another_document", ((7, 4, -5), (-4, 12), (16,)), carried=(7, 9, 1)),
    Case("one_row", ((6, 3, 4, -3),), carried=(1,)),
    Case("two_rows", ((6, 3, 4, -3), (16,)), carried=(1, 1)),
    Case("four_rows", (*MIXED, (16,))),
    Case("next_position", MIXED, conv=False),
    Case("chunk_smaller_than_taps", MIXED, chunk_tokens=2),
    Case("one_chunk", MIXED, carried=(1, 1, 5), chunk_tokens=16),
    Case("gates_mixed", MIXED, shut=(0, 2)),
    Case("gates_shut", MIXED, carried=(1, 1, 1), shut=(0, 1, 2, 3)),
    Case("clip", MIXED, update=ttt.UpdateRule(clip=4.0)),
    Case("clip_and_spectral", MIXED, update=ttt.UpdateRule(clip=6.0, spectral=4.0)),
    Case("row_norm_and_clip", MIXED, (1, 1, 1), update=ttt.UpdateRule(clip=4.0, preserve_row_norm=True)),
    Case("forgets", MIXED, (1, 1, 1), update=Forgets()),
    Case("forgets_where_gates_are_shut", MIXED, (1, 1, 9), shut=(0, 2), update=Forgets()),
    Case("delta_rule_and_clip", MIXED, (1, 1, 1), update=DeltaRule(clip=4.0)),
)
BY_NAME = {case.name: case for case in CASES}


@functools.cache
def leaves_of(case: Case, seed: int = 0) -> Leaves:
    """Returns everything differentiable of a case, as fp32 numpy arrays.

    z and v have a common mean, as real activations do; it also separates the first singular value of an update
    from the second, without which a spectral norm has no stable gradient.
    """
    rng = np.random.default_rng(seed)
    rows, chunks = len(case.rows), T // case.chunk_tokens

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    leaves = {
        "z": normal(rows, T, F, mean=0.5),
        "x": normal(rows, T, D),
        "v": normal(rows, T, D, scale=0.5, mean=0.5),  # added to the targets, so that its gradient is seen alone
        "w_down": normal(D, F, scale=0.3),
        "w_target": normal(D, D, scale=0.3),
        "conv": normal(ttt.CONV_TAPS, D, scale=0.5),
        "gates": (0.5 + rng.random((rows, chunks))).astype(np.float32),
        "eta": np.float32(0.3),
        "s_in": normal(rows, D, F, scale=0.5) * (case.document_B != NO_DOCUMENT)[:, None, None],
    }
    leaves["gates"][:, list(case.shut)] = 0.0
    return leaves if case.conv else {name: leaf for name, leaf in leaves.items() if name != "conv"}


@functools.cache
def cotangents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fixed directions along which o and the returned state enter the loss."""
    rng = np.random.default_rng(99)
    rows = len(case.rows)
    return rng.standard_normal((rows, T, D)).astype(np.float32), rng.standard_normal((rows, D, F)).astype(np.float32)


def forward(
    case: Case,
    leaves: Leaves,
    segments_BT: Any,
    implementation: str = "chunked",
    *,
    fresh: bool = False,
    balanced: bool = False,
) -> ttt.FastWeightOutput:
    """Runs targets and projection of one layer; ``leaves`` in the dtypes that the test chose.

    ``fresh`` passes no state, as a trainer does, and gets none back. ``balanced``: rows are stored so.
    """
    leaves = {"conv": None} | jax.tree.map(jnp.asarray, leaves)
    segments_BT = jnp.asarray(segments_BT)
    v_BTD = ttt.make_targets(leaves["x"], leaves["w_target"], leaves["conv"], segments_BT, case.chunk_tokens)
    return ttt.fast_weight_projection(
        leaves["z"],
        v_BTD + leaves["v"],
        leaves["w_down"],
        segments_BT,
        chunk_tokens=case.chunk_tokens,
        eta=leaves["eta"],
        gates_BM=leaves["gates"],
        state=None if fresh else ttt.FastWeightState(leaves["s_in"], jnp.asarray(case.document_B)),
        update=case.update,
        balanced=balanced,
        implementation=implementation,
    )


def forward_loop(case: Case, leaves: Leaves, segments_BT: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns o and the carried sums of the float64 loop."""
    leaves = {"conv": None} | {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    segments_BT = case.segments_BT if segments_BT is None else segments_BT
    v_BTD = loop.targets(leaves["x"], leaves["w_target"], leaves["conv"], segments_BT, case.chunk_tokens)
    return loop.project(
        leaves["z"], v_BTD + leaves["v"], leaves["w_down"], segments_BT, case.chunk_tokens, leaves["eta"],
        leaves["gates"], leaves["s_in"], case.document_B, case.update,
    )  # fmt: skip


def loss_of(case: Case, o_BTD: Any, s_BDF: Any) -> Any:
    """Returns a scalar that depends on every output and on the returned state."""
    along_o_BTD, along_s_BDF = cotangents(case)
    return (o_BTD * along_o_BTD).sum() + (s_BDF * along_s_BDF).sum()


def shape_of(case: Case) -> Case:
    """Returns a case that stands for all that share compiled programs with this one."""
    return Case("", ((0,),) * len(case.rows), None, case.chunk_tokens, case.conv, case.update)


def loss_function(
    case_key: Case, implementation: str, *, fresh: bool = False, balanced_over: int | None = None
) -> Callable[..., Any]:
    """Returns ``loss_of`` and the output as a function of leaves, segments, documents and ``cotangents``.

    With ``balanced_over`` context shards the layer gets rows stored balanced, of which nothing is seen outside.
    """
    balanced, chunk_tokens = balanced_over is not None, case_key.chunk_tokens
    tokens_T, chunks_M = (stored_units(T, balanced_over or 1, unit, balanced=balanced) for unit in (1, chunk_tokens))

    def as_read(output: ttt.FastWeightOutput) -> ttt.FastWeightOutput:
        by_chunk = ("delta_norm_BM", "state_norm_BM")
        read = {name: getattr(output, name)[:, np.argsort(chunks_M)] for name in by_chunk}
        return output._replace(o_BTD=output.o_BTD[:, np.argsort(tokens_T)], **read)

    def loss(leaves: Leaves, segments_BT: jax.Array, document_B: jax.Array, along: Any) -> Any:
        case = _Shaped(case_key, document_B)
        if balanced:
            stored = {name: leaves[name][:, tokens_T] for name in ("z", "x", "v")}
            leaves = leaves | stored | {"gates": leaves["gates"][:, chunks_M]}
            segments_BT = segments_BT[:, tokens_T]
        output = forward(case, leaves, segments_BT, implementation, fresh=fresh, balanced=balanced)
        output = as_read(output) if balanced else output
        along_o_BTD, along_s_BDF = along
        value = jnp.sum(output.o_BTD.astype(jnp.float32) * along_o_BTD)
        return (value if fresh else value + jnp.sum(output.state.s_BDF * along_s_BDF)), output

    return loss


@functools.cache
def _program(case_key: Case, implementation: str, fresh: bool) -> Any:
    # The reference is unrolled over tokens: it is compiled without optimisation, which takes half as long.
    options = {"xla_backend_optimization_level": 0} if implementation == "reference" else None
    loss = loss_function(case_key, implementation, fresh=fresh)
    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)


class _Shaped:
    """A case whose documents are traced: cases of equal shape share one compiled program."""

    def __init__(self, case: Case, document_B: jax.Array):
        self.chunk_tokens, self.update, self.document_B = case.chunk_tokens, case.update, document_B


def gradients(
    case: Case,
    implementation: str,
    leaves: Leaves | None = None,
    segments_BT: np.ndarray | None = None,
    *,
    along: Any = None,
    fresh: bool = False,
) -> tuple[Leaves, ttt.FastWeightOutput]:
    """Returns the gradient of ``loss_of`` for every leaf, and the output; ``along`` in place of ``cotangents``."""
    leaves = leaves_of(case) if leaves is None else leaves
    segments_BT = case.segments_BT if segments_BT is None else segments_BT
    along = cotangents(case) if along is None else along
    return _program(shape_of(case), implementation, fresh)(leaves, segments_BT, case.document_B, along)


def assert_close(actual: Any, wanted: Any, tolerance: float, what: str = "", terms: float = 1e-3) -> None:
    """Compares arrays with the error measured against the largest wanted value.

    Sums of up to T products are formed in another order, so small entries carry the rounding of large ones. Where the
    sum itself cancels, ``terms`` says how large its terms are.
    """
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape, (what, actual.shape, wanted.shape)
    assert np.all(np.isfinite(actual)), f"{what} is not finite"
    scale = max(float(np.max(np.abs(wanted), initial=0.0)), terms)
    error = float(np.max(np.abs(actual - wanted), initial=0.0)) / scale
    assert error <= tolerance, f"{what}: error {error:.2e} of the largest value {scale:.2e}, allowed {tolerance:.0e}"


def assert_same(actual: Any, wanted: Any, what: str = "") -> None:
    """Compares arrays bit for bit (0.0 equals -0.0)."""
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(wanted), err_msg=what)
