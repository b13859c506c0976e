"""The first question to JAX for a device, and what a person reads when there is none."""

from __future__ import annotations

import re
import time

import jax
from jax.extend.backend import clear_backends

from intttrain.config.errors import PassingError, UserError, did_you_mean
from intttrain.logs.streams import say
from intttrain.pod.distributed import check_single

WAITS_S = (5, 10, 20, 30)  # between attempts at devices that are in use: a program that was killed takes a while to end
PLATFORMS = ("cpu", "tpu", "cuda", "rocm")

# What libtpu, CUDA and ROCm say of a device that somebody else has, or that is not ready yet.
_IN_USE = re.compile(
    r"already in use|libtpu multi-process lockfile|resource busy|busy or unavailable|out of memory|OUT_OF_MEMORY"
    r"|DEVICE_UNAVAILABLE|SYSTEM_NOT_READY|no supported devices found",
    re.IGNORECASE,
)
_BETWEEN_PROCESSES = re.compile("DEADLINE_EXCEEDED|UNAVAILABLE: |CANCELLED|coordination")  # not of this host


def open_devices() -> None:
    """Makes JAX open the devices of this process; waits for those that are in use, about a minute in all.

    Has to come after ``start_distributed`` and before anything else that needs a device.

    Raises:
      UserError: JAX_PLATFORMS names what is not there.
      PassingError: the devices are still in use.
    """
    for attempt, wait_s in enumerate((*WAITS_S, None), start=1):
        try:
            jax.devices()
            return
        except (RuntimeError, AssertionError) as error:  # the latter without a message, where there is no GPU
            said = " ".join(str(error).split())
            if _BETWEEN_PROCESSES.search(said):
                raise
            if not _IN_USE.search(said):
                raise UserError(_explain(said)) from error
        clear_backends()  # a platform that did open would be taken for all there are
        reason = _reason(said)
        if wait_s is None:
            raise PassingError(
                f"the devices are in use after {attempt} attempts in {sum(WAITS_S)} s: {reason}; end the program that "
                "has them, or start again later"
            )
        say(f"warning: the devices are in use ({reason}); trying again in {wait_s} s")
        time.sleep(wait_s)


def open_single(program: str) -> None:
    """Opens the devices for ``program``, which runs in one process; used as ``open_devices``.

    Raises:
      UserError: this process is one of several; or as ``open_devices``.
      PassingError: as ``open_devices``.
    """
    check_single(program, jax.config.jax_platforms)  # type: ignore[attr-defined]
    open_devices()
    if jax.process_count() > 1:
        raise UserError(
            f"{program} runs in one process, and this TPU slice has {jax.process_count()} hosts; run it on one host "
            "with JAX_PLATFORMS=cpu"
        )


def _explain(said: str) -> str:
    """Returns one line for a platform that is not there."""
    wanted = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    given = f"JAX_PLATFORMS={wanted}"  # which JAX itself sets to tpu,cpu where it finds TPU chips
    use = "use JAX_PLATFORMS=cpu, or leave it unset to take what is there"
    unknown = [name for name in wanted.split(",") if name not in (*PLATFORMS, "gpu")]
    if unknown and "not in the list of known backends" in said:
        return f"{given}: {unknown[0]!r} is no platform of JAX{did_you_mean(unknown[0], PLATFORMS)}"
    if known := re.search(r"Backend '(\w+)' is not in the list of known backends: \[(.*?)\]", said):
        return f"{given}: this JAX has no {known[1]}, only {known[2]}; install the extra of jax for it, or {use}"
    return f"{given}: no device could be opened ({_reason(said) or 'there is no GPU'}); {use}"


def _reason(said: str) -> str:
    """Returns what JAX says without its frame, which recommends settings of JAX."""
    return re.sub(r"^Unable to initialize backend '\w+': | \((set JAX_PLATFORMS=|you may need to ).*", "", said)
