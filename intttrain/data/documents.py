"""Evaluation rows: one document per row, read from its first token.

Packing mixes documents and starts in their middle; loss by position in the document needs neither.

Letters: N chosen documents, n documents of the store.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from intttrain.config.errors import UserError
from intttrain.data.batch import Batch
from intttrain.data.packing import document_row
from intttrain.data.permutation import permutation
from intttrain.data.store import TokenStore


@dataclasses.dataclass(frozen=True)
class DocumentRows:
    """Chosen documents.

    Attributes:
      rows: one ``Batch`` of arrays [T] per document; ``stack_rows`` makes [B, T] of them.
      documents_N: int64, the store index of each row's document.
      num_eligible: documents long enough, of which ``rows`` are the first in the seeded order.
    """

    rows: list[Batch]
    documents_N: np.ndarray
    num_eligible: int


def document_rows(
    store: TokenStore, *, seq_len: int, min_document_tokens: int, max_documents: int, seed: int
) -> DocumentRows:
    """Returns up to ``max_documents`` rows, each with one document of at least ``min_document_tokens`` tokens.

    A document longer than ``seq_len`` is cut there (its last row position still has a label: the token after the
    cut); a shorter one is followed by padding. The choice depends on the store's content and ``seed`` only, and a
    larger ``max_documents`` extends the same choice.

    Raises:
      UserError: no document is long enough.
    """
    lengths_n = store.lengths_n
    eligible_N = np.flatnonzero(lengths_n >= min_document_tokens)
    if not len(eligible_N):
        longest = int(lengths_n.max())
        raise UserError(
            f"token store {store.path} has no document of eval.min_document_tokens={min_document_tokens} or more; "
            f"the longest of its {len(store)} documents has {longest}; use {longest} or less, or longer documents"
        )
    chosen_N = eligible_N[permutation(len(eligible_N), seed)][:max_documents]
    rows = [document_row(store, int(index), seq_len) for index in chosen_N]
    return DocumentRows(rows=rows, documents_N=chosen_N, num_eligible=len(eligible_N))
