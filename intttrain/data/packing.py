"""Packing: which tokens of a store stand in which row.

All documents are put into one order (a permutation by seed), each start is moved up to a multiple of
``align_documents``, and the resulting stream is cut into rows of T tokens:

    stream   | doc 7 ......... e | pad | doc 2 ... e | pad | doc 9 ........................ e |
    rows     |<------- row 0 ------->|<------- row 1 ------->|<------- row 2 ------->|  ...

Nothing is dropped: a document longer than a row continues in the next, and the last row is filled with padding.

Decisions
  - A label is the next token of the same document even when that token stands in the next row, so over all rows
    every token of a document except its last is asked for exactly one prediction.
  - Segment ids and positions restart in every row. A document that continues from the row before starts again at
    position 0: attention and the fast weight see this row only, so the position counts the tokens that are visible,
    and rotary angles of large offsets lose accuracy in float32.

Letters: B rows, T tokens in a row, N tokens of the store, n documents of the store, k documents that touch one row, S
tokens of one row that are no padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from intttrain.config.errors import UserError, nearest_divisors
from intttrain.data.batch import Batch
from intttrain.data.permutation import permutation
from intttrain.data.store import TokenStore
from intttrain.layout.row_order import Ranges

# Part of the mixture fingerprint: raise it whenever the same inputs would give other rows.
PACKING_VERSION = 1


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """The k stretches of documents that stand in one row, from left to right.

    Attributes:
      document_k: store index of the document.
      begin_k, end_k: columns of the row, half open.
      source_k: place in ``tokens_N`` of the token at ``begin_k``.
      last_k: place in ``tokens_N`` of the document's last token.
      segment_k: segment id of the document.
      position_k: position of the token at ``begin_k``.
    """

    document_k: np.ndarray
    begin_k: np.ndarray
    end_k: np.ndarray
    source_k: np.ndarray
    last_k: np.ndarray
    segment_k: np.ndarray
    position_k: np.ndarray


class PackedRows:
    """Random access to the packed rows of one store, whole or in parts; reading T tokens costs O(log n + T).

    Holds 16 bytes per document in memory. Safe to read from several threads.

    Args:
      store: where the tokens come from.
      seq_len: T.
      align_documents: document starts are multiples of this (1: no padding between documents).
      seed: of the document order.

    Raises:
      UserError: ``align_documents`` does not divide ``seq_len``.
    """

    def __init__(self, store: TokenStore, seq_len: int, align_documents: int, seed: int) -> None:
        if seq_len % align_documents:
            raise UserError(
                f"data.align_documents={align_documents} does not divide data.seq_len={seq_len}; "
                f"use one of {nearest_divisors(seq_len, align_documents)}"
            )
        self.store = store
        self.seq_len = seq_len
        self._order_n = permutation(len(store), seed)
        lengths_n = store.lengths_n[self._order_n]
        padded_n = -(-lengths_n // align_documents) * align_documents
        self._starts_n = np.cumsum(padded_n) - padded_n  # where each document begins in the stream
        self._num_rows = int(-(-(self._starts_n[-1] + lengths_n[-1]) // seq_len))

    def __len__(self) -> int:
        """Number of rows."""
        return self._num_rows

    def __getitem__(self, row: int) -> Batch:
        """Returns row ``row`` as a ``Batch`` of arrays of shape [T]. Raises ``IndexError`` outside 0..len - 1."""
        return self.read(row, ((0, self.seq_len),))

    def read(self, row: int, ranges: Ranges) -> Batch:
        """Returns the columns ``ranges`` of row ``row``, one range after the other, and reads no other tokens.

        All values are those of the whole row. Raises ``IndexError`` outside 0..len - 1.
        """
        return _read_row(self.store, _within(self._pieces(row), ranges), sum(stop - start for start, stop in ranges))

    def documents(self, row: int) -> np.ndarray:
        """Returns the store indices of the documents in ``row``, shape [k], from left to right."""
        return self._pieces(row).document_k

    @functools.cached_property
    def loss_tokens(self) -> int:
        """Number of labels over all rows: every token but the last of each document."""
        return self.store.num_tokens - len(self.store)

    def _pieces(self, row: int) -> _Pieces:
        if not 0 <= row < self._num_rows:
            raise IndexError(f"row {row} of {self._num_rows}")
        start = row * self.seq_len
        # Row starts are multiples of the alignment and padding is shorter than it, so a row begins inside a document
        # or with a new one: each of first..stop - 1 has at least one token here.
        first = int(np.searchsorted(self._starts_n, start, side="right")) - 1
        stop = int(np.searchsorted(self._starts_n, start + self.seq_len, side="left"))
        starts_k = self._starts_n[first:stop] - start  # negative for a document from the row before
        document_k = self._order_n[first:stop]
        source_k = np.asarray(self.store.offsets_n[document_k])
        last_k = np.asarray(self.store.offsets_n[document_k + 1]) - 1
        begin_k = np.maximum(starts_k, 0)
        end_k = np.minimum(starts_k + (last_k - source_k + 1), self.seq_len)
        segment_k = np.arange(1, len(document_k) + 1)
        source_k = source_k + (begin_k - starts_k)
        return _Pieces(document_k, begin_k, end_k, source_k, last_k, segment_k, np.zeros_like(begin_k))


def document_row(store: TokenStore, index: int, seq_len: int) -> Batch:
    """Returns the first ``seq_len`` tokens of document ``index`` alone in a row: arrays of shape [T], padded."""
    first, end = int(store.offsets_n[index]), int(store.offsets_n[index + 1])
    pieces = _Pieces(
        document_k=np.array([index]),
        begin_k=np.array([0]),
        end_k=np.array([min(end - first, seq_len)]),
        source_k=np.array([first]),
        last_k=np.array([end - 1]),
        segment_k=np.array([1]),
        position_k=np.array([0]),
    )
    return _read_row(store, pieces, seq_len)


def blank_row(seq_len: int, end_of_document: int) -> Batch:
    """Returns a row of padding (arrays of shape [T]), for filling the last batch of an evaluation."""
    zeros_T = np.zeros(seq_len, np.int32)
    return Batch(
        tokens_BT=np.full(seq_len, end_of_document, np.int32),
        labels_BT=zeros_T,
        loss_weights_BT=np.zeros(seq_len, np.float32),
        segment_ids_BT=zeros_T.copy(),
        positions_BT=zeros_T.copy(),
    )


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Returns a ``Batch`` of arrays [B, T] from B rows of arrays [T]."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: np.stack([getattr(row, name) for row in rows]) for name in names})


def _within(pieces: _Pieces, ranges: Ranges) -> _Pieces:
    """Returns what of ``pieces`` stands in ``ranges``, at its columns among these ranges put one after the other."""
    parts, column = [], 0
    for start, stop in ranges:
        first, end = np.searchsorted(pieces.end_k, start, side="right"), np.searchsorted(pieces.begin_k, stop)
        part = _Pieces(*(getattr(pieces, field.name)[first:end] for field in dataclasses.fields(_Pieces)))
        begin_k = np.maximum(part.begin_k, start)
        cut_k = begin_k - part.begin_k
        parts.append(
            dataclasses.replace(
                part, begin_k=begin_k - start + column, end_k=np.minimum(part.end_k, stop) - start + column,
                source_k=part.source_k + cut_k, position_k=part.position_k + cut_k,
            )
        )  # fmt: skip
        column += stop - start
    names = [field.name for field in dataclasses.fields(_Pieces)]
    return _Pieces(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _read_row(store: TokenStore, pieces: _Pieces, seq_len: int) -> Batch:
    """Fills one row; the work is a handful of array operations however many documents it holds."""
    counts_k = pieces.end_k - pieces.begin_k
    # `at_S` are the S columns that hold a token; everything with suffix S is aligned with it.
    before_S = np.repeat(np.cumsum(counts_k) - counts_k, counts_k)
    inside_S = np.arange(len(before_S)) - before_S  # place in its stretch
    at_S = inside_S + np.repeat(pieces.begin_k, counts_k)
    source_S = inside_S + np.repeat(pieces.source_k, counts_k)
    has_next_S = source_S < np.repeat(pieces.last_k, counts_k)
    next_S = np.where(has_next_S, source_S + 1, source_S)

    row = blank_row(seq_len, store.end_of_document)
    row.tokens_BT[at_S] = store.tokens_N[source_S]
    row.labels_BT[at_S] = np.where(has_next_S, store.tokens_N[next_S], 0)
    row.loss_weights_BT[at_S] = has_next_S
    row.segment_ids_BT[at_S] = np.repeat(pieces.segment_k, counts_k)
    row.positions_BT[at_S] = inside_S + np.repeat(pieces.position_k, counts_k)
    return row
