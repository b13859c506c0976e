"""An update that is not finite shows in the outcome alone; the run goes through the loop and saves what was before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
import pytest

from intttrain.train import step as step_module
from tests.app.small import World, assert_same_state, cli, error_line, metrics, steps


@pytest.mark.parametrize("step", [4, 6], ids=["at a checkpoint", "between checkpoints"])
def test_an_update_that_is_not_finite_is_not_applied_and_not_saved(
    world: World, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Loss and gradient are those of a healthy step, so only the outcome shows it."""
    make_optimizer = step_module.make_optimizer

    def make_faulty(*args: Any) -> optax.GradientTransformation:
        optimizer = make_optimizer(*args)

        def update(grads: Any, state: Any, params: Any) -> Any:
            updates, after = optimizer.update(grads, state, params)
            factor = jnp.where(after[0].count < step, 1.0, jnp.inf)
            norm = {"scale": updates["final_norm"]["scale"] * factor}
            return updates | {"final_norm": norm}, after

        return optax.GradientTransformation(optimizer.init, update)

    workdir = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(step_module, "make_optimizer", make_faulty)
        outcome = cli("train", world.config, f"--workdir={workdir}", "--config.train.skip.max_in_a_row=1")
    line = error_line(outcome, status=3, after_other_lines=True)
    assert f"step {step}: loss=" in line and "the new update and parameters would not be finite" in line
    assert "nan" not in line and f"step {step - 1} is saved" in line
    assert steps(workdir)[-1] == step - 1 and metrics(workdir) == metrics(straight)[: step - 1]
    assert_same_state(workdir, straight, step - 1)
