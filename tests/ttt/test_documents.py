"""Packed rows: a document never feels what else is in its row, and a row may be cut into pieces."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain import ttt
from tests.ttt import loop
from tests.ttt.cases import (
    BY_NAME,
    CASES,
    MIXED,
    C,
    Case,
    D,
    F,
    T,
    assert_close,
    assert_same,
    cotangents,
    forward,
    gradients,
    leaves_of,
)

# Everything that belongs to single tokens.
TOKEN_LEAVES = ("z", "x", "v")
packed_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if len(case.rows) == 3 and case.carried is None], ids=lambda case: case.name
)


def documents(case):
    """Yields (row, segment id, mask over T) of every document."""
    for b, segments_T in enumerate(case.segments_BT):
        for document in range(1, segments_T.max() + 1):
            yield b, document, segments_T == document


def with_noise(leaves, here_BT, seed=3):
    """Returns leaves whose token content is replaced where ``here_BT``, by numbers ten times as large."""
    rng = np.random.default_rng(seed)
    changed = dict(leaves)
    for name in TOKEN_LEAVES:
        noise = 10 * rng.standard_normal(leaves[name].shape).astype(np.float32)
        changed[name] = np.where(here_BT[..., None], noise, leaves[name])
    return changed


@packed_cases
def test_nothing_leaks_from_one_document_into_another(case):
    """The k-th document of every row is kept, all else changes: the kept outputs stay bit for bit."""
    leaves, segments_BT = leaves_of(case), case.segments_BT
    _, wanted = gradients(case, "chunked")
    for document in range(1, min(segments_BT.max(), 6) + 1):
        kept_BT = segments_BT == document
        _, actual = gradients(case, "chunked", with_noise(leaves, ~kept_BT))
        assert_same(actual.o_BTD[kept_BT], wanted.o_BTD[kept_BT], f"document {document}")
        if np.any(~kept_BT & (segments_BT > 0)):
            assert np.any(np.asarray(actual.o_BTD != wanted.o_BTD)), "the noise has to change something"


@functools.cache
def _gradient_of_some_outputs(shape):
    def outputs(leaves, segments_BT, kept_BT):
        return jnp.sum(jnp.where(kept_BT[..., None], forward(shape, leaves, segments_BT).o_BTD, 0.0))

    return jax.jit(jax.grad(outputs))


@pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in ("several_in_a_chunk", "single_tokens", "aligned_with_padding", "next_position")]
)
def test_the_gradient_of_a_document_stays_inside_it(case):
    """No output of one document has a gradient with respect to a token of another, or to padding."""
    gradient = _gradient_of_some_outputs(dataclasses.replace(case, name="", rows=MIXED))
    for document in (1, 2, 3):
        kept_BT = case.segments_BT == document
        grads = gradient(leaves_of(case), case.segments_BT, kept_BT)
        for name in TOKEN_LEAVES:
            assert_same(np.asarray(grads[name])[~kept_BT], 0.0, name)
        assert np.any(np.asarray(grads["z"]))


@pytest.mark.parametrize("name", ["trailing_padding", "aligned_with_padding", "chunk_of_padding"])
def test_what_padding_holds_changes_nothing(name):
    """Neither outputs of documents, nor the returned state, nor any gradient outside the padding."""
    case = BY_NAME[name]
    padding_BT = case.segments_BT == 0
    grads, output = gradients(case, "chunked")
    noisy_grads, noisy = gradients(case, "chunked", with_noise(leaves_of(case), padding_BT))
    assert_same(noisy.o_BTD[~padding_BT], output.o_BTD[~padding_BT])
    assert_same(noisy.state.s_BDF, output.state.s_BDF)
    for leaf in TOKEN_LEAVES:
        assert_same(np.asarray(noisy_grads[leaf])[~padding_BT], np.asarray(grads[leaf])[~padding_BT], leaf)
    assert_same(noisy_grads["gates"], grads["gates"])


@packed_cases
def test_a_packed_document_equals_itself_alone_at_the_same_place(case):
    """Other documents turned into padding of noise: bit for bit, aligned or not."""
    _, packed = gradients(case, "chunked")
    for document in range(1, min(case.segments_BT.max(), 4) + 1):
        kept_BT = case.segments_BT == document
        alone_BT = np.where(kept_BT, 1, 0).astype(np.int32)
        _, alone = gradients(case, "chunked", with_noise(leaves_of(case), ~kept_BT), alone_BT)
        assert_same(alone.o_BTD[kept_BT], packed.o_BTD[kept_BT], f"document {document}")


@pytest.mark.parametrize("name", ["aligned_with_padding", "ends_on_chunk_edge", "chunk_of_padding"])
def test_an_aligned_document_equals_itself_alone_at_the_row_start(name):
    """Every document that starts on the chunk grid, moved to position 0 of a row of its own: bit for bit."""
    case = BY_NAME[name]
    leaves = leaves_of(case) | {"gates": np.full((3, T // C), 0.75, np.float32)}  # the same in every chunk
    _, packed = gradients(case, "chunked", leaves)
    checked = 0
    for b, _, mask_T in documents(case):
        start, stop = int(np.argmax(mask_T)), T - int(np.argmax(mask_T[::-1]))
        if start % C:
            continue
        moved = dict(leaves)
        for leaf in TOKEN_LEAVES:
            moved[leaf] = np.roll(leaves[leaf], -start, axis=1)
        alone_BT = np.broadcast_to((np.arange(T) < stop - start).astype(np.int32), (3, T))
        _, alone = gradients(case, "chunked", moved, alone_BT)
        assert_same(alone.o_BTD[b, : stop - start], packed.o_BTD[b, start:stop], f"row {b} from {start}")
        checked += 1
    assert checked >= 4


def piece_of(leaves, tokens, chunks):
    cut = {name: leaf[:, tokens] if name in TOKEN_LEAVES else leaf for name, leaf in leaves.items()}
    return cut | {"gates": leaves["gates"][:, chunks]}


@functools.cache
def _two_pieces(update, cut):
    """Compiles a row run in two pieces; every row of ``case`` starts by continuing document 1."""
    case = Case("pieces", MIXED, (1,) * 3, update=update)
    along_o, along_s = cotangents(case)

    def pieces(leaves, segments_BT):
        first = forward(case, piece_of(leaves, slice(0, cut), slice(0, cut // C)), segments_BT[:, :cut])
        second_leaves = piece_of(leaves, slice(cut, T), slice(cut // C, None)) | {"s_in": first.state.s_BDF}
        second = forward(_carrying(case, first.state.document_B), second_leaves, segments_BT[:, cut:])
        o_BTD = jnp.concatenate([first.o_BTD, second.o_BTD], axis=1)
        return jnp.sum(o_BTD * along_o) + jnp.sum(second.state.s_BDF * along_s), (o_BTD, second.state)

    return jax.jit(jax.grad(pieces, has_aux=True))


@pytest.mark.parametrize("rows", [((16,), (7, 5, -4), (3, 13)), MIXED, ((3, -1, 5, -3, 4), (-16,), (4, -4, 4, -4))])
@pytest.mark.parametrize("cut", [C, 2 * C])
@pytest.mark.parametrize("name", ["one_document", "row_norm_and_clip"])
def test_two_pieces_with_a_state_equal_one_pass(name, cut, rows):
    """In value, and in gradient through the carried state."""
    case = Case("pieces", rows, (1,) * 3, update=BY_NAME[name].update)
    wanted_grads, wanted = gradients(case, "chunked")
    grads, (o_BTD, state) = _two_pieces(case.update, cut)(leaves_of(case), case.segments_BT)
    # The same recurrence; only the plain projection runs over another number of tokens.
    assert_close(o_BTD, wanted.o_BTD, 1e-6, "o")
    assert_close(state.s_BDF, wanted.state.s_BDF, 1e-6, "state")
    assert_same(state.document_B, wanted.state.document_B)
    for leaf in grads:
        # An update at its bound does not change with eta: that gradient is what remains of terms of order 1.
        cancels = leaf == "eta" and not case.update.is_plain_sum
        assert_close(grads[leaf], wanted_grads[leaf], 1e-5, leaf, terms=1.0 if cancels else 1e-3)


@dataclasses.dataclass(frozen=True)
class _carrying:
    """A case that receives the document of the piece before."""

    case: Case
    document_B: jax.Array

    @property
    def chunk_tokens(self):
        return self.case.chunk_tokens

    @property
    def update(self):
        return self.case.update


def test_a_dropped_state_is_noticed():
    """Guards the test above: a piece that starts fresh gives something else."""
    case = BY_NAME["state_in"]
    _, kept = gradients(case, "chunked")
    fresh = leaves_of(case) | {"s_in": np.zeros((3, D, F), np.float32)}
    _, dropped = gradients(case, "chunked", fresh)
    assert not np.allclose(dropped.o_BTD, kept.o_BTD, atol=0.1)


def test_masks_of_one_row_by_hand():
    """C = 4: (a a a b | b b 0 0 | 0 c c c | c d d d), nothing carried in."""
    segments_BT = jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0, 0, 3, 3, 3, 3, 4, 4, 4]], jnp.int32)
    layout = ttt.make_layout(segments_BT, 4)
    # Padding may formally "read" the empty state that padding carries; what it reads is zero.
    reads_MC = np.asarray(layout.reads_BMC[0]) * np.asarray(segments_BT[0] > 0).reshape(4, 4)
    assert_same(reads_MC, [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert_same(layout.writes_BMC[0], [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]])
    assert_same(layout.keeps_BM[0], [0, 0, 0, 0])
    carried = ttt.make_layout(segments_BT, 4, jnp.asarray([1], jnp.int32))
    assert_same(carried.reads_BMC[0, 0], [1, 1, 1, 0])
    assert_same(carried.keeps_BM[0], [0, 0, 0, 0])
    one = ttt.make_layout(jnp.ones((1, 16), jnp.int32), 4, jnp.asarray([1], jnp.int32))
    assert_same(one.keeps_BM[0], [1, 1, 1, 1])


def test_every_way_to_pack_two_chunks_of_two():
    """All rows of four tokens with documents, padding and an incoming state: chunked = token loop."""
    legal = []
    for ids in itertools.product(range(4), repeat=4):
        seen = [i for i, group in itertools.groupby(ids) if i]
        if seen == list(range(1, len(seen) + 1)):
            legal.append(ids)
    segments_BT = np.array(legal, np.int32)
    rows = len(legal)
    assert rows == 33
    rng = np.random.default_rng(0)
    z, v = rng.standard_normal((rows, 4, 3)), rng.standard_normal((rows, 4, 2))
    w, s_in = rng.standard_normal((2, 3)), rng.standard_normal((rows, 2, 3))
    gates = rng.random((rows, 2))
    document_B = np.where(segments_BT[:, 0] == 1, 1, 9).astype(np.int32)  # what comes in goes on at once, or never
    wanted, s_wanted = loop.project(z, v, w, segments_BT, 2, 0.5, gates, s_in, document_B, ttt.UpdateRule())
    as_jax = [jnp.asarray(x, jnp.float32) for x in (z, v, w, gates, s_in)]
    output = ttt.fast_weight_projection(
        *as_jax[:3], jnp.asarray(segments_BT), chunk_tokens=2, eta=jnp.asarray(0.5), gates_BM=as_jax[3],
        state=ttt.FastWeightState(as_jax[4], jnp.asarray(document_B)),
    )  # fmt: skip
    assert_close(output.o_BTD, wanted, 1e-6)
    ends_in_text = segments_BT[:, -1] > 0  # the state after padding is never read
    assert_close(output.state.s_BDF[ends_in_text], s_wanted[ends_in_text], 1e-6)
