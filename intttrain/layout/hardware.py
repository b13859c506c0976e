"""Figures of the TPU chips that can be planned for, and the environment that compiling for an absent TPU needs.

Sources, a figure each:

- Peak, memory and its bandwidth, number of links: the "System architecture" pages of the Cloud TPU documentation
  (cloud.google.com/tpu/docs/v4, /v5p, /v5e, /v6e, /tpu7x), per chip. "Bidirectional ICI bandwidth" there is the sum
  over both directions of all links: 1200 GB/s of a v5p are 6 links with 100 GB/s each way; v5e 400 GB/s and 4 links;
  v6e 3200 Gbit/s one way and 4 links.
- Data-center network: the same pages per chip (v5p 50 Gbit/s, v6e 25.6 Tbit/s and v5e 6.4 Tbit/s a pod of 256).
- Memory a program may use: what libtpu 0.0.52 names as available when it refuses a program that is too large. It is
  less than the chip has, because the runtime keeps a part.
- Clock: the rate at which the matrix units reach the published peak: v4 and v5p 8 units of 128 x 128, v5e 4 units.

``Chip.assumed`` names the figures that no source above gives.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import types
from collections.abc import Mapping

import jax

from intttrain.config.errors import UserError, did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip. Properties that begin with ``device_`` are those of one JAX device.

    Attributes:
      name: "v4", "v5p", "v5e", "v6e" or "tpu7x".
      device_kind: what ``jax.Device.device_kind`` says.
      devices: JAX devices per chip (v4 and v5p join their two cores to one device, tpu7x does not).
      tensor_cores: TensorCores per chip; Cloud names such as v5p-128 count them.
      peak_flops: bf16 FLOP/s of a chip.
      hbm_bytes_per_second: memory bandwidth of a chip.
      device_hbm_bytes: memory that a program may use on one device.
      clock_hz: of the TensorCore; turns the compiler's cycles into seconds.
      torus_dims: dimensions of the network between chips.
      link_bytes_per_second: one link in one direction; a chip has two links per torus dimension.
      dcn_bytes_per_second: between slices, per chip and direction.
      wrap_multiple: a torus dimension whose length is a multiple of this closes to a ring.
      assumed: names of figures that could not be traced to a source.
    """

    name: str
    device_kind: str
    devices: int
    tensor_cores: int
    peak_flops: float
    hbm_bytes_per_second: float
    device_hbm_bytes: int
    clock_hz: float
    torus_dims: int
    link_bytes_per_second: float
    dcn_bytes_per_second: float
    wrap_multiple: int
    assumed: tuple[str, ...] = ()

    @property
    def device_peak_flops(self) -> float:
        """bf16 FLOP/s of one device."""
        return self.peak_flops / self.devices

    @property
    def device_hbm_bytes_per_second(self) -> float:
        """Memory bandwidth of one device."""
        return self.hbm_bytes_per_second / self.devices


_TABLE = (
    Chip(
        name="v4", device_kind="TPU v4", devices=1, tensor_cores=2,
        peak_flops=275e12, hbm_bytes_per_second=1200e9, device_hbm_bytes=int(30.75 * GIB), clock_hz=1.05e9,
        torus_dims=3, link_bytes_per_second=50e9, dcn_bytes_per_second=6.25e9, wrap_multiple=4,
        assumed=("link_bytes_per_second", "dcn_bytes_per_second"),
    ),
    Chip(
        name="v5p", device_kind="TPU v5", devices=1, tensor_cores=2,
        peak_flops=459e12, hbm_bytes_per_second=2765e9, device_hbm_bytes=int(95.73 * GIB), clock_hz=1.75e9,
        torus_dims=3, link_bytes_per_second=100e9, dcn_bytes_per_second=6.25e9, wrap_multiple=4,
    ),
    Chip(
        name="v5e", device_kind="TPU v5 lite", devices=1, tensor_cores=1,
        peak_flops=197e12, hbm_bytes_per_second=819e9, device_hbm_bytes=int(15.75 * GIB), clock_hz=1.5e9,
        torus_dims=2, link_bytes_per_second=50e9, dcn_bytes_per_second=3.125e9, wrap_multiple=16,
    ),
    Chip(
        name="v6e", device_kind="TPU v6 lite", devices=1, tensor_cores=1,
        peak_flops=918e12, hbm_bytes_per_second=1638e9, device_hbm_bytes=int(31.24 * GIB), clock_hz=1.75e9,
        torus_dims=2, link_bytes_per_second=100e9, dcn_bytes_per_second=12.5e9, wrap_multiple=16,
        assumed=("clock_hz",),
    ),
    Chip(
        name="tpu7x", device_kind="TPU7x", devices=2, tensor_cores=2,
        peak_flops=2307e12, hbm_bytes_per_second=7380e9, device_hbm_bytes=int(94.74 * GIB), clock_hz=2.2e9,
        torus_dims=3, link_bytes_per_second=100e9, dcn_bytes_per_second=12.5e9, wrap_multiple=4,
        assumed=("clock_hz", "link_bytes_per_second", "dcn_bytes_per_second"),
    ),
)  # fmt: skip

CHIPS: Mapping[str, Chip] = types.MappingProxyType({c.name: c for c in _TABLE})
_BY_KIND: Mapping[str, Chip] = types.MappingProxyType({c.device_kind: c for c in _TABLE})


def find_chip(device_kind: str) -> Chip | None:
    """Returns the figures of a device by its ``device_kind`` or the name of its chip, ``None`` if neither is known."""
    return CHIPS.get(device_kind) or _BY_KIND.get(device_kind)


def chip(device_kind: str) -> Chip:
    """Returns the figures of a device as ``find_chip`` does.

    Raises:
      UserError: it is not known.
    """
    if found := find_chip(device_kind):
        return found
    raise UserError(f"no figures of a chip called {device_kind!r}{did_you_mean(device_kind, [*CHIPS, *_BY_KIND])}")


# --- compiling for a TPU that is not there -------------------------------------------------------------------------

# Read by libtpu when it is loaded, which the first description of a topology does.
_ABSENT_TPU: Mapping[str, str] = types.MappingProxyType(
    {
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server which TPU this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling holds no TPU: no lock against other processes
        "TPU_WORKER_HOSTNAMES": "localhost",  # no warning about an unknown host
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # nor about an unknown kind; the topology's own name decides
    }
)


def prepare_topology_compilation() -> None:
    """Sets the environment in which libtpu describes and compiles for a TPU that is not there.

    Has to run before libtpu is loaded; JAX may be imported already. On a host that has a TPU, what is set there stays.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs libtpu, also on a machine without one; "
            "pip install 'intttrain[tpu]' (or the libtpu that fits the installed jax: pip install 'jax[tpu]')"
        )
    for name, value in _ABSENT_TPU.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # compiling needs no device: a TPU that is there stays free for a run
