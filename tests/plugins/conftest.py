"""A run of a user's own parts, made once; nothing of it is left in the registries for other tests."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.interop.conftest  # noqa: F401  (what transformers caches goes into a folder of the test run)
from intttrain.config import registry
from tests.app.small import CONFIG_TEXT, WORDS, World, done

MODULE = "tests.plugins.extras"
PLUGINS = f"--config.plugins=('{MODULE}',)"
REGISTRIES = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]


def forget() -> None:
    """Removes what the user's module has registered, as if it had never been imported."""
    sys.modules.pop(MODULE, None)
    for one in REGISTRIES:
        for name in [name for name, entry in one.entries().items() if entry.home.startswith("tests.")]:
            del one._entries[name]
            one._union = None


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    forget()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose corpus is one JSONL file, prepared by the user's source."""
    root = tmp_path_factory.mktemp("plugins")
    choose = random.Random(0)
    texts = [" ".join(choose.choice(WORDS) for _ in range(40 + number)) for number in range(40)]
    lines = [json.dumps({"id": number, "body": text}) for number, text in enumerate(texts)]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    (root / "small.py").write_text(CONFIG_TEXT.format(root=str(root), num_steps=4, batch_rows=2))
    source = {"kind": "jsonl", "paths": (str(root / "corpus.jsonl"),), "text_key": "body"}
    world = World(root)
    done("prepare", world.config, PLUGINS, f"--config.prepare.source={source}", f"--output={root / 'data'}")
    return world


@pytest.fixture(scope="session")
def trained(world: World) -> Path:
    """A run with parts of the user's, stopped and continued by a process that knows nothing of them."""
    command = ("train", world.config, PLUGINS, *OWN_PARTS, f"--workdir={world.root / 'run'}")
    done(*command, "--stop_at_step=2")
    forget()
    done(*command)
    return world.root / "run"


OWN_PARTS = (
    "--config.model.family=mistral",
    "--config.model.ttt.update={'kind': 'forgets', 'retained': 0.7}",
    "--config.model.ttt.target=next_embed",
    "--config.train.optimizer={'kind': 'muon', 'beta': 0.9}",
    "--config.train.schedule={'kind': 'hold', 'peak_learning_rate': 3e-3, 'warmup_steps': 0, 'hold_steps': 2}",
)
