"""TPU slices by name, "v5p:4x4x4" or "v5p-128", and their devices without having them.

libtpu ends the whole process on some names that it does not understand, so a name is checked here before it is passed
on: every length of the torus is positive and fits hosts of 2 x 2 chips, and the chip count fits the chip.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from intttrain.config.errors import UserError, did_you_mean
from intttrain.layout.hardware import CHIPS, Chip, prepare_topology_compilation

if TYPE_CHECKING:
    import jax

_HOST = (2, 2, 1)  # chips of one host; libtpu's default for every chip
# The largest slice that can be asked for (Cloud TPU pages of each chip).
_MAX_CHIPS = {"v4": 4096, "v5p": 6144, "v5e": 256, "v6e": 256, "tpu7x": 9216}
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "v5lite": "v5e", "ironwood": "tpu7x", "trillium": "v6e"}
_EXAMPLES = "v5p:4x4x4, v5e:16x16 or v5p-128"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice, or several equal ones.

    Attributes:
      name: of one slice as libtpu understands it, e.g. "v5p:4x4x4".
      chip: figures of its chip.
      shape: lengths of the torus, in chips.
      slices: number of slices.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    def wraps(self) -> tuple[bool, ...]:
        """Returns which dimensions close to rings: on a 3D torus all do or none, on a 2D one each by itself."""
        closed = tuple(length % self.chip.wrap_multiple == 0 for length in self.shape)
        return (all(closed),) * 3 if self.chip.torus_dims == 3 else (*closed, False)

    @property
    def hosts(self) -> int:
        """Processes of a job on all slices."""
        return max(1, self.chips // math.prod(_HOST))

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


# --- names ---------------------------------------------------------------------------------------------------------


def describe_topology(name: str, slices: int = 1) -> Topology:
    """Reads "CHIP:AxB[xC]", or a Cloud name such as "v5p-128", which counts TensorCores (v5e and v6e have one a chip).

    Raises:
      UserError: an unknown chip, or a shape that cannot be; with the nearest that can.
    """
    if slices < 1:
        raise UserError(f"slices={slices} has to be at least 1")
    found = re.fullmatch(r"\s*([A-Za-z0-9]+)\s*[:\-]\s*([0-9x]+)\s*", name)
    if not found:
        word = re.split(r"[:\-]", name)[0].strip().lower()
        chips = "" if word in CHIPS else did_you_mean(word, CHIPS)
        raise UserError(f"topology {name!r} has to look like {_EXAMPLES}{chips}")
    word, size = found.group(1).lower(), found.group(2)
    chip = CHIPS.get(_ALIASES.get(word, word))
    if chip is None:
        raise UserError(f"topology {name!r}: no chip is called {found.group(1)!r}{did_you_mean(word, CHIPS)}")
    if "x" in size or ":" in name:
        shape = _checked(name, chip, size)
    else:
        shape = _from_count(name, chip, int(size))
    return Topology(f"{chip.name}:{'x'.join(map(str, shape))}", chip, shape, slices)


def _checked(name: str, chip: Chip, size: str) -> tuple[int, ...]:
    """The shape in ``size`` if libtpu has such a slice."""
    parts = size.split("x")
    lengths = tuple(int(part) for part in parts if part)
    if len(lengths) != len(parts) or len(lengths) != chip.torus_dims or 0 in lengths:
        form = "x".join("ABC"[: chip.torus_dims])
        wanted = math.prod(n for n in lengths if n) or 1
        raise UserError(
            f"topology {name!r}: a slice of {chip.name} has {chip.torus_dims} lengths of at least 1, "
            f"{chip.name}:{form}; the nearest are {_nearest(chip, wanted)}"
        )
    if any(length % host for length, host in zip(lengths, _HOST[: chip.torus_dims], strict=True)):
        raise UserError(
            f"topology {name!r}: hosts have 2 x 2 chips, so the first two lengths have to be even; "
            f"the nearest are {_nearest(chip, math.prod(lengths), lengths)}"
        )
    if math.prod(lengths) > _MAX_CHIPS[chip.name]:
        raise UserError(
            f"topology {name!r}: {math.prod(lengths)} chips, but a slice of {chip.name} has at most "
            f"{_MAX_CHIPS[chip.name]}; use several slices, or {_nearest(chip, math.prod(lengths), lengths)}"
        )
    return lengths


def _from_count(name: str, chip: Chip, count: int) -> tuple[int, ...]:
    """The shape that Cloud gives a slice of ``count`` TensorCores or chips."""
    cores = chip.tensor_cores
    shapes = {math.prod(shape) * cores: shape for shape in _regular(chip)}
    if count not in shapes:
        near = sorted(sorted(shapes, key=lambda n: abs(math.log(n / max(count, 1))))[:3])
        unit = "TensorCores" if cores > 1 else "chips"
        choices = ", ".join(f"{chip.name}-{n} ({'x'.join(map(str, shapes[n]))})" for n in near)
        raise UserError(f"topology {name!r}: no slice of {chip.name} has {count} {unit}; the nearest are {choices}")
    return shapes[count]


def _regular(chip: Chip) -> Iterator[tuple[int, ...]]:
    """Shapes from powers of two whose lengths rise and differ at most by two, the usual ones, small to large."""
    most = _MAX_CHIPS[chip.name]
    if chip.torus_dims == 3:
        yield (2, 2, 1)
    powers = [2**n for n in range(1, 8)]
    shapes = itertools.combinations_with_replacement(powers, chip.torus_dims)
    regular = (s for s in shapes if s[-1] <= 2 * s[0] and math.prod(s) <= most)
    yield from sorted(regular, key=math.prod)


def _nearest(chip: Chip, chips: int, lengths: tuple[int, ...] = ()) -> str:
    """Up to three names: the shape with lengths rounded up, and the regular ones of about as many chips."""
    ranked = sorted(_regular(chip), key=lambda s: abs(math.log(math.prod(s) / chips)))[:3]
    if lengths:
        host = (*_HOST, 1)
        rounded = tuple(-(-n // host[i]) * host[i] for i, n in enumerate(lengths))
        if math.prod(rounded) <= _MAX_CHIPS[chip.name]:
            ranked = [rounded, *(s for s in ranked if s != rounded)][:3]
    return ", ".join(f"{chip.name}:{'x'.join(map(str, s))}" for s in ranked)


def roomier(topology: Topology) -> Topology | None:
    """Returns a topology of as many devices with more memory each, None where there is none.

    libtpu compiles nothing that does not fit, and does not name the arrays: the same step on this one shows them.
    """
    for chip in sorted(CHIPS.values(), key=lambda c: -c.device_hbm_bytes):
        for shape in _regular(chip):
            fits = math.prod(shape) * topology.slices * chip.devices == topology.devices
            if fits and chip.device_hbm_bytes > topology.chip.device_hbm_bytes:
                return Topology(f"{chip.name}:{'x'.join(map(str, shape))}", chip, shape, topology.slices)
    return None


# --- devices -------------------------------------------------------------------------------------------------------


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Returns the devices of a described TPU; programs can be compiled for them, not run.

    Raises:
      UserError: libtpu is missing, or cannot describe this topology.
    """
    prepare_topology_compilation()
    from jax.experimental import topologies

    # Without this libtpu describes a grid without rings and writes every gather as a sum of padded arrays.
    options: dict[str, Any] = {"wrap": topology.wraps()}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores as one device, as on Cloud TPU VMs
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as error:  # whatever libtpu says about it, and jax where the versions do not fit
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"libtpu cannot describe {topology}: {said}; the libtpu has to fit jax (pip install 'intttrain[tpu]')"
        ) from error
    return list(described.devices)
