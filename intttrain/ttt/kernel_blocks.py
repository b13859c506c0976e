"""Chooses the blocks in which the TPU kernels run, and says which shapes, chips and settings they cannot run.

Larger blocks are faster, and what fits is a matter of on-chip memory. The two ledgers list what lies there, by name and
in bytes.

Letters: C tokens per chunk, D model width, F feed-forward width; X and Y as in ``kernel_recurrence.py``: the state is
cut along Y.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from intttrain.layout import hardware
from intttrain.layout.axes import RULES
from intttrain.layout.sharding import device_kind, pieces_of, platform
from intttrain.ttt.kernel_parts import LANES, Machine
from intttrain.ttt.kernel_recurrence import RecurrenceBlocks
from intttrain.ttt.kernel_suffix import HANDED_ROWS, SuffixBlocks
from intttrain.ttt.rules import UpdateRule

TOKEN_MULTIPLE = 16  # rows of a bf16 register; chunks are padded to a multiple of it

# MiB of on-chip memory of one TensorCore that a kernel may use, by chip: the limit that libtpu 0.0.52 names when it
# refuses a kernel that is too large, less what it keeps for itself. A v4 has 16 MiB, which is too little.
VMEM_MIB: Mapping[str, float] = types.MappingProxyType({"v5p": 63.9, "v5e": 127.9, "v6e": 127.9, "tpu7x": 63.9})

_ENOUGH_TOKENS = 256  # in one product of the suffix scan: with fewer the matrix units wait for their weights

# (chip, D, F) -> the longest chunk, in tokens, for which the kernels are known to plan faster than XLA; ``auto`` takes
# them up to there and XLA elsewhere. The longer a chunk, the less it costs that XLA moves the whole state for each.
# Predicted, in thousands of cycles per chunk of 1024 tokens, kernels and XLA: forward 397 and 468, prefix 398 and 469,
# suffix 590 and 767 (``docs/kernels.md``).
_FASTER_UP_TO: Mapping[tuple[str, int, int], int] = types.MappingProxyType({("v5p", 2560, 9728): 1024})


class Kernels(NamedTuple):
    """How the three scans run on one device; static, so a jitted function may close over it.

    Attributes:
      machine: what the kernels are compiled for.
      cores: TensorCores of a device.
      shape: D and F, padded to whole registers.
      forward, prefix, suffix: the blocks of each scan.
    """

    machine: Machine
    cores: int
    shape: tuple[int, int]
    forward: RecurrenceBlocks
    prefix: RecurrenceBlocks
    suffix: SuffixBlocks


def supports(update: UpdateRule) -> str:
    """Returns the reason why the kernels cannot run here whatever the shapes, ``""`` if there is none."""
    if platform() != "tpu":
        return f"they run on TPUs only, not on {platform()}"
    if hardware.chip(device_kind()).name not in VMEM_MIB:
        return f"{device_kind()} has too little on-chip memory; they run on {', '.join(VMEM_MIB)}"
    if update != UpdateRule():  # of this class, too
        return f"they know the plain sum of updates only, no bounds and no row norms, not {update}"
    if (pieces := pieces_of(None, "mlp")) > 1:
        axes = " x ".join(f"mesh.{axis}" for axis in RULES["mlp"])
        return f"{axes}={pieces} cuts the state, which only XLA does; they need {axes}=1"
    return ""


def choose_kernels(chunk_tokens: int, width: int, d_ff: int, itemsize: int) -> Kernels | str:
    """Returns how the kernels run for these shapes on the devices of this program, or the reason why they do not fit.

    Args:
      chunk_tokens, width, d_ff: C, D, F; padded to what registers hold.
      itemsize: bytes of a value of the compute dtype.
    """
    chip = hardware.chip(device_kind())
    return fitting(chip.name, chip.tensor_cores // chip.devices, chunk_tokens, width, d_ff, itemsize)


def pays(chunk_tokens: int, width: int, d_ff: int) -> bool:
    """Tells whether the kernels are known to plan faster than XLA for these shapes on the devices of this program."""
    return chunk_tokens <= _FASTER_UP_TO.get((hardware.chip(device_kind()).name, width, d_ff), 0)


def fitting(chip: str, cores: int, chunk_tokens: int, width: int, d_ff: int, itemsize: int) -> Kernels | str:
    """Returns what ``choose_kernels`` does, for a named chip with so many TensorCores per device."""
    tokens, width, d_ff = padded(chunk_tokens, TOKEN_MULTIPLE), padded(width, LANES), padded(d_ff, LANES)
    vmem = int(VMEM_MIB[chip] * 2**20)

    def recurrence(rows: int, columns: int, *, forward: bool) -> RecurrenceBlocks | None:
        choices = (RecurrenceBlocks(*pair) for pair in product(_tiles(rows, cores), _divisors(columns, LANES)))
        fits = [b for b in choices if _total(recurrence_ledger(b, tokens, columns, itemsize, forward=forward)) <= vmem]
        return max(fits, key=lambda blocks: (blocks.tile * blocks.columns, blocks.tile), default=None)

    def suffix() -> SuffixBlocks | None:
        choices = (SuffixBlocks(*pair) for pair in product(_tiles(d_ff, cores), _divisors(tokens, TOKEN_MULTIPLE)))
        fits = [b for b in choices if _total(suffix_ledger(b, width, itemsize)) <= vmem]
        return max(fits, key=lambda blocks: (min(blocks.tokens, _ENOUGH_TOKENS), blocks), default=None)

    found = {
        "forward": recurrence(width, d_ff, forward=True),
        "prefix": recurrence(d_ff, width, forward=False),
        "suffix": suffix(),
    }
    missing = [name for name, blocks in found.items() if blocks is None]
    if missing:
        return (
            f"no blocks of the {missing[0]} scan fit the {VMEM_MIB[chip]:.0f} MiB of on-chip memory of {chip} with "
            f"chunk_tokens={chunk_tokens}, D={width}, F={d_ff}; use a smaller chunk_tokens"
        )
    return Kernels(Machine(vmem), cores, (width, d_ff), **found)  # type: ignore[arg-type]  # none is missing


def padded(size: int, multiple: int) -> int:
    """Returns ``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def _total(ledger: Mapping[str, int]) -> int:
    return sum(ledger.values())


def _divisors(size: int, multiple: int) -> list[int]:
    """Returns the sizes of equal blocks that cover ``size`` and are multiples of ``multiple``, the smallest first."""
    return [n for n in range(multiple, size + 1, multiple) if size % n == 0]


def _tiles(size: int, cores: int) -> list[int]:
    """Returns the widths of tiles that give every core the same number of them."""
    return [n for n in _divisors(size, LANES) if size // n % cores == 0]


def recurrence_ledger(
    blocks: RecurrenceBlocks, tokens: int, columns: int, itemsize: int, *, forward: bool
) -> dict[str, int]:
    """Returns what lies in on-chip memory in the forward or the prefix scan, in bytes; ``columns`` is the whole of X.

    Blocks that come from main memory lie there twice: one is worked on while the next one arrives.
    """
    tile, block = blocks
    return {
        "W0, tile": 4 * tile * columns,
        "S, tile": 4 * tile * columns,
        "read and written with, 2 blocks each": (1 if forward else 2) * 2 * tokens * block * itemsize,
        "written, 2 blocks and 1 masked": 3 * tokens * tile * itemsize,
        "result, 2 blocks and its sum": tokens * tile * (2 * itemsize + 4),
        "masks, 2 blocks": 2 * tokens * LANES * 4,
        "values of a step": tile * block * (4 + itemsize),
    }


def suffix_ledger(blocks: SuffixBlocks, width: int, itemsize: int) -> dict[str, int]:
    """Returns what lies in on-chip memory in the suffix scan, in bytes.

    The two masks of a token take a whole row of a register, ``LANES`` values. The values of a step are the fp32 result
    of one product with G, for dv as wide as D and for dz as a tile; the larger of the two is counted.
    """
    tile, tokens = blocks
    return {
        "G, tile": 4 * width * tile,
        "G to read": itemsize * width * tile,
        "z, dz in and out, 2 blocks each": 3 * 2 * tokens * tile * itemsize,
        "v and do, 2 blocks each": 2 * 2 * tokens * width * itemsize,
        "dv in and out, 2 blocks each": 2 * 2 * tokens * width * 4,
        "masks, 2 blocks": 2 * tokens * LANES * 4,
        "G handed over": 4 * HANDED_ROWS * tile,
        "values of a step": 4 * tokens * max(width, tile),
    }
