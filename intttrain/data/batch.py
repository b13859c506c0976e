"""The batch: the only thing that passes from the data pipeline to the model.

Letters: B rows, T tokens in a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

# A numpy or JAX array, or an abstract shape; the batch crosses that boundary unchanged.
ArrayLike = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    Attributes:
      tokens_BT: int32 token ids; padding holds the end-of-document id.
      labels_BT: int32, the next token of the same document (also across the row's end), 0 where there is none.
      loss_weights_BT: float32, 1 where a label exists, else 0.
      segment_ids_BT: int32, 0 for padding; 1, 2, ... for the documents of this row from left to right.
      positions_BT: int32, tokens of the same document that stand before this one in this row; feeds RoPE.
    """

    tokens_BT: ArrayLike
    labels_BT: ArrayLike
    loss_weights_BT: ArrayLike
    segment_ids_BT: ArrayLike
    positions_BT: ArrayLike

    @classmethod
    def abstract(cls, rows: int, seq_len: int) -> Batch:
        """Returns the shapes of a batch of ``rows`` rows of ``seq_len`` tokens, for tracing without data."""
        ids = jax.ShapeDtypeStruct((rows, seq_len), np.int32)
        return cls(ids, ids, jax.ShapeDtypeStruct((rows, seq_len), np.float32), ids, ids)
