"""A tokenizer that only has the properties a store records, and the check that a message is one line."""

from __future__ import annotations

import pytest

from intttrain.data.tokenizers import ByteTokenizer

END = 7


class PlainTokenizer(ByteTokenizer):
    def __init__(self, vocab_size: int, fingerprint: str = "plain") -> None:
        self.vocab_size = vocab_size
        self.end_of_document = END
        self.fingerprint = fingerprint
        self.description = f"plain {fingerprint}"


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """Returns the message after checking that it is a single line."""
    text = str(error.value)
    assert "\n" not in text
    return text
