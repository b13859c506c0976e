"""Makes the run that is kept beside the tests: ``python -m tests.app.stored_run FOLDER``, an empty or missing one.

``tests/app/stored/format_2`` was made so at format 2 (jax 0.10.2, intttrain 0.1.0), and is never made again: it stands
for the runs that people have. Another folder joins it when ``checkpoint_info.FORMAT`` is raised. It holds

    store/          the token store of eight short documents
    run/            a workdir with config.json and the checkpoint of step 2
    expected.json   loss and gradient norm of steps 3 and 4, from the run that was never stopped
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.app.small import CONFIG_TEXT, done, metrics

LAST_STEP, KEPT_STEP = 4, 2
SHOWN = ("step", "loss", "grad_norm")
SMALLER = """
    model.d_model, model.d_ff, model.num_layers, model.num_heads, model.head_dim = 8, 8, 1, 1, 8
    model.ttt.chunk_tokens, config.data.seq_len, config.data.heldout = 8, 16, None
    config.prepare.heldout_fraction = 0.0
    config.train.checkpoint.every_steps = 2
    return config
"""


def make(folder: Path) -> None:
    folder = folder.absolute()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):  # what is kept names no folder of a machine
        root = Path()
        (root / "corpus").mkdir()
        for number in range(8):
            (root / "corpus" / f"{number}.txt").write_text(f"line {number}: " + "def return value " * 2)
        text = CONFIG_TEXT.format(root=".", num_steps=LAST_STEP, batch_rows=2)
        (root / "small.py").write_text(text.replace("\n    return config\n", SMALLER))
        config = f"--config={root / 'small.py'}"
        done("prepare", config, f"--output={root / 'data'}")
        done("train", config, f"--workdir={root / 'run'}")
        expected = [{key: record[key] for key in SHOWN} for record in metrics(root / "run")][KEPT_STEP:]
        shutil.copytree(root / "data" / "train", folder / "store")
        (folder / "run").mkdir()
        shutil.copy(root / "run" / "config.json", folder / "run")
        step = Path("run") / "checkpoints" / str(KEPT_STEP)
        # Orbax leaves the path of the folder in files that only buckets need.
        shutil.copytree(root / step, folder / step, ignore=shutil.ignore_patterns("commit_success.txt"))
        (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
