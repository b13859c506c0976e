"""Figures of chips, and the environment for compiling without one."""

from __future__ import annotations

import importlib.util
import os

import pytest

from intttrain.config.errors import UserError
from intttrain.layout.hardware import CHIPS, GIB, chip, prepare_topology_compilation

# Multiply-adds per cycle: matrix units of a chip times their size.
_UNITS = {"v4": 8 * 128**2, "v5p": 8 * 128**2, "v5e": 4 * 128**2}


@pytest.mark.parametrize("name", _UNITS)
def test_clock_reaches_the_published_peak(name):
    assert 2 * _UNITS[name] * CHIPS[name].clock_hz == pytest.approx(CHIPS[name].peak_flops, rel=0.005)


def test_figures_of_one_device():
    assert chip("TPU v5") is CHIPS["v5p"]
    assert chip("v5p") is CHIPS["v5p"]
    assert CHIPS["v5p"].device_peak_flops == 459e12
    assert CHIPS["tpu7x"].device_peak_flops == 2307e12 / 2
    assert CHIPS["tpu7x"].device_hbm_bytes < 96 * GIB
    assert CHIPS["v5e"].device_hbm_bytes == 15.75 * GIB


def test_assumed_figures_exist():
    assert all(hasattr(c, name) for c in CHIPS.values() for name in c.assumed)


def test_unknown_chip():
    with pytest.raises(UserError, match="'TPU v5 lit'; did you mean 'TPU v5 lite'"):
        chip("TPU v5 lit")


def test_environment_keeps_what_is_set(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    prepare_topology_compilation()
    assert (os.environ["TPU_WORKER_HOSTNAMES"], os.environ["TPU_SKIP_MDS_QUERY"]) == ("mine", "1")


def test_missing_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'intttrain\[tpu\]'"):
        prepare_topology_compilation()
