"""A run small enough to be repeated in every test, the command line in this process, and what a run left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from intttrain.app.cli import run
from intttrain.app.runs import CONFIG_FILE
from intttrain.config import Config, resolve
from intttrain.config.dotted import unflatten
from intttrain.logs.metrics import METRICS_FILE, read_metrics
from intttrain.train import Checkpoints, abstract_state

REPO = Path(__file__).resolve().parents[2]
NUM_STEPS = 10
BATCH_ROWS = 2
WORDS = ["def", "return", "value", "for", "in", "if", "else", "line", "text", "path", "token", "layer", "state"]
TIMING = ("tokens_per_second", "eta_seconds", "peak_memory_gib")  # these and ``hosts/`` differ between equal runs

CONFIG_TEXT = '''"""Everything at its smallest."""

import ml_collections

from intttrain.config import default_config

HERE = {root!r}


def get_config(variant: str = "ttt") -> ml_collections.ConfigDict:
    config = default_config()
    config.name = f"small-{{variant}}"
    model = config.model
    model.vocab_size, model.d_model, model.d_ff, model.num_layers = 257, 16, 32, 2
    model.num_heads, model.num_kv_heads, model.head_dim = 2, 1, 8
    model.compute_dtype, model.remat = "float32", "none"
    model.ttt.layers, model.ttt.chunk_tokens, model.ttt.eta = (0,), 16, 0.3
    if variant == "dense":
        model.ttt = None
    elif variant != "ttt":
        raise ValueError(f"the variants are ttt and dense, not {{variant!r}}")
    config.prepare.source.paths = (HERE + "/corpus",)
    config.prepare.heldout_fraction = 0.3
    config.data.train = ({{"path": HERE + "/data/train", "weight": 1.0}},)
    config.data.heldout = HERE + "/data/heldout"
    config.data.seq_len = 64
    config.train.num_steps, config.train.batch_rows = {num_steps}, {batch_rows}
    config.train.schedule.warmup_steps = 2
    config.train.checkpoint.every_steps, config.train.log_every_steps = 4, 1
    config.eval.seq_len = config.eval.min_document_tokens = 64
    config.eval.documents, config.eval.batch_rows, config.eval.bootstrap_samples = 8, 4, 50
    config.eval.position_edges = (16, 32, 64)
    return config
'''


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with a corpus, its prepared stores under ``data`` and a configuration file; tests only read it."""

    root: Path

    @property
    def config(self) -> str:
        return f"--config={self.root / 'small.py'}"

    @property
    def dense_config(self) -> str:
        return f"{self.config}:dense"


def make_world(root: Path) -> World:
    """Writes corpus, configuration and stores into an empty folder."""
    (root / "corpus").mkdir()
    choose = random.Random(0)
    for number in range(40):
        text = " ".join(choose.choice(WORDS) for _ in range(30 + number % 7 * 5))
        (root / "corpus" / f"{number:02}.txt").write_text(text)
    (root / "small.py").write_text(CONFIG_TEXT.format(root=str(root), num_steps=NUM_STEPS, batch_rows=BATCH_ROWS))
    world = World(root)
    done("prepare", world.config, f"--output={root / 'data'}")
    return world


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


def cli(*arguments: str | Path) -> Outcome:
    """Runs one command in this process; an exception that is not turned into a status comes through."""
    sys.modules.pop("config_config", None)  # the name that ml_collections gives to any file: no test sees another's
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the load_module", category=DeprecationWarning)  # ml_collections
        status = run([str(argument) for argument in arguments])
    return Outcome(status, out.getvalue(), err.getvalue())


def done(*arguments: str | Path) -> Outcome:
    """Runs a command that has to succeed."""
    outcome = cli(*arguments)
    assert outcome.status == 0, outcome
    return outcome


def error_line(outcome: Outcome, status: int = 2, *, after_other_lines: bool = False) -> str:
    """Returns the one line that a refused command prints, after checking that it is one."""
    lines = outcome.err.splitlines()
    assert outcome.status == status, outcome
    assert lines and lines[-1].startswith("error: "), outcome
    assert after_other_lines or len(lines) == 1, outcome
    assert sum("error" in line for line in lines) == 1 and "Traceback" not in outcome.err, outcome
    assert len(lines[-1]) > len("error: ") + 10, f"says nothing: {lines[-1]}"
    return lines[-1]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Returns every path below ``folder`` with the bytes of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Checks that the block neither writes nor removes anything in the folders."""
    before = [contents(folder) for folder in folders]
    yield
    for folder, old in zip(folders, before, strict=True):
        new = contents(folder)
        assert sorted(new) == sorted(old), f"{folder}: {set(new) ^ set(old)}"
        assert new == old, f"{folder}: {[name for name in old if old[name] != new[name]]}"


def config_of(workdir: Path) -> Config:
    """Returns the configuration that a run was started with."""
    return resolve(unflatten(json.loads((workdir / CONFIG_FILE).read_text())["flat_config"]))


def steps(workdir: Path) -> list[int]:
    """Returns the steps that are complete; an unfinished save has a name of another kind."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def saved(workdir: Path, step: int) -> dict[str, Any]:
    """Returns everything that a checkpoint restores: arrays by dotted name, and the data cursor."""
    config = config_of(workdir)
    with Checkpoints(workdir / "checkpoints", config.train.checkpoint, read_only=True) as checkpoints:
        state, info = checkpoints.restore(step, abstract_state(config))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    assert {"step", "rng", "healthy"} < set(arrays) and any(".mu." in name for name in arrays), "not a whole state"
    return arrays | {"data_cursor": np.asarray(info.data_cursor)}


def checksums(workdir: Path, step: int) -> dict[str, int]:
    """Returns the checksum of every array of a checkpoint, as it was saved."""
    document = json.loads((workdir / "checkpoints" / str(step) / "info" / "metadata").read_text())
    return {name: entry["checksum"] for name, entry in document["arrays"].items()}


def assert_same_state(workdir: Path, other: Path, step: int) -> None:
    """Checks that two runs had the same state at ``step``, bit for bit, and stood at the same row of the data."""
    state, wanted = saved(workdir, step), saved(other, step)
    assert state.keys() == wanted.keys()
    assert int(wanted["step"]) == step and int(wanted["data_cursor"]) == step * BATCH_ROWS
    for name, array in wanted.items():
        assert array.dtype == state[name].dtype and array.tobytes() == state[name].tobytes(), f"{name} differs"


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run without what depends on the clock."""
    records = read_metrics(workdir / METRICS_FILE)
    return [
        {key: value for key, value in record.items() if key not in TIMING and not key.startswith("hosts/")}
        for record in records
    ]


def assert_same_run(workdir: Path, other: Path) -> None:
    """Checks that two finished runs cannot be told apart."""
    assert_same_state(workdir, other, NUM_STEPS)
    assert metrics(workdir) == metrics(other)
    assert [record["step"] for record in metrics(workdir)] == list(range(1, NUM_STEPS + 1))
