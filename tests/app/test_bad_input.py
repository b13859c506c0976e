"""Whatever a user gets wrong ends with one line that helps, status 2, and nothing written.

`{config}` stands for the configuration flag, `{root}` for the folder with corpus and stores, `{new}` for a path that
does not exist and must not exist afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.app.small import REPO, World, cli, done, error_line, unchanged

CopyOf = Callable[..., Path]


def refused(world: World, new: Path, command: str, *wanted: str) -> None:
    """Runs ``command`` (words apart by blanks) and checks that it is refused with every text of ``wanted``."""
    values = {"config": world.config, "root": world.root, "new": new}
    with unchanged(world.root):
        words = [word.format(**values) for word in command.split()]
        line = error_line(cli(*words), after_other_lines=words[0] == "prepare")  # it says how far it came
    for text in wanted:
        assert text.format(**values) in line, line
    assert not new.exists() and not list(new.parent.iterdir())


@pytest.fixture
def new(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty" / "new"


# --- commands and flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("trian", ["unknown command 'trian'", "did you mean 'train'?"]),
        ("frobnicate", ["choose from config, eval, export, generate, init, plan, prepare, train"]),
        ("train", ["missing --config=..., --workdir=..."]),
        ("train {config}", ["missing --workdir=..."]),
        ("prepare {config}", ["missing --output=..."]),
        ("eval {config}", ["missing --workdir=..."]),
        ("export --workdir={new}", ["missing --output=..."]),
        ("train {config} --workdir={new} again", ["unexpected argument 'again'", "--flag=value"]),
        ("train {config} --workdri={new}", ["'workdri'", "workdir"]),
        ("train {config} --workdir={new} --stop_at_step=soon", ["--stop_at_step=soon"]),
        ("train {config} --workdir={new} --stop_at_step=-1", ["--stop_at_step=-1"]),
        ("train --workdir={new} --config", ["--config"]),
        ("generate --workdir={new} --prompt=a --update=maybe", ["--update=maybe", "<on|off>"]),
        ("generate --workdir={new} --prompt=a --temperature=-1", ["--temperature=-1"]),
        ("export --workdir={new} --output={new} --dtype=int8", ["--dtype=int8", "<bfloat16|float32>"]),
        ("config {config} --json={root}", ["--json={root} is a folder", "result.json"]),
        ("config {config} --json={root}/small.py/x.json", ["--json={root}/small.py/x.json", "{root}/small.py is not"]),
        ("train {config} --workdir=s3://bucket/run", ["--workdir=s3://bucket/run", "gs://BUCKET/FOLDER", "mount"]),
        ("generate --workdir=gs://bucket --prompt=a", ["--workdir=gs://bucket is neither", "gs://BUCKET/FOLDER"]),
        ("export --workdir={new} --output=gs://bucket/out", ["--output=gs://bucket/out is a URL", "a local folder"]),
        ("train {config} --workdir={new} --json={root}/data", ["--json={root}/data is a folder"]),
        ("generate --workdir={new} --top_p=2", ["--top_p=2", "from 0 to 1"]),
        ("generate --workdir={new} --top_p=nan", ["--top_p=nan", "from 0 to 1"]),
        ("generate --workdir={new} --temperature=nan", ["--temperature=nan", "from 0 to"]),
        ("generate --workdir={new} --temperature=inf", ["--temperature=inf", "from 0 to"]),
        ("generate --workdir={new} --temperature=hot", ["--temperature=hot"]),
        ("generate --workdir={new} --gate_rate=1.5", ["--gate_rate=1.5", "from 0 to 1"]),
        ("generate --workdir={new} --top_k=8.0", ["--top_k=8.0"]),
        ("generate --workdir={new} --seed=4294967296", ["--seed=4294967296", "[0, 4294967295]"]),
        ("generate --workdir={new} --seed=1 --seed=2", ["--seed is given 2 times"]),
        ("eval {config} --workdir={new} --follow=perhaps", ["--follow=perhaps"]),
        ("train {config} --workdir=", ["--workdir= is empty"]),
        ("config {config} --json=", ["--json= is empty"]),
        ("plan {config} --topology=v6e:8x8 --sweep=", ["--sweep= is empty"]),
        ("generate --workdir={new} --config.name=x", ["Unknown command line flag 'config.name'"]),
    ],
)
def test_commands_and_flags(world: World, new: Path, command: str, wanted: list[str]) -> None:
    refused(world, new, command, *wanted)


def test_help_is_no_error(world: World) -> None:
    assert cli().status == 2 and "usage:" in cli().out
    assert "usage:" in done("--help").out
    for command in ("config", "prepare", "train", "eval", "generate", "export"):
        outcome = done(command, "--help")
        assert outcome.out.startswith(f"intttrain {command}: ") and "--json" in outcome.out
    assert "--stop_at_step" in done("train", "--help").out


def test_numbers_that_only_the_run_can_judge(straight: Path, new: Path, world: World) -> None:
    for flag, wanted in (
        ("--top_k=258", "--top_k=258 is more than model.vocab_size=257"),
        ("--gate=sometimes", "--gate=sometimes: it must be one of 'always', 'never', 'random'"),
        ("--gate=treshold", "'threshold'; did you mean 'threshold'?"),
        ("--gate=forced", "--gate=forced: it must be one of 'always', 'never', 'random'"),
        ("--gate_signal=nil", "'entropy'; did you mean 'nll'?"),
        ("--gate=threshold --gate_thresholds=nan", "--gate_thresholds=nan: these are not finite numbers"),
        ("--gate=threshold --gate_thresholds=high", "--gate_thresholds=high: these are not finite numbers"),
    ):
        refused(world, new, f"generate --workdir={straight} --prompt=a {flag}", wanted)


def test_the_largest_seed_draws(straight: Path) -> None:
    flags = ("--prompt=a", "--max_new_tokens=4", f"--seed={2**32 - 1}", "--gate=random", "--gate_rate=0.5")
    assert done("generate", f"--workdir={straight}", *flags).out.startswith("a")


def test_none_on_the_command_line_is_none(world: World) -> None:
    flags = ("data.heldout", "model.ttt", "mesh.fsdp", "eval.every_steps", "model.rope.scaling")
    out = done("config", world.config, *(f"--config.{flag}=None" for flag in flags)).out
    assert all(f"{flag} None" in " ".join(out.split()) for flag in flags)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_is_no_error(world: World, tmp_path: Path, stream: str) -> None:
    """Even at the first byte: the result is there, nothing is said, and the status is that of the command."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "intttrain", "config", world.config, f"--json={tmp_path / 'result.json'}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: write}
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    result = subprocess.run(command, env=environment, cwd=tmp_path, check=False, **streams)
    os.close(write)
    assert (result.returncode, result.stderr or b"") == (0, b"")
    assert json.loads((tmp_path / "result.json").read_text())["config"]["name"] == "small-ttt"


def test_program_answers_bad_flags_without_loading_jax(tmp_path: Path) -> None:
    code = "import sys; from intttrain.app.cli import run; print(run(['trian']), 'jax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "2 False\n"
    module = [sys.executable, "-m", "intttrain", "trian"]
    result = subprocess.run(module, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown command 'trian'; did you mean 'train'?\n"


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--config.modle.d_model=8", ["unknown configuration key modle", "did you mean 'model'?"]),
        ("--config.train.num_step=8", ["unknown configuration key train.num_step", "did you mean 'num_steps'?"]),
        ("--config.train.schedule.peak_lr=1", ["key train.schedule.peak_lr", "peak_learning_rate, warmup_steps"]),
        ("--config.train.num_steps=many", ["--config.train.num_steps=many", "no whole number"]),
        ("--config.train.seed=4294967296", ["train.seed=4294967296", "less than 4294967296"]),
        ("--config.train.optimizer.b2=1.0", ["train.optimizer.b2=1.0", "1 in fp32", "0.95"]),
        ("--config.data.train[1].path=x", ["data.train has no entry 1, the last is data.train[0]"]),
        ("--config.model.rope.scaling=yarn", ["--config.model.rope.scaling=yarn", "'kind': 'llama3'"]),
        ("--config.train.seed=1 --config.train.seed=2", ["--config.train.seed is given twice"]),
        ("--noconfig.model.tie_embeddings=1", ["--noconfig.model.tie_embeddings takes no value"]),
        ("--config.data.heldout=None --config.eval.every_steps=5", ["eval.every_steps=5 needs data.heldout"]),
        ("--config.train.profile_steps=(5,2)", ["train.profile_steps=(5, 2)", "use for example (5, 7)"]),
        ("--config.train.num_steps=0", ["train.num_steps=0", "greater than 0"]),
        ("--config.model.family=gpt", ["model.family='gpt'", "'qwen3', 'llama'"]),
        ("--config.model.ttt.chunk_tokens=24", ["model.ttt.chunk_tokens=24", "data.seq_len=64", "use 16, 32, 64"]),
        ("--config.model.ttt.layers=(0,7)", ["layer 7 is outside the model", "num_layers=2", "use indices 0 to 1"]),
        ("--config.model.ttt.layers=(0,", ["--config.model.ttt.layers=(0,"]),
        ("--config.model.num_kv_heads=3", ["model.num_kv_heads=3", "model.num_heads=2"]),
        ("--config.train.microbatches=3", ["train.microbatches=3", "train.batch_rows=2"]),
        ("--config.data.train=()", ["data.train is empty"]),
        ("--config.model.vocab_size=200", ["{root}/data/train", "id 256 but model.vocab_size=200", "=257"]),
    ],
)  # fmt: skip
def test_values(world: World, new: Path, flags: str, wanted: list[str]) -> None:
    refused(world, new, f"train {{config}} --workdir={{new}} {flags}", *wanted)


def test_section_that_the_variant_does_not_have(world: World, new: Path) -> None:
    refused(world, new, "train {config}:dense --workdir={new} --config.model.ttt.eta=1", "model.ttt is None; give all")


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--config={root}/nowhere.py", ["--config", "no file {root}/nowhere.py", "configs/"]),
        ("{config}:danse", ["{root}/small.py:", "the variants are ttt and dense, not 'danse'"]),
        ("--config={root}", ["--config", "{root}"]),
        ("--config=", ["--config"]),
    ],
)
def test_configuration_files(world: World, new: Path, flag: str, wanted: list[str]) -> None:
    refused(world, new, f"train {flag} --workdir={{new}}", *wanted)


START = "from intttrain.config import default_config\ndef get_config():\n    config = default_config()\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (START + "    config.name = 1 / 0\n", [":4: ", "ZeroDivisionError", "division by zero"]),
        (START + "    config.modle.d_model = 8\n", [":4: ", "unknown configuration key modle", 'did you mean "model"']),
        (START + "    config.name = config.nothing.like.it\n", [":4: ", "unknown configuration key nothing"]),
        (START + "    config.train.num_step = 4\n    return config\n", ["train.num_step", "did you mean 'num_steps'?"]),
        (START + "    del config.train.num_steps\n    return config\n", ["train.num_steps is not set"]),
        (START + "    config.name = (\n", [":4: ", "SyntaxError"]),
        (START + "    config.name = open('/no/such/file')\n", [":4: ", "FileNotFoundError", "/no/such/file"]),
        ("import no_such_module\n", [":1: ", "no_such_module"]),
        (START, ["get_config() returned None"]),
        (START + "    return 3\n", ["get_config() returned int"]),
        ("config = 3\n", ["no function get_config()"]),
        ("\x00\x01", ["--config"]),
    ],
)
def test_programs_that_fail_in_a_configuration_file(
    world: World, tmp_path: Path, new: Path, text: str, wanted: list[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    refused(world, new, f"train --config={file} --workdir={{new}}", *wanted)
    place = "mine.py:4: " if ":4: " in wanted else ""
    assert place in error_line(cli("config", f"--config={file}"))


# --- text to stores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "flags", "wanted"),
    [
        ({}, "--config.prepare.source.paths=('{folder}/nowhere',)", ["{folder}/nowhere does not exist", "{folder}"]),
        ({}, "", ["no file below {folder} matches", "*.txt"]),
        ({"a.txt": b""}, "", ["has no text", "1 empty"]),
        ({"a.txt": b"\x00\x01", "b.txt": b"\xff\xfe\xfd"}, "", ["has no text", "2 files that are not UTF-8"]),
        ({"a.txt": b"\x00\x01"}, "--config.prepare.source.paths=('{folder}/a.txt',)", ["a.txt is not UTF-8 text"]),
        ({"a.txt": b"only one"}, "", ["prepare.heldout_fraction=0.3 of 1 documents"]),
        ({"a.txt": b"text"}, "--config.prepare.source.paths=()", ["prepare.source.paths is empty"]),
        ({"a.txt": b"text"}, "--config.prepare.tokenizer.kind=huggingface", ["tokenizer.path is not set"]),
    ],
)
def test_corpora(
    world: World, tmp_path: Path, new: Path, files: dict[str, bytes], flags: str, wanted: list[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    default = "" if ".paths=" in flags else f"--config.prepare.source.paths=('{folder}',)"
    command = f"prepare {{config}} --output={{new}} {default} {flags.format(folder=folder)}"
    refused(world, new, command, *(text.format(folder=folder) for text in wanted))


def test_prepare_never_replaces(world: World, new: Path) -> None:
    refused(world, new, "prepare {config} --output={root}/data", "{root}/data already holds 2 entries")
    refused(world, new, "prepare {config} --output={root}/small.py", "{root}/small.py exists and is not a directory")
    refused(world, new, "prepare {config} --output={root}/small.py/x", "{root}/small.py/x cannot be created")


# --- stores --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stores(world: World, tmp_path: Path) -> dict[str, Path]:
    """Copies of the training store, each with one thing wrong."""
    names = ("truncated", "other_tokenizer", "no_tokens", "no_manifest", "broken_manifest")
    paths = {name: shutil.copytree(world.root / "data" / "train", tmp_path / "stores" / name) for name in names}
    os.truncate(paths["truncated"] / "tokens.bin", 1000)
    manifest = json.loads((paths["other_tokenizer"] / "manifest.json").read_text())
    changed = manifest | {"tokenizer_fingerprint": "0123456789abcdef", "tokenizer": "huggingface other.json"}
    (paths["other_tokenizer"] / "manifest.json").write_text(json.dumps(changed))
    (paths["no_tokens"] / "tokens.bin").unlink()
    (paths["no_manifest"] / "manifest.json").unlink()
    (paths["broken_manifest"] / "manifest.json").write_text("{")
    return paths


def train_on(store: Path) -> str:
    """Returns the flag, with the braces doubled for ``refused``."""
    return f"--config.data.train=({{{{'path':'{store}','weight':1.0}}}},)"


STORES = {
    "truncated": ["tokens.bin has 1000 bytes but the manifest says"],
    "other_tokenizer": ["another tokenizer", "huggingface other.json (0123456789ab) instead of byte"],
    "no_tokens": ["tokens.bin is missing"],
    "no_manifest": ["is not a token store"],
    "broken_manifest": ["manifest.json is not readable JSON"],
}


@pytest.mark.parametrize("name", STORES)
def test_stores_to_train_on(world: World, new: Path, stores: dict[str, Path], name: str) -> None:
    heldout = f"--config.data.heldout={stores[name]}"
    refused(world, new, f"train {{config}} --workdir={{new}} {heldout}", str(stores[name]), *STORES[name])
    both = f"{train_on(stores[name])} {heldout}"
    refused(world, new, f"train {{config}} --workdir={{new}} {both}", str(stores[name]), *STORES[name])


def test_no_store(world: World, new: Path) -> None:
    for flag in ("--config.data.heldout={root}/nowhere", "--config.data.train=({{'path':'{root}/nowhere'}},)"):
        command = f"train {{config}} --workdir={{new}} {flag}"
        refused(world, new, command, "{root}/nowhere does not exist", "intttrain prepare")
    flag = "--config.data.heldout={root}/data"
    refused(world, new, f"train {{config}} --workdir={{new}} {flag}", "did you mean {root}/data/train?")


@pytest.mark.parametrize("name", STORES)
def test_stores_to_evaluate_on(world: World, new: Path, straight: Path, stores: dict[str, Path], name: str) -> None:
    with unchanged(straight):
        flag = f"--config.data.heldout={stores[name]}"
        refused(world, new, f"eval {{config}} --workdir={straight} {flag}", str(stores[name]), *STORES[name])
        flag = train_on(stores[name])
        refused(world, new, f"eval {{config}} --workdir={straight} {flag}", str(stores[name]), *STORES[name])


# --- workdirs ------------------------------------------------------------------------------------------------------


def test_workdirs_that_are_something_else(world: World, new: Path, dense: Path) -> None:
    for place in ("{root}/corpus", "{root}/small.py"):
        wanted = (f"--workdir={place}", "holds no config.json of a run", "choose another path")
        refused(world, new, f"train {{config}} --workdir={place}", *wanted)
    refused(world, new, "train {config} --workdir={root}/small.py/run", "{root}/small.py/run")
    with unchanged(dense):
        refused(world, new, f"train {{config}} --workdir={dense}", "model.ttt", "use another --workdir")


def test_workdir_whose_description_is_damaged(world: World, new: Path, copy_of: CopyOf) -> None:
    workdir = copy_of(10)
    (workdir / "config.json").write_text('{"flat_config": ')
    with unchanged(workdir):
        for command in ("train {config}", "eval {config}", "generate --prompt=a", "export --output={new}"):
            refused(world, new, f"{command} --workdir={workdir}", f"{workdir / 'config.json'} cannot be read")


def test_folders_without_permission(world: World, tmp_path: Path, new: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    refused(world, new, f"train {{config}} --workdir={locked}", str(locked))
    refused(world, new, f"train {{config}} --workdir={locked}/run", str(locked))
    refused(world, new, f"prepare {{config}} --output={locked}/data", str(locked))
    refused(world, new, f"config {{config}} --json={locked}/x.json", str(locked))
    assert not list(locked.iterdir())


# --- using a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval {config}", "generate --prompt=a", "export --output={new}"])
def test_nothing_to_read(world: World, new: Path, copy_of: CopyOf, tmp_path: Path, command: str) -> None:
    refused(world, new, f"{command} --workdir={{new}}", "--workdir={new} holds no run", "train first")
    (tmp_path / "bare").mkdir()
    refused(world, new, f"{command} --workdir={tmp_path / 'bare'}", "holds no run")
    workdir = copy_of()
    with unchanged(workdir):
        refused(world, new, f"{command} --workdir={workdir}", "holds no checkpoint yet", "train first")


def test_steps_that_do_not_exist(world: World, new: Path, copy_of: CopyOf) -> None:
    workdir = copy_of(4, 8)
    with unchanged(workdir):
        for command in ("eval {config}", "generate --prompt=a", "export --output={new}"):
            refused(world, new, f"{command} --workdir={workdir} --step=5", "no checkpoint step 5", "choose from 4, 8")


def test_prompts_without_text(world: World, new: Path, straight: Path) -> None:
    refused(world, new, f"generate --workdir={straight} --prompt=", "--prompt", "give some text")


def test_comparisons_that_mean_nothing(world: World, new: Path, straight: Path, dense: Path) -> None:
    evaluate = f"eval {{config}} --workdir={straight}"
    with unchanged(straight, dense):
        twin = f"--dense_workdir={straight}"
        refused(world, new, f"{evaluate} {twin}", twin, "was trained with TTT", "model.ttt=None")
        refused(world, new, f"{evaluate} --dense_workdir={{new}}", "--dense_workdir={new} holds no run")
        both_dense = f"eval {{config}}:dense --workdir={dense} --dense_workdir={dense}"
        refused(world, new, both_dense, "model.ttt=None", "leave the dense run out")


def test_evaluations_without_documents(world: World, new: Path, straight: Path) -> None:
    with unchanged(straight):
        long = "--config.eval.min_document_tokens=100000"
        refused(world, new, f"eval {{config}} --workdir={straight} {long}", "eval.min_document_tokens=100000", "use ")
        edges = "--config.eval.position_edges=(16,32)"
        refused(world, new, f"eval {{config}} --workdir={straight} {edges}", "eval.position_edges=[16, 32]")


def test_export_never_replaces(world: World, new: Path, straight: Path) -> None:
    for place in ("{root}/data", "{root}/small.py"):
        refused(world, new, f"export --workdir={straight} --output={place}", place)
    refused(world, new, f"export --workdir={straight} --output={{root}}/small.py/x", "{root}/small.py")


def test_json_that_cannot_be_put_in_place_leaves_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from intttrain.storage import files

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    assert "No space left on device" in error_line(cli("config", world.config, f"--json={tmp_path / 'x.json'}"))
    assert not list(tmp_path.iterdir())
