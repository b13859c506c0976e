"""A run that was stored at format 2 goes on, whatever the configuration has gained since; see ``stored_run``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from intttrain.app.runs import CONFIG_FILE, load_trained
from intttrain.config import as_dict
from intttrain.config.dotted import flatten
from intttrain.train import checkpoint_info
from tests.app.small import cli, config_of, done, error_line, metrics
from tests.app.stored_run import KEPT_STEP, LAST_STEP, SHOWN

FOLDER = Path(__file__).parent / "stored" / f"format_{checkpoint_info.FORMAT}"
# Stand for fields that the schema gained after the run began: scalars, an optional section, two whole sections.
GAINED = (
    "model.ttt.preserve_row_norm", "model.tie_embeddings", "model.rope.scaling", "train.stages", "mesh.", "train.skip.",
)  # fmt: skip
CONFIG_TEXT = """
import json
import ml_collections
from intttrain.config.dotted import unflatten

def get_config():
    return ml_collections.ConfigDict(unflatten(json.loads({text!r})))
"""


class Stored:
    """A copy of the stored run, and a configuration file of today that continues it."""

    def __init__(self, root: Path) -> None:
        shutil.copytree(FOLDER / "run", root / "run")
        self.root, self.workdir = root, root / "run"
        self.complete = flatten(as_dict(config_of(self.workdir)))
        self.complete["data.train"] = [{"path": str(FOLDER / "store"), "weight": 1.0}]

    def train(self, **changes: Any) -> list[str]:
        flat = self.complete | {key.replace("__", "."): value for key, value in changes.items()}
        (self.root / "config.py").write_text(CONFIG_TEXT.format(text=json.dumps(flat)))
        return ["train", f"--config={self.root / 'config.py'}", f"--workdir={self.workdir}"]

    def rewrite(self, change: Mapping[str, Any] | None = None) -> None:
        """Makes the run one that began before the schema had the fields of ``GAINED``, with ``change`` beside."""

        def older(flat: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in flat.items() if not k.startswith(GAINED)} | dict(change or {})

        config = json.loads((self.workdir / CONFIG_FILE).read_text())
        (self.workdir / CONFIG_FILE).write_text(json.dumps(config | {"flat_config": older(config["flat_config"])}))
        path = self.workdir / "checkpoints" / str(KEPT_STEP) / "info" / "metadata"
        info, arrays = checkpoint_info.from_document(json.loads(path.read_text()))
        document = json.loads(path.read_text()) | {"info": vars(info) | {"config": older(dict(info.config))}}
        del document["digest"]
        path.write_text(json.dumps(document | {"digest": checkpoint_info._digest(document)}))
        assert checkpoint_info.from_document(json.loads(path.read_text()))[1] == arrays


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path)


def test_a_stored_run_goes_on_as_if_it_had_never_stopped(stored: Stored) -> None:
    """Its first steps were made on another machine, so the rest agrees to fp32, not bit for bit."""
    stored.rewrite()
    before = len(json.loads((stored.workdir / CONFIG_FILE).read_text())["flat_config"])
    assert before <= len(stored.complete) - 10
    read = load_trained(stored.workdir, KEPT_STEP)  # what eval, generate and export begin with
    assert read.step == KEPT_STEP and read.config == config_of(stored.workdir)
    done(*stored.train())
    expected = json.loads((FOLDER / "expected.json").read_text())
    assert [record["step"] for record in expected] == list(range(KEPT_STEP + 1, LAST_STEP + 1))
    found = [{key: record[key] for key in SHOWN} for record in metrics(stored.workdir)]
    assert found == [pytest.approx(record, rel=1e-5) for record in expected]

    # What is written today has the form of what was stored: whoever changes it raises FORMAT and stores another run.
    old, new = (
        json.loads((stored.workdir / "checkpoints" / str(step) / "info" / "metadata").read_text())
        for step in (KEPT_STEP, LAST_STEP)
    )
    assert old["format"] == new["format"] == checkpoint_info.FORMAT and old.keys() == new.keys()
    assert old["info"].keys() == new["info"].keys()
    form = lambda arrays: {name: entry | {"checksum": 0} for name, entry in arrays.items()}  # noqa: E731
    assert form(old["arrays"]) == form(new["arrays"])


def test_a_value_that_differs_from_what_the_stored_run_had_is_refused(stored: Stored) -> None:
    stored.rewrite()
    refused = error_line(cli(*stored.train(model__ttt__preserve_row_norm=True)))
    assert "model.ttt.preserve_row_norm=false in the run but true now" in refused


def test_a_key_that_only_the_stored_run_knows_is_named(stored: Stored) -> None:
    stored.rewrite({"model.ttt.decay": 0.9})
    assert "model.ttt.decay is a key of the run" in error_line(cli(*stored.train()))
    refused = error_line(cli("eval", *stored.train()[1:]))
    assert "model.ttt.decay, which this version of intttrain does not know" in refused
