"""``intttrain eval --follow``: evaluates the checkpoints of a run while another process writes them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from intttrain.app.runs import Trained, has_run, last_step
from intttrain.config.errors import UserError
from intttrain.config.training import CheckpointConfig
from intttrain.pod.agreement import decided_by_first, largest
from intttrain.storage.files import Place
from intttrain.train import Checkpoints

POLL_S = 10.0
_WAIT, _FINISHED = -1, -2  # in place of a step

Report = Callable[[str], None]


def follow_run(
    workdir: Place, task: str, load: Callable[[int], Trained], evaluate: Callable[[Trained], None], report: Report
) -> None:
    """Evaluates every checkpoint of a run once, the newest first, until that of its last step is done.

    Training may not have begun yet, and may write and remove checkpoints meanwhile. Steps that have results of ``task``
    in WORKDIR/eval are left out. All processes call it together; the first one looks at the folder for all.

    Args:
      workdir: of the run.
      task: name of the result files.
      load: reads a step.
      evaluate: writes results of what was read.
      report: receives a line for each wait, and one for each checkpoint that was removed before it was read.

    Raises:
      UserError: a checkpoint that stays cannot be read, or anything that ``evaluate`` raises.
    """
    _wait(lambda: (_FINISHED if has_run(workdir) else _WAIT, f"waiting for a run in {workdir}"), report)
    last, done = last_step(workdir), evaluated_steps(workdir / "eval", task)
    if done:
        report(f"{workdir / 'eval'} has {task}.json of step {', '.join(map(str, sorted(done)))} already")
    with Checkpoints(str(workdir / "checkpoints"), CheckpointConfig(), read_only=True) as checkpoints:
        while (step := _next_step(checkpoints, done, last, report)) != _FINISHED:
            done.add(step)
            trained = _load_unless_removed(checkpoints, step, load)
            if trained is None:
                report(f"note: the checkpoint of step {step} was removed before it was read; going on without it")
            else:
                evaluate(trained)


def evaluated_steps(folder: Place, task: str) -> set[int]:
    """Returns the steps with results of ``task`` in STEP, STEP-2, ... below ``folder``."""
    names = [path.parent.name.partition("-")[0] for path in folder.glob(f"*/{task}.json")]
    return {int(name) for name in names if name.isdecimal()}


def _next_step(checkpoints: Checkpoints, done: set[int], last: int, report: Report) -> int:
    """Waits for a step that is not done and returns the newest; ``_FINISHED`` when there is and will be none."""

    def look() -> tuple[int, str]:
        steps = set(checkpoints.steps())
        seen = f"the newest is step {max(steps | done)}" if steps | done else "there is none yet"
        step = max(steps - done, default=_FINISHED if last in steps | done else _WAIT)
        return step, f"waiting for a checkpoint; {seen} of {last}"

    return _wait(look, report)


def _wait(look: Callable[[], tuple[int, str]], report: Report) -> int:
    """Returns what the first process sees once that is not ``_WAIT``; says once what is waited for."""
    told = False
    while True:
        value, waiting = look()
        if (value := _agreed(value)) != _WAIT:
            return value
        if not told:
            report(waiting)
        told = True
        time.sleep(POLL_S)


def _load_unless_removed(checkpoints: Checkpoints, step: int, load: Callable[[int], Trained]) -> Trained | None:
    """Returns the checkpoint, or ``None`` if training removed it while it was read, on any process."""
    trained, failure = None, None
    try:
        trained = load(step)
    except UserError as error:
        failure = error
    if not largest(int(failure is not None)):
        return trained
    if _agreed(int(step in checkpoints.steps())):
        time.sleep(POLL_S)  # a folder that is being removed is there until its last file is gone
        if _agreed(int(step in checkpoints.steps())):
            raise failure or UserError(f"checkpoint step {step} could not be read by another process")
    return None


def _agreed(value: int) -> int:
    """Returns the value of the first process."""
    return int(decided_by_first(np.array(value, np.int32)))
