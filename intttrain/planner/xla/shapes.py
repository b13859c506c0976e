"""Shapes and brackets in HLO text: element types, layouts, tiles, memory spaces, bytes with and without padding."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "tuple": 0, "c64": 64, "c128": 128}
ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"\(([^()]*)\)")
COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array, or a tuple of shapes (``elements``), as the compiler laid it out.

    Attributes:
      dtype: "bf16", "f32", "s32", "pred", "s4", "f8e4m3fn", ..., or "tuple", "token", "opaque".
      dims: lengths, in logical order.
      minor_to_major: order of the dims in memory, the fastest varying first; empty where the text has no layout.
      tiles: the layout's tiles, outermost first: ``T(8,128)(2,1)`` is ``((8, 128), (2, 1))``. Empty on CPU.
      memory_space: ``S(n)`` of the layout; 0 is the device's main memory.
      element_bits: bits that one element takes in memory.
      elements: the parts of a tuple.
    """

    dtype: str
    dims: tuple[int, ...] = ()
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    memory_space: int = 0
    element_bits: int = 0
    elements: tuple[Shape, ...] = ()

    @property
    def is_tuple(self) -> bool:
        """Whether this is a tuple of shapes."""
        return self.dtype == "tuple"

    @property
    def size(self) -> int:
        """Number of elements of an array; 0 for tuples and tokens."""
        return 0 if self.dtype in ("tuple", "token", "opaque") else math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes without padding; of a tuple, the sum over its parts without the table of pointers."""
        if self.is_tuple:
            return sum(part.bytes for part in self.elements)
        return -(-self.size * self.element_bits // 8)

    @functools.cached_property
    def padded_bytes(self) -> int:
        """Bytes in memory.

        Each tile in turn cuts the minor dims (as many as it has itself) into whole tiles: ``bf16[5,100]`` in
        ``T(8,128)(2,1)`` takes one tile of 8 x 128. A layout without tiles has no padding.
        """
        if self.is_tuple:
            return sum(part.padded_bytes for part in self.elements)
        physical = [self.dims[d] for d in reversed(self.minor_to_major)]
        if self.size == 0 or not self.tiles or len(physical) != len(self.dims):
            return self.bytes
        for tile in self.tiles:
            physical = [1] * (len(tile) - len(physical)) + physical
            split = len(physical) - len(tile)
            physical = physical[:split] + [-(-n // t) for n, t in zip(physical[split:], tile, strict=True)] + list(tile)
        return -(-math.prod(physical) * self.element_bits // 8)

    def __str__(self) -> str:
        if self.is_tuple:
            return f"({', '.join(map(str, self.elements))})"
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _bits(dtype: str) -> int:
    """Bits of one element where the layout does not say; types below a byte take a whole one, as in XLA."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return max(8, int(digits.group(1))) if digits else 0


def _layout_part(letter: str, rest: str) -> int | None:
    found = re.search(rf"(?<![A-Z]){letter}\((\d+)\)", rest)
    return int(found.group(1)) if found else None


def _array(dtype: str, dims: str, layout: str | None) -> Shape:
    order, _, rest = (layout or "").partition(":")
    tiles: tuple[tuple[int, ...], ...] = ()
    if "T(" in rest:
        run = re.match(r"(?:\([^()]*\))+", rest[rest.index("T(") + 1 :])
        texts = _TILE.findall(run.group(0)) if run else []
        if all(re.fullmatch(r"[\d,]+", t) for t in texts):  # T(8,*) merges dims; it is read as no tiling
            tiles = tuple(tuple(map(int, t.split(","))) for t in texts)
    return Shape(
        dtype=dtype,
        dims=tuple(int(d.strip().lstrip("<=")) for d in dims.split(",") if d.strip()),  # <=5: bounded dynamic
        minor_to_major=tuple(int(d) for d in order.split(",") if d.strip()),
        tiles=tiles,
        memory_space=_layout_part("S", rest) or 0,
        element_bits=_layout_part("E", rest) or _bits(dtype),
    )


@functools.lru_cache(maxsize=1 << 16)
def parse_shape(text: str) -> Shape:
    """Reads ``bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`` or a tuple of such shapes in parentheses.

    Raises:
      ValueError: ``text`` is not a shape.
    """
    text = COMMENT.sub("", text).strip()
    if text.startswith("("):
        return Shape("tuple", elements=tuple(parse_shape(part) for part in split_top_level(text[1:-1])))
    found = ARRAY.match(text)
    if not found:
        raise ValueError(f"not an HLO shape: {text[:80]!r}")
    return _array(*found.groups())


# --- text ----------------------------------------------------------------------------------------------------------

_DELIMITER = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[(){}\[\],]', re.DOTALL)


def _delimiters(text: str, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """Yields each bracket, comma and string: itself, its position, and how many brackets are open after it."""
    depth = 0
    for found in _DELIMITER.finditer(text, start):
        mark = found.group()
        depth += (mark in "({[") - (mark in ")}]")
        yield mark, found.start(), depth


def split_top_level(text: str) -> list[str]:
    """Splits at the commas that stand outside of every bracket and string; strips the parts, drops empty ones."""
    parts, start = [], 0
    for mark, at, depth in _delimiters(text):
        if mark == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def closing_bracket(text: str, opening: int) -> int:
    """Position of the bracket that closes the one at ``opening``."""
    for mark, at, depth in _delimiters(text, opening):
        if mark in ")}]" and depth == 0:
            return at
    raise ValueError(f"unbalanced brackets in HLO text: {text[:120]!r}")
