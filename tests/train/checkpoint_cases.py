"""What the checkpoint tests share: small states, and a way to run a script in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from intttrain.config.training import CheckpointConfig
from intttrain.train.checkpoint import CheckpointInfo, Checkpoints

KEEP_ALL = CheckpointConfig(every_steps=1, keep_last=100)
REPO = Path(__file__).resolve().parents[2]


def make_info(step: int) -> CheckpointInfo:
    return CheckpointInfo(
        step=step, data_cursor=8 * step, config={"model.d_model": 4, "model.ttt": None, "model.ttt.layers": [0, 2]},
        fingerprint="abc", tokenizer={"kind": "byte"},
    )  # fmt: skip


def make_state(seed: int, width: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    params = {
        "embed": {"weight": normal(7, width)},
        "layers": {"attention": {"q": normal(2, width, 3)}, "mlp_norm": {"scale": normal(2, width)}},
        "half": normal(5).astype(jnp.bfloat16),
    }
    opt_state = optax.chain(optax.scale_by_adam(), optax.scale(1.0)).init(params)
    return {
        "params": params,
        "opt_state": jax.tree.map(lambda leaf: normal(*leaf.shape).astype(leaf.dtype), opt_state),
        "step": jnp.int32(seed),
        "healthy": jnp.asarray(True),
        "rng": jax.random.key_data(jax.random.key(seed)),
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def save_steps(directory: Path, *steps: int, config: CheckpointConfig = KEEP_ALL) -> None:
    with Checkpoints(directory, config) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), make_info(step))


def restore_newest(checkpoints: Checkpoints, abstract_state: Any) -> tuple[dict[str, Any], CheckpointInfo]:
    """Restores the newest step, which is intact."""

    def refuse(line: str) -> None:
        raise AssertionError(line)

    return checkpoints.restore_latest(lambda _: abstract_state, refuse)


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_same_bits(ours: Any, expected: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(ours))[path]
        assert other.dtype == leaf.dtype and other.shape == leaf.shape, path
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


def run_python(script: str, *args: str | Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
