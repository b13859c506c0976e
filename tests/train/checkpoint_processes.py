"""Two processes with checkpoints that only one of them finds damaged, cannot read or cannot write.

    launch/local.sh 2 1 python -m tests.train.checkpoint_processes DIRECTORY

Each process prints a line for each case.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from intttrain.config.errors import UserError
from intttrain.config.training import CheckpointConfig
from intttrain.pod.distributed import process_index, start_distributed
from intttrain.train import CheckpointInfo, Checkpoints

CONFIG = CheckpointConfig(every_steps=1, keep_last=100)


def make_state(step: int) -> dict[str, Any]:
    sharding = NamedSharding(jax.make_mesh((2,), ("fsdp",)), PartitionSpec("fsdp"))
    values = np.random.default_rng(step).normal(size=(2, 50_000)).astype(np.float32)
    return {"params": {"w": jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])}}


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, make_state(step), CheckpointInfo(step, 0, {}, "f", {}))


def failing_with(error: Exception, checkpoints: Checkpoints) -> None:
    """Makes the newest step unreadable for this process."""
    newest, read = checkpoints.latest_step(), checkpoints._reader.restore

    def restore(folder: Any, *args: Any, **kwargs: Any) -> Any:
        if folder.name == str(newest):
            raise error
        return read(folder, *args, **kwargs)

    checkpoints._reader.restore = restore  # type: ignore[method-assign]


def outcome(action: Callable[[], str]) -> None:
    """Prints what one process returns or raises, when the other is done too."""
    began = time.monotonic()
    try:
        said = action()
    except UserError as error:
        said = f"UserError: {error}"
    assert time.monotonic() - began < 120, said  # Orbax by itself would wait for ten minutes
    print(said, flush=True)
    multihost_utils.sync_global_devices("next")


def restore(directory: Path, error: Exception, failing: int) -> str:
    with Checkpoints(directory, CONFIG) as checkpoints:
        if process_index() == failing:
            failing_with(error, checkpoints)
        state, info = checkpoints.restore_latest(make_state, lambda line: None)
        assert all(
            np.array_equal(shard.data, make_state(info.step)["params"]["w"].addressable_shards[0].data)
            for shard in state["params"]["w"].addressable_shards
        )
        return f"step {info.step} of {checkpoints.steps()}"


def write(directory: Path) -> str:
    """One process has no room; the other learns of it at the next steps."""
    with Checkpoints(directory, CONFIG) as checkpoints:
        if process_index() == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        save(checkpoints, 9)
        for step in range(10_000):
            checkpoints.raise_failed_save(step)
            time.sleep(0.01)
        return "nobody noticed"


def main() -> None:
    directory = Path(sys.argv[1])
    start_distributed()
    with Checkpoints(directory, CONFIG) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step)
    outcome(lambda: restore(directory, FileNotFoundError(2, "No such file or directory"), failing=1))
    outcome(lambda: restore(directory, PermissionError(13, "Permission denied"), failing=0))
    outcome(lambda: write(directory))


if __name__ == "__main__":
    main()
