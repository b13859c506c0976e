"""Compiler options for every kind of chip, each with its reason, and where compiled programs are kept.

They travel with the jitted step (``jax.jit(compiler_options=...)``), so training and planning compile alike and nothing
depends on ``XLA_FLAGS`` or ``LIBTPU_INIT_ARGS`` of a shell. Launchers set no flags; docs/launch.md names those that
were looked at and left out. This is the only place where either is set.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

import jax

PROGRAMS_FOLDER = "programs"

# ``device_kind`` -> options.
#
# xla_tpu_scoped_vmem_limit_kib: on-chip memory that one fused matmul may use. The default of 16 MiB makes XLA cut big
# matmuls into tiles that wait for memory; 64 MiB raises their predicted use of the matrix units from .80 to .97 on v5p.
_LARGE_TILES: Mapping[str, str] = types.MappingProxyType({"xla_tpu_scoped_vmem_limit_kib": "65536"})

COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = types.MappingProxyType(
    {
        "TPU v5": _LARGE_TILES,  # v5p
        "TPU v5 lite": _LARGE_TILES,  # v5e
        "TPU v6 lite": _LARGE_TILES,  # v6e
    }
)


def compiler_options(device: jax.Device) -> dict[str, str] | None:
    """Returns the options for programs that run on this kind of device, ``None`` for the defaults."""
    options = COMPILER_OPTIONS.get(device.device_kind)
    return None if options is None else dict(options)


def keep_programs(workdir: str) -> None:
    """Has JAX keep compiled programs in WORKDIR/programs, where the next start of the run finds them.

    What was compiled before the call is not kept. ``JAX_COMPILATION_CACHE_DIR`` names another folder and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps nothing. Nor is anything kept on CPUs, where a program fits only the
    kind of processor that it was compiled on.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", f"{workdir}/{PROGRAMS_FOLDER}")
