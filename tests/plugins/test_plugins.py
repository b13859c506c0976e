"""Changes from outside the package: a user's module adds what is chosen by name, and the command line uses it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from intttrain.config import as_dict, default_config, resolve
from intttrain.config.dotted import flatten
from intttrain.config.errors import UserError
from intttrain.config.literals import section
from intttrain.config.registry import GATE_RULES, OPTIMIZERS, Registry
from intttrain.data import TokenStore
from intttrain.interop.implemented import check_implemented
from tests.app.small import REPO, World, cli, config_of, done, error_line, metrics
from tests.plugins.conftest import MODULE, OWN_PARTS, PLUGINS, forget


def test_a_source_of_ones_own_fills_the_stores(world: World) -> None:
    stores = [TokenStore.open(world.root / "data" / name) for name in ("train", "heldout")]
    assert sum(map(len, stores)) == 40
    assert all(store.manifest.source == f"jsonl {world.root / 'corpus.jsonl'}" for store in stores)


def test_parts_of_ones_own_train_and_go_on(trained: Path) -> None:
    assert [record["learning_rate"] for record in metrics(trained)] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4])
    state = saved_arrays(trained)
    assert any("muon" in name for name in state), sorted(state)
    flat = json.loads((trained / "config.json").read_text())["flat_config"]
    assert flat["plugins"] == [MODULE]
    assert {key: flat[key] for key in flat if key.startswith(("model.ttt.update.", "model.ttt.target"))} == {
        "model.ttt.target": "next_embed", "model.ttt.update.kind": "forgets", "model.ttt.update.retained": 0.7,
        "model.ttt.update.bounded": True,
    }  # fmt: skip
    assert {key: flat[key] for key in flat if key.startswith("train.optimizer.")} == {
        "train.optimizer.kind": "muon", "train.optimizer.beta": 0.9, "train.optimizer.weight_decay": 0.1,
        "train.optimizer.clip_norm": 1.0,
    }  # fmt: skip


def saved_arrays(workdir: Path) -> set[str]:
    document = json.loads((workdir / "checkpoints" / "4" / "info" / "metadata").read_text())
    return set(document["arrays"])


def test_a_gate_and_a_signal_of_ones_own_decide_in_generation(trained: Path) -> None:
    forget()  # what is stored with the run names the module
    command = ("generate", f"--workdir={trained}", f"--prompt={'def ' * 30}", "--max_new_tokens=2", "--temperature=0")
    gate = ("--gate=above_mean", "--gate_signal=target_size")
    assert done(*command, *gate).out.startswith("def ")
    assert "did you mean 'above_mean'?" in error_line(cli(*command, "--gate=above_men"))


def test_a_run_goes_on_with_the_numbers_of_its_rule(trained: Path, world: World) -> None:
    others = [flag for flag in OWN_PARTS if "ttt.update" not in flag]
    line = error_line(cli("train", world.config, PLUGINS, *others, OTHER_SHARE, f"--workdir={trained}"))
    assert "model.ttt.update.retained=0.7 in the run but 0.6 now" in line


OTHER_SHARE = "--config.model.ttt.update={'kind': 'forgets', 'retained': 0.6}"


def test_export_refuses_what_the_modelling_file_does_not_know(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    line = error_line(cli("export", f"--workdir={trained}", f"--output={output}"), after_other_lines=True)
    assert "model.ttt.update.kind='forgets' cannot be exported" in line and "knows 'sum' only" in line
    assert not list(tmp_path.iterdir()), "nothing was written"
    model = config_of(trained).model
    assert model.ttt is not None
    ttt = dataclasses.replace(model.ttt, update=default_config_section())
    with pytest.raises(UserError, match=r"ttt\.target='next_embed' cannot be exported: .* 'next_hidden' only"):
        check_implemented(ttt)
    check_implemented(dataclasses.replace(ttt, target="next_hidden"))


def default_config_section() -> Any:
    """The section of the rule that is shipped."""
    return resolve(default_config()).model.ttt.update  # type: ignore[union-attr]


def test_a_gate_of_ones_own_is_evaluated(trained: Path, world: World) -> None:
    gates = "--config.eval.gates=({'rule': 'above_mean', 'signal': 'target_size'}, {'rule': 'first_chunks'})"
    lengths = ("--config.eval.context.lengths=(64,)", "--config.eval.context.block_tokens=32")
    out = done("eval", world.config, PLUGINS, f"--workdir={trained}", "--task=context", *lengths, gates).out
    assert "above_mean high target_size 0.5" in out and "first_chunks 0.5" in out


CLIP = "--config.model.ttt.delta_clip=0.5"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            (PLUGINS, "--config.train.optimizer={'kind': 'moun'}"),
            ["train.optimizer.kind='moun'", "'adamw', 'muon'", "did you mean 'muon'?"],
        ),
        (
            (PLUGINS, "--config.train.optimizer={'kind': 'muon', 'bta': 1}"),
            ["unknown key train.optimizer.bta", "'beta'"],
        ),
        ((PLUGINS, "--config.train.optimizer={'kind': 'muon', 'beta': 2.0}"), ["train.optimizer.beta=2.0"]),
        (
            (PLUGINS, "--config.model.ttt.update={'kind': 'forget'}"),
            ["model.ttt.update.kind='forget'", "'sum', 'forgets'", "did you mean 'forgets'?"],
        ),
        (
            (PLUGINS, "--config.model.ttt.update={'kind': 'forgets', 'retain': 0.5}"),
            ["unknown key model.ttt.update.retain", "did you mean 'retained'?"],
        ),
        (
            (PLUGINS, "--config.model.ttt.update={'kind': 'forgets', 'retained': 1.5}"),
            ["model.ttt.update.retained=1.5"],
        ),
        (
            (PLUGINS, "--config.model.ttt.update={'kind': 'forgets', 'bounded': False}", CLIP),
            ["model.ttt.delta_clip=0.5 would be ignored", "'forgets'", "clip=None", "**config.bounds"],
        ),
        (
            (PLUGINS, "--config.model.ttt.target=next_embd"),
            ["model.ttt.target='next_embd'", "did you mean 'next_embed'"],
        ),
        (
            (PLUGINS, "--config.eval.gates=({'rule': 'first_chunk'},)"),
            ["eval.gates.0.rule='first_chunk'", "did you mean 'first_chunks'?"],
        ),
        ((PLUGINS, "--config.prepare.source={'kind': 'jsonl'}"), ["prepare.source.paths is not set"]),
        (("--config.plugins=('no_such_module',)",), ["plugins", "'no_such_module'", "No module named"]),
        (("--config.plugins=('tests.plugins.broken',)",), ["'tests.plugins.broken'", "ZeroDivisionError"]),
        (("--config.plugins=('tests.plugins.clash',)",), ["'tests.plugins.clash'", "'online' is registered by"]),
        (("--config.plugins=(1,)",), ["plugins.0=1"]),
    ],
)
def test_mistakes_are_one_line(world: World, flags: tuple[str, ...], parts: list[str]) -> None:
    line = error_line(cli("config", world.config, *flags))
    assert all(part in line for part in parts), line


def test_flags_of_ones_own_sections(world: World) -> None:
    flags = (*OWN_PARTS, "--config.train.optimizer.beta=0.8", "--config.train.schedule.hold_steps=5", PLUGINS)
    out = done("config", world.config, *flags).out
    assert [line.split()[-1] for line in out.splitlines() if ".beta " in line or "hold_steps" in line] == ["5", "0.8"]


def test_what_is_shipped_is_as_it_was() -> None:
    tree = default_config()
    flat = flatten(as_dict(resolve(tree)))
    assert "train.optimizer.kind" not in flat and flat["plugins"] == []
    tree.train.optimizer = {"kind": "adamw", "b1": 0.8}
    assert flatten(as_dict(resolve(tree))) == flat | {"train.optimizer.b1": 0.8}


def test_a_default_configuration_loads_no_definitions() -> None:
    program = (
        "import sys; from intttrain.config import default_config; default_config(); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPO, check=True)


def test_a_section_has_what_is_read_elsewhere() -> None:
    with pytest.raises(UserError, match="the optimizer 'plain': its section lacks clip_norm"):
        OPTIMIZERS.add("plain", lambda *_: None, Bare)


@section
class Bare:
    """A section that only has a name."""

    kind: Literal["plain"] = "plain"


def test_names_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"there is no gate rule 'onlin'; it must be one of .* did you mean 'online'\?"):
        GATE_RULES["onlin"]


def test_a_module_may_be_loaded_again() -> None:
    registry: Registry[int] = Registry("number")
    registry.add("one", 1)
    registry.add("one", 2)
    assert registry["one"] == 2
