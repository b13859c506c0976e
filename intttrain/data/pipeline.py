"""Training rows: stores, packing, shuffling and mixing behind one global row index.

Row n is a pure function of (content of the stores, weights, seq_len, align_documents, seed, n). The state of the
whole pipeline is therefore one integer, the cursor: the number of rows consumed so far by all processes together.
Resuming sets it; changing the number of processes or the batch size only changes who reads which rows.

Where stages of a run have rows of several lengths, what is shuffled and mixed are blocks as long as the longest; row n
is then a part of a block, and whatever their rows, all stages read the same text in the same order.

Grain shuffles (a new order in every epoch of a store), mixes, and reads ahead in threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import grain

from intttrain.config import DataConfig
from intttrain.config.errors import UserError
from intttrain.data.batch import Batch
from intttrain.data.packing import PACKING_VERSION, PackedRows, blank_row, stack_rows
from intttrain.data.permutation import derive_seed
from intttrain.data.store import TokenStore
from intttrain.layout.row_order import Ranges

_MAX_READ_THREADS = 8  # reading a row is short NumPy work; more threads only wait for each other
_NAMES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class RowAddress:
    """Where a global row comes from: ``row`` of the packed store ``item`` (index into ``data.train``).

    The last block of a store may have rows after its last token, which are padding: ``row`` is then not below its
    number of rows.
    """

    item: int
    row: int


def open_stores(config: DataConfig, model_vocab_size: int | None = None) -> tuple[TokenStore, ...]:
    """Opens the stores of ``data.train`` in order, and checks that they fit together and fit the model.

    The held-out store, if any, is checked with them, so that a run does not fail at its first evaluation.

    Raises:
      UserError: no store is named, one cannot be opened, two were made by different tokenizers, or a token id is
        outside a model with ``model_vocab_size`` ids (not checked for None).
    """
    if not config.train:
        raise UserError(
            "data.train is empty; name at least one token store, for example ({'path': 'data/train', 'weight': 1.0},)"
        )
    stores = tuple(TokenStore.open(item.path) for item in config.train)
    checked = stores if config.heldout is None else (*stores, TokenStore.open(config.heldout))
    for store in checked:
        store.check_tokenizer(stores[0].manifest.tokenizer_fingerprint)
        if model_vocab_size is not None:
            store.check_vocab(model_vocab_size)
    return stores


def make_row_dataset(
    config: DataConfig, model_vocab_size: int, ranges: Ranges | None = None, block_tokens: int | None = None
) -> grain.MapDataset[Batch]:
    """Returns the endless dataset of training rows: element n is global row n, a ``Batch`` of arrays [T].

    Each store is packed once, its rows come in a new order every epoch, and the stores are interleaved so that after
    any number of rows each has given its share by weight (weights count to 1 % of the smallest).

    Args:
      config: of the data.
      model_vocab_size: see ``open_stores``.
      ranges: the tokens to read of every row, in this order; T is then their number. ``None`` for all.
      block_tokens: length of the blocks that are shuffled and mixed, a multiple of ``seq_len``; ``None`` for rows.

    Raises:
      UserError: see ``open_stores``.
    """
    packed = _pack(config, open_stores(config, model_vocab_size))
    parts = ((0, config.seq_len),) if ranges is None else ranges

    def read(address: RowAddress) -> Batch:
        plan = packed[address.item]
        if address.row >= len(plan):
            return blank_row(sum(stop - start for start, stop in parts), plan.store.end_of_document)
        return plan.read(address.row, parts)

    return _make_address_dataset(config, packed, block_tokens).map(read)


def make_batches(
    dataset: grain.MapDataset[Batch], *, batch_rows: int, cursor: int, local_rows: Sequence[int], prefetch_rows: int
) -> Iterator[Batch]:
    """Returns the endless iterator of this process's part of every batch, arrays [len(local_rows), T].

    Step s covers the global rows ``cursor + s * batch_rows`` up to ``cursor + (s + 1) * batch_rows``; this process
    reads those at the places ``local_rows`` among them. After s steps the cursor to store is
    ``cursor + s * batch_rows``.

    Args:
      dataset: from ``make_row_dataset``.
      batch_rows: rows per step over all processes.
      cursor: rows consumed before the first step.
      local_rows: places in the batch, 0 to ``batch_rows - 1``, that this process reads.
      prefetch_rows: rows that threads read ahead in this process.
    """
    if cursor < 0 or not local_rows or not all(0 <= place < batch_rows for place in local_rows):
        raise ValueError(f"{cursor=}, {batch_rows=}, {local_rows=}")
    selection = _ProcessRows(cursor, batch_rows, tuple(local_rows))
    options = grain.ReadOptions(num_threads=min(prefetch_rows, _MAX_READ_THREADS), prefetch_buffer_size=prefetch_rows)
    rows = grain.MapDataset.select_from_datasets([dataset], selection).to_iter_dataset(options)
    return iter(rows.batch(len(local_rows), drop_remainder=True, batch_fn=stack_rows))


def mixture_fingerprint(config: DataConfig) -> str:
    """Returns 16 hexadecimal digits that change exactly when some global row may change.

    Covers the content of the stores in their order, relative weights, seed, seq_len (of a run in stages: the blocks)
    and align_documents; not the paths, the held-out store or read-ahead. A checkpoint records it beside the cursor.

    Raises:
      UserError: a store cannot be opened.
    """
    content = {
        "packing_version": PACKING_VERSION,
        "stores": [store.fingerprint for store in open_stores(config)],
        "shares": _shares(config),
        "seed": config.seed,
        "seq_len": config.seq_len,
        "align_documents": config.align_documents,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def describe_rows(config: DataConfig, rows: Iterable[int], block_tokens: int | None = None) -> list[str]:
    """Returns one line per global row: its store, place and first document names, for reports about a bad step.

    Plans the packing again, so it takes about as long as starting the pipeline.
    """
    packed = _pack(config, open_stores(config))
    addresses = _make_address_dataset(config, packed, block_tokens)
    lines = []
    for row in rows:
        address = addresses[row]
        plan = packed[address.item]
        if address.row >= len(plan):
            lines.append(f"row {row}: padding")
            continue
        documents_k = plan.documents(address.row)
        names = [repr(plan.store.name(int(document))) for document in documents_k[:_NAMES_SHOWN]]
        more = f" and {len(documents_k) - len(names)} more" if len(documents_k) > len(names) else ""
        place = f"{Path(config.train[address.item].path)} row {address.row} of {len(plan)}"
        lines.append(f"row {row}: {place}, documents {', '.join(names)}{more}")
    return lines


def _pack(config: DataConfig, stores: Sequence[TokenStore]) -> list[PackedRows]:
    # Each entry has a seed of its own: a store that is listed twice is not read twice in the same order.
    return [
        PackedRows(store, config.seq_len, config.align_documents, derive_seed(config.seed, 2 * item))
        for item, store in enumerate(stores)
    ]


def _make_address_dataset(
    config: DataConfig, packed: Sequence[PackedRows], block_tokens: int | None
) -> grain.MapDataset[RowAddress]:
    """Returns the endless dataset of row addresses: blocks shuffled per epoch of each store, then interleaved."""
    rows = 1 if block_tokens is None else block_tokens // config.seq_len  # of a block
    parts = []
    for item, plan in enumerate(packed):
        # Grain adds the epoch to the seed, so neighbouring seeds would repeat each other's orders one epoch apart.
        seed = derive_seed(config.seed, 2 * item + 1)
        blocks = grain.MapDataset.range(-(-len(plan) // rows)).shuffle(seed=seed).repeat()
        parts.append(blocks.map(lambda block, item=item: RowAddress(item, int(block) * rows)))
    first_rows = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=_shares(config))

    def address(row: int) -> RowAddress:
        block, place = divmod(int(row), rows)
        first = first_rows[block]
        return dataclasses.replace(first, row=first.row + place)

    return grain.MapDataset.range(sys.maxsize).map(address)


def _shares(config: DataConfig) -> list[int]:
    """Returns the weights as whole numbers, 100 for the smallest: the resolution that Grain mixes with.

    Rounding here makes the rows independent of the scale of the weights, which Grain would cut off downwards.
    """
    smallest = min(item.weight for item in config.train)
    return [round(100 * item.weight / smallest) for item in config.train]


class _ProcessRows(grain.transforms.DatasetSelectionMap):
    """Maps the i-th row that this process reads to its global row."""

    def __init__(self, cursor: int, batch_rows: int, local_rows: tuple[int, ...]) -> None:
        self._cursor = cursor
        self._batch_rows = batch_rows
        self._local_rows = local_rows

    def __len__(self) -> int:
        return (sys.maxsize - self._cursor) // self._batch_rows - 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, place = divmod(index, len(self._local_rows))
        return 0, self._cursor + step * self._batch_rows + self._local_rows[place]
