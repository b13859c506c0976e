"""A run killed at four seeded moments ends as one that was not (the long version: ``tests/app/kill_study.py``)."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from tests.app.kill_study import make_moments, study
from tests.app.small import NUM_STEPS, World


@pytest.mark.slow
def test_killed_in_saves_steps_and_restores(world: World, straight: Path, tmp_path: Path) -> None:
    moments = make_moments(4, processes=1, seed=2)
    assert sum(moment.count for moment in moments if moment.phase != "restore") < NUM_STEPS
    cache = Path(str(jax.config.jax_compilation_cache_dir))
    hit = [where for where, _ in study(world, straight, tmp_path / "killed", cache, moments)]
    assert len(hit) == len(moments) and "save" in hit, hit
