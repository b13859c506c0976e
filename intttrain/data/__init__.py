"""Data: text in, batches out. Everything that other folders use is named here.

tokenizers        text <-> ids                        make_tokenizer
prepare           text -> token stores                prepare (text_files, tensorflow_sources read the text)
store             the tokenised corpus on disk        TokenStore, StoreWriter
packing           documents -> rows                   PackedRows
pipeline          rows -> shuffled, mixed batches     make_row_dataset, make_batches, mixture_fingerprint
documents         evaluation rows, one document each  document_rows
"""

from intttrain.data.batch import Batch
from intttrain.data.documents import DocumentRows, document_rows
from intttrain.data.packing import PackedRows, blank_row, stack_rows
from intttrain.data.pipeline import describe_rows, make_batches, make_row_dataset, mixture_fingerprint, open_stores
from intttrain.data.prepare import PrepareResult, prepare
from intttrain.data.store import StoreWriter, TokenStore
from intttrain.data.tokenizers import Tokenizer, make_tokenizer

__all__ = [
    "Batch",
    "DocumentRows",
    "PackedRows",
    "PrepareResult",
    "StoreWriter",
    "TokenStore",
    "Tokenizer",
    "blank_row",
    "describe_rows",
    "document_rows",
    "make_batches",
    "make_row_dataset",
    "make_tokenizer",
    "mixture_fingerprint",
    "open_stores",
    "prepare",
    "stack_rows",
]
