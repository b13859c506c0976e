"""Programs that need several CPU devices: a process of their own, because JAX fixes the number when it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
# These programs run once and compile for minutes.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def on_eight_cpu_devices(module: str, *arguments: str) -> Any:
    """Runs ``python -m module`` with eight CPU devices and returns the JSON in its last line."""
    return on_cpu_devices(8, module, *arguments)


def on_cpu_devices(count: int, module: str, *arguments: str) -> Any:
    """Runs ``python -m module`` with so many CPU devices and returns the JSON in its last line."""
    flags = f"--xla_force_host_platform_device_count={count} {COMPILE_FAST}"
    ran = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPO, env=dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])
