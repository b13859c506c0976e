"""Devices that are not there, or that somebody else has: one line, and the status that fits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from intttrain.config.errors import PassingError, UserError
from intttrain.pod import devices
from intttrain.pod.distributed import check_single

REPO = Path(__file__).resolve().parents[2]
# As JAX raised them.
IN_USE = (
    "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 176028. Not attempting "
    "to load libtpu.so in this process. (set JAX_PLATFORMS='' to automatically choose an available backend)",
    "Unable to initialize backend 'tpu': ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "
    "\"$ sudo rm /tmp/libtpu_lockfile\". (set JAX_PLATFORMS='' to automatically choose an available backend)",
    "Unable to initialize backend 'tpu': UNKNOWN: TPU initialization failed: open(/dev/vfio/0): "
    "Device or resource busy",
    "Unable to initialize backend 'cuda': INTERNAL: no supported devices found for platform CUDA (you may need to "
    "uninstall the failing plugin package, or set JAX_PLATFORMS=cpu to skip this backend.)",
    "Unable to initialize backend 'cuda': INTERNAL: failed call to cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY: "
    "out of memory",
    "Unable to initialize backend 'cuda': INTERNAL: CUDA error: CUDA-capable device(s) is/are busy or unavailable",
)


class Devices:
    """Stands for ``jax.devices``: raises ``said`` as often as told, and counts what was done about it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> None:
        self.error, self.left, self.asked = error, times, 0
        self.waits: list[float] = []
        self.forgotten = 0
        monkeypatch.setattr(jax, "devices", self)
        monkeypatch.setattr(devices.time, "sleep", self.waits.append)
        monkeypatch.setattr(devices, "clear_backends", self.forget)

    def forget(self) -> None:
        self.forgotten += 1

    def __call__(self) -> list[str]:
        self.asked += 1
        if self.asked <= self.left:
            raise self.error
        assert self.forgotten == self.left, "what the failed attempt opened would be taken for all there is"
        return ["device"]


@pytest.mark.parametrize("said", IN_USE)
def test_devices_in_use_are_waited_for(said, monkeypatch, capsys):
    fake = Devices(monkeypatch, RuntimeError(said), 2)
    devices.open_devices()
    assert fake.asked == 3 and fake.waits == list(devices.WAITS_S[:2])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: the devices are in use (") for line in lines)
    assert lines[0].endswith("; trying again in 5 s") and "JAX_PLATFORMS" not in lines[0]


def test_devices_that_stay_in_use_are_worth_a_restart(monkeypatch):
    fake = Devices(monkeypatch, RuntimeError(IN_USE[0]), 99)
    with pytest.raises(PassingError, match=r"in use after 5 attempts in 65 s: ABORTED: .* pid 176028\.") as caught:
        devices.open_devices()
    assert fake.asked == len(devices.WAITS_S) + 1 and "\n" not in str(caught.value)


def test_what_another_process_did_not_answer_is_no_matter_of_this_device(monkeypatch):
    said = "Unable to initialize backend 'cuda': DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cuda:topology/1"
    Devices(monkeypatch, RuntimeError(said), 1)
    with pytest.raises(RuntimeError, match="GetKeyValue"):
        devices.open_devices()


def test_a_platform_that_is_not_installed(monkeypatch):
    said = "Unable to initialize backend 'rocm': Backend 'rocm' is not in the list of known backends: ['cpu', 'tpu']."
    Devices(monkeypatch, RuntimeError(said), 1)
    with pytest.raises(UserError, match=r"this JAX has no rocm, only 'cpu', 'tpu'; install .* use JAX_PLATFORMS=cpu"):
        devices.open_devices()


PROGRAM = """
import sys
from intttrain.pod import devices
from intttrain.config import errors
devices.WAITS_S = ()
try:
    devices.open_single("intttrain generate")
except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.status)
"""


@pytest.mark.parametrize(
    ("platforms", "statuses", "part"),
    [
        ("tpuu", (2,), "JAX_PLATFORMS=tpuu: 'tpuu' is no platform of JAX; did you mean 'tpu'?"),
        ("cuda", (2,), "JAX_PLATFORMS=cuda: "),
        # libtpu, where it is installed, lets one program at a time ask for chips: this may meet another test.
        ("tpu", (2, 4), "JAX_PLATFORMS=tpu: |the devices are in use after 1 attempts"),
    ],
)
def test_a_platform_that_is_not_there_is_one_line(platforms, statuses, part, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": platforms, "PYTHONPATH": str(REPO)}
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode in statuses and "Traceback" not in done.stderr, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert any(text in line for text in part.split("|"))
    assert "JAX_PLATFORMS=cpu" in line or "did you mean" in line or done.returncode == 4


def test_a_program_of_one_process_does_not_open_the_devices_of_several(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("asked for devices"))
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE=2"):
        devices.open_single("intttrain generate")
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(jax, "devices", lambda: ["device"])
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="intttrain generate runs in one process, and this TPU slice has 4 hosts"):
        devices.open_single("intttrain generate")
    check_single("intttrain generate", None)
