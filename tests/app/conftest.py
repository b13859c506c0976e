"""One corpus, its store, and finished runs that tests copy from; all of it made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.app.small import World, done, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped, with a checkpoint of every step to compare others with."""
    workdir = tmp_path_factory.mktemp("straight") / "ttt"
    keep = ("--config.train.checkpoint.every_steps=1", "--config.train.checkpoint.keep_last=100")
    done("train", world.config, f"--workdir={workdir}", *keep)
    return workdir


@pytest.fixture(scope="session")
def dense(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin without TTT."""
    workdir = tmp_path_factory.mktemp("dense") / "dense"
    done("train", world.dense_config, f"--workdir={workdir}")
    return workdir


@pytest.fixture
def copy_of(straight: Path, tmp_path: Path) -> Callable[..., Path]:
    """``copy_of(4, 8)`` is a copy of the straight run as it was at step 8, with checkpoints 4 and 8."""

    def copy(*kept: int) -> Path:
        workdir = tmp_path / "copy"
        shutil.copytree(straight, workdir, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "eval"))
        for step in kept:
            shutil.copytree(straight / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
        return workdir

    return copy


@pytest.fixture(scope="session")
def wild(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose eta is far too large, and what it printed to standard error."""
    workdir = tmp_path_factory.mktemp("wild") / "wild"
    flags = ("--config.model.ttt.eta=1e7", "--config.train.num_steps=5")
    return workdir, done("train", world.config, f"--workdir={workdir}", *flags).err
