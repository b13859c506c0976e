"""Which token may read the carried state, which one writes into it, and where it is dropped.

The chunk grid is anchored to the row. A document (a run of equal, positive segment ids) never sees a state
that another document wrote; padding (segment id 0) neither reads nor writes.

Letters: B row, T tokens, C tokens per chunk, M chunks, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NO_DOCUMENT = -1  # carried by a fresh state; equals no segment id


class FastWeightState(NamedTuple):
    """What one TTT layer carries from one piece of a row to the next.

    Attributes:
      s_BDF: fp32 sum of the committed updates of the carried document.
      document_B: segment id of that document, ``NO_DOCUMENT`` when nothing is carried. The next piece must begin with
        this document or never use its id.
    """

    s_BDF: Float[Array, "B D F"]
    document_B: Int[Array, "B"]


class ChunkLayout(NamedTuple):
    """The masks of ``docs/method.md`` as fp32 zeros and ones.

    Attributes:
      reads_BMC: a_t, 1 if the token belongs to the carried document.
      writes_BMC: mu_t, 1 if the token is not padding and belongs to the document carried on.
      keeps_BM: k_i, 1 if chunk i carries on the document that it received.
    """

    reads_BMC: Float[Array, "B M C"]
    writes_BMC: Float[Array, "B M C"]
    keeps_BM: Float[Array, "B M"]


def init_state(batch_rows: int, d_model: int, d_ff: int) -> FastWeightState:
    """Returns the state before the first token: S = 0, no document."""
    return FastWeightState(
        s_BDF=jnp.zeros((batch_rows, d_model, d_ff), jnp.float32),
        document_B=jnp.full((batch_rows,), NO_DOCUMENT, jnp.int32),
    )


def make_layout(
    segment_ids_BT: Int[Array, "B T"],
    chunk_tokens: int,
    document_B: Int[Array, "B"] | None = None,
    chunks_M: np.ndarray | None = None,
) -> ChunkLayout:
    """Returns the masks of rows whose carried document at the first token is ``document_B`` (default: none).

    Args:
      segment_ids_BT: documents.
      chunk_tokens: C.
      document_B: see above.
      chunks_M: numbers of the chunks in the order in which they are stored; default: as they follow each other.

    Raises:
      ValueError: ``chunk_tokens`` does not divide T.
    """
    rows, seq_len = segment_ids_BT.shape
    if seq_len % chunk_tokens:
        raise ValueError(f"chunk_tokens={chunk_tokens} does not divide the row length {seq_len}")
    segments_BMC = segment_ids_BT.reshape(rows, seq_len // chunk_tokens, chunk_tokens)
    last_BM = segments_BMC[:, :, -1]
    if document_B is None:
        document_B = jnp.full((rows,), NO_DOCUMENT, segment_ids_BT.dtype)
    if chunks_M is None:
        chunks_M = np.arange(last_BM.shape[1])
    stored_M = np.argsort(chunks_M)  # where each chunk of the row stands
    carried_BM = jnp.where(chunks_M > 0, last_BM[:, stored_M[chunks_M - 1]], document_B[:, None])
    return ChunkLayout(
        reads_BMC=(segments_BMC == carried_BM[:, :, None]).astype(jnp.float32),
        writes_BMC=((segments_BMC == last_BM[:, :, None]) & (segments_BMC > 0)).astype(jnp.float32),
        keeps_BM=(last_BM == carried_BM).astype(jnp.float32),
    )
