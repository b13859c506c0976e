"""Unigram and bigram baselines: what the training text predicts about the scored tokens without any model.

Both see exactly the predictions the model is scored on: the next token inside one document. Counts are taken from the
training store in blocks of its memory map. Pairs are kept sparse (sorted codes), so a vocabulary of a few hundred
thousand ids costs memory for the pairs that occur, not for all that could.

Smoothing
  unigram  add one:      p(b) = (c(b) + 1) / (c + V)
  bigram   Witten-Bell:  p(b | a) = (c(a b) + d(a) p(b)) / (c(a) + d(a)),  d(a) = distinct ids seen after a;
           p(b | a) = p(b) after an id that was never followed by anything.
Both sum to one over the vocabulary and have no parameter to tune.

Letters: V vocabulary, U distinct pairs, T tokens in a row, b tokens of one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from intttrain.config.errors import UserError
from intttrain.data import Batch, TokenStore, stack_rows
from intttrain.evals.positions.losses import PositionLosses, join_documents, sum_by_position

DEFAULT_MAX_TOKENS = 20_000_000  # a few seconds on one core
_BLOCK_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class NgramCounts:
    """Pairs (token, next token of the same document) of the training text.

    Attributes:
      vocab_size: V, of the store's tokenizer.
      next_V: int64, how often each id is the second of a pair.
      context_V: int64, how often it is the first.
      distinct_V: int64, how many different ids follow it.
      code_U: int64, ``first * V + second`` of every pair that occurs, increasing.
      count_U: int64, how often.
    """

    vocab_size: int
    next_V: np.ndarray
    context_V: np.ndarray
    distinct_V: np.ndarray
    code_U: np.ndarray
    count_U: np.ndarray

    @property
    def pairs(self) -> int:
        """Number of pairs counted."""
        return int(self.next_V.sum())


def count_ngrams(
    store: TokenStore,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    block_tokens: int = _BLOCK_TOKENS,
    on_tokens: Callable[[int], None] | None = None,
) -> NgramCounts:
    """Counts the pairs of a training store.

    Args:
      store: the training text.
      max_tokens: a larger store is read in blocks spread evenly over it, about this many tokens in total.
      block_tokens: tokens read at a time.
      on_tokens: called with the number of tokens read since the call before.
    """
    vocab_size = store.manifest.vocab_size
    next_V, context_V = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    merged = _SparseCounts()
    for begin, end in _blocks(store.num_tokens, max_tokens, block_tokens):
        # One token more than the block: the pair across the block's end belongs to this block.
        tokens_b = np.asarray(store.tokens_N[begin : min(end + 1, store.num_tokens)], np.int64)
        first_b, second_b = tokens_b[:-1], tokens_b[1:]
        inside_b = first_b != store.end_of_document  # the end id stands at the end of a document and nowhere else
        first_b, second_b = first_b[inside_b], second_b[inside_b]
        context_V += np.bincount(first_b, minlength=vocab_size)
        next_V += np.bincount(second_b, minlength=vocab_size)
        merged.add(*np.unique(first_b * vocab_size + second_b, return_counts=True))
        if on_tokens is not None:
            on_tokens(end - begin)
    code_U, count_U = merged.result()
    distinct_V = np.bincount(code_U // vocab_size, minlength=vocab_size).astype(np.int64)
    return NgramCounts(vocab_size, next_V, context_V, distinct_V, code_U, count_U)


def evaluate_ngrams(
    counts: NgramCounts, rows: Sequence[Batch], edges: tuple[int, ...]
) -> tuple[PositionLosses, PositionLosses]:
    """Returns the losses of the unigram and of the bigram model.

    Args:
      counts: from ``count_ngrams``.
      rows: the rows the model is scored on, arrays [T].
      edges: right edges of the position buckets.

    Raises:
      UserError: a token id is outside the vocabulary of the training store.
    """
    unigram_V = np.log(counts.pairs + counts.vocab_size) - np.log(counts.next_V + 1.0)  # nats
    unigrams, bigrams = [], []
    for row in rows:
        first_T, second_T = np.asarray(row.tokens_BT, np.int64), np.asarray(row.labels_BT, np.int64)
        largest = int(max(first_T.max(), second_T.max()))
        if largest >= counts.vocab_size:
            raise UserError(
                f"the held-out documents hold token id {largest} but the vocabulary of the training store ends at "
                f"{counts.vocab_size - 1}; prepare both with the same tokenizer"
            )
        unigram_T = unigram_V[second_T]
        batch = stack_rows([row])
        unigrams.append(sum_by_position(unigram_T[None], batch, edges))
        bigrams.append(sum_by_position(_bigram_nll(counts, first_T, second_T, unigram_T)[None], batch, edges))
    return join_documents(unigrams), join_documents(bigrams)


def _bigram_nll(counts: NgramCounts, first_T: np.ndarray, second_T: np.ndarray, unigram_T: np.ndarray) -> np.ndarray:
    """Returns ``-ln p(second | first)``, the Witten-Bell form of the module docstring."""
    seen_T = np.zeros(len(first_T), np.int64)
    if len(counts.code_U):
        code_T = first_T * counts.vocab_size + second_T
        at_T = np.minimum(np.searchsorted(counts.code_U, code_T), len(counts.code_U) - 1)
        seen_T = np.where(counts.code_U[at_T] == code_T, counts.count_U[at_T], 0)
    distinct_T, context_T = counts.distinct_V[first_T], counts.context_V[first_T]
    unknown_T = context_T == 0
    total_T = np.where(unknown_T, 1, context_T + distinct_T)
    probability_T = (seen_T + np.where(unknown_T, 1, distinct_T) * np.exp(-unigram_T)) / total_T
    return -np.log(probability_T)


class _SparseCounts:
    """Adds up (sorted codes, counts) without ever holding much more than twice the distinct codes."""

    _MIN_PENDING = 1 << 22

    def __init__(self) -> None:
        self._codes: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._counts: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._pending = 0

    def add(self, code_u: np.ndarray, count_u: np.ndarray) -> None:
        """Adds one block's distinct codes."""
        self._codes.append(code_u)
        self._counts.append(count_u.astype(np.int64))
        self._pending += len(code_u)
        if self._pending > max(self._MIN_PENDING, len(self._codes[0])):
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the distinct codes, increasing, and their counts."""
        self._merge()
        return self._codes[0], self._counts[0]

    def _merge(self) -> None:
        codes, counts = np.concatenate(self._codes), np.concatenate(self._counts)
        order = np.argsort(codes, kind="stable")
        codes, counts = codes[order], counts[order]
        starts = np.flatnonzero(np.diff(codes, prepend=-1))  # codes are not negative
        self._codes = [codes[starts]]
        self._counts = [np.add.reduceat(counts, starts) if len(starts) else counts]
        self._pending = 0


def _blocks(num_tokens: int, max_tokens: int, block_tokens: int) -> Iterator[tuple[int, int]]:
    """Yields disjoint (begin, end): the whole store, or a part spread evenly over it.

    Stores keep the order of their source, so the beginning alone may be one kind of text.
    """
    wanted = min(num_tokens, max_tokens)
    pieces = max(1, -(-wanted // block_tokens))
    for piece in range(pieces):
        begin = num_tokens * piece // pieces
        size = wanted * (piece + 1) // pieces - wanted * piece // pieces
        yield begin, min(begin + size, num_tokens * (piece + 1) // pieces)
