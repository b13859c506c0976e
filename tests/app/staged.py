"""Trains one run in three stages, each on a mesh of its own over eight CPU devices: straight, and stopped everywhere.

    python -m tests.app.staged FOLDER

Prints as JSON the checksums of both runs, what was reported, which model is read back, how many labels the text of
each step has, and what ``eval --follow`` finds at the end of each stage. A process of its own because the number of CPU
devices is fixed when JAX starts.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax

from intttrain.app.runs import load_trained
from intttrain.data import make_row_dataset
from tests.app.small import CONFIG_TEXT, config_of, done

LAST = {"model.rope.theta": 1e5, "model.remat": "full"}
STAGES = (
    {"until_step": 2, "overrides": {"data.seq_len": 32, "train.batch_rows": 8, "mesh.fsdp": 8}},
    {"until_step": 4, "overrides": {"data.seq_len": 64, "train.batch_rows": 4, "mesh.context": 2, "mesh.fsdp": 4}},
    {"until_step": 6, "overrides": {"data.seq_len": 128, "train.batch_rows": 2, "mesh.context": 4, **LAST}},
)
STOPS = (1, 2, 3, 5)  # inside the first stage, at its end, inside the second and the third


def checksums(workdir: Path, step: int) -> dict[str, int]:
    """The checksum of every array of a checkpoint, and its cursor."""
    document = json.loads((workdir / "checkpoints" / str(step) / "info" / "metadata").read_text())
    arrays = {name: entry["checksum"] for name, entry in document["arrays"].items()}
    return arrays | {"data_cursor": document["info"]["data_cursor"]}


def main() -> None:
    root = Path(sys.argv[1])
    jax.config.update("jax_compilation_cache_dir", str(root / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = f"--config={root / 'small.py'}"
    (root / "corpus").mkdir()
    for document in range(150):  # most of them short, so that the number of labels tells one text from another
        length = 120 if document % 10 == 0 else 1 + document % 7
        (root / "corpus" / f"{document:03}.txt").write_text(f"{document}" + "abc defgh"[document % 5 :] * (length // 3))
    text = CONFIG_TEXT.format(root=str(root), num_steps=6, batch_rows=2)
    end = "    return config"
    evaluation = "    config.eval.every_steps, config.eval.batch_rows = 2, 8\n"
    (root / "small.py").write_text(text.replace(end, f"    config.train.stages = {STAGES}\n{evaluation}{end}"))
    done("prepare", config, f"--output={root / 'data'}")

    def train(workdir: Path, *flags: str) -> str:
        keep = ("--config.train.checkpoint.every_steps=100", "--config.train.checkpoint.keep_last=100")
        return done("train", config, f"--workdir={workdir}", *keep, *flags).err

    straight, stopped = root / "straight", root / "stopped"
    lines = [train(straight), *(train(stopped, f"--stop_at_step={stop}") for stop in STOPS), train(stopped)]
    found = {
        name: {step: checksums(workdir, step) for step in steps}
        for name, workdir, steps in (("straight", straight, (2, 4, 6)), ("stopped", stopped, (*STOPS, 4, 6)))
    }
    thetas = [load_trained(straight, step).config.model.rope.theta for step in (2, 4, 6)]
    blocks = make_row_dataset(dataclasses.replace(config_of(straight).data, seq_len=128), 257)
    labels = [int(sum(blocks[row].loss_weights_BT.sum() for row in (2 * step, 2 * step + 1))) for step in range(6)]
    done("eval", config, f"--workdir={straight}", "--follow", "--config.data.train=()")
    evaluated = {
        path.parent.name: json.loads(path.read_text())["all"]["levels"]["on"]["value"]
        for path in straight.glob("eval/*/positions.json")
    }
    print(json.dumps({"reports": lines, "thetas": thetas, "labels": labels, "evaluated": evaluated, **found}))


if __name__ == "__main__":
    main()
