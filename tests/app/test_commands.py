"""The commands one after the other, as a user would call them, and what they print and write."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.app.small import NUM_STEPS, World, cli, contents, done, metrics, unchanged

PROMPT = "def return value for in if else line text read write"  # longer than three chunks of the small model


def printed(out: str) -> dict[str, str]:
    """Returns the name and value of every line."""
    return dict(line.split(maxsplit=1) for line in out.splitlines() if line and line != "derived")


def test_config_prints_every_value_and_what_follows(world: World, tmp_path: Path) -> None:
    outcome = done("config", world.config, "--config.train.num_steps=20", f"--json={tmp_path / 'config.json'}")
    values = printed(outcome.out)
    assert values["train.num_steps"] == "20" and values["model.ttt.layers"] == "[0]" and values["data.seq_len"] == "64"
    attention, norms, mlp = 16 * 16 + 2 * 16 * 8 + 16 * 16, 2 * 16 + 2 * 8, 3 * 16 * 32
    dense = 257 * 16 + 2 * (attention + norms + mlp) + 16
    expected = {
        "parameters": dense + 5 * 16 + 16 * 16,
        "ttt_parameters": 5 * 16 + 16 * 16,
        "tokens_per_step": 2 * 64,
        "tokens_in_all": 20 * 2 * 64,
        "chunks_per_row": 4,
        "fast_weight_state_bytes_per_layer_and_row": 16 * 32 * 4,
    }
    assert {name: int(values[name]) for name in expected} == expected
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["derived"] == expected
    assert {name: str(value) for name, value in (document["config"] | expected).items()} == values


def test_config_of_the_dense_variant(world: World) -> None:
    values, twin = printed(done("config", world.dense_config).out), printed(done("config", world.config).out)
    assert values["model.ttt"] == "None" and values["ttt_parameters"] == "0"
    assert int(twin["parameters"]) == int(values["parameters"]) + int(twin["ttt_parameters"])
    assert "chunks_per_row" not in values and "fast_weight_state_bytes_per_layer_and_row" not in values


def test_prepare_reports_what_it_wrote(world: World, tmp_path: Path) -> None:
    outcome = done("prepare", world.config, f"--output={tmp_path / 'data'}", f"--json={tmp_path / 'r.json'}")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["train_documents"] + result["heldout_documents"] == 40
    assert (result["train"], result["heldout"]) == (str(tmp_path / "data/train"), str(tmp_path / "data/heldout"))
    assert f"{tmp_path / 'data/train'}: {result['train_documents']} documents" in outcome.out
    assert f"{tmp_path / 'data/heldout'}: {result['heldout_documents']} documents" in outcome.out
    assert contents(tmp_path / "data") == contents(world.root / "data"), "the same text gives the same store"


def test_train_json_is_what_was_printed(world: World, straight: Path, tmp_path: Path) -> None:
    flags = ("--stop_at_step=1", f"--json={tmp_path / 'here' / 'train.json'}")
    outcome = done("train", world.config, f"--workdir={tmp_path / 'run'}", *flags)
    result = json.loads((tmp_path / "here" / "train.json").read_text())
    assert (result["step"], result["finished"]) == (1, False)
    assert {"step": 1, **result["metrics"]} == metrics(straight)[0]
    assert f"stopped at step 1 of 10, loss {result['metrics']['loss']:.4f}" in outcome.out


def test_eval_beside_a_dense_run(world: World, straight: Path, dense: Path, tmp_path: Path) -> None:
    command = ("eval", world.config, f"--workdir={straight}", f"--dense_workdir={dense}")
    outcome = done(*command, f"--json={tmp_path / 'eval.json'}")
    folder = straight / "eval" / str(NUM_STEPS)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result == json.loads((folder / "positions.json").read_text())
    assert (folder / "positions.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "positions.json") in outcome.out and str(folder / "positions.png") in outcome.out

    assert (result["step"], result["name"], result["unit"]) == (NUM_STEPS, "small-ttt", "bits per byte")
    assert [(bucket["begin"], bucket["end"]) for bucket in result["buckets"]] == [(0, 16), (16, 32), (32, 64)]
    assert list(result["all"]["levels"]) == ["on", "off", "dense", "unigram", "bigram"]
    table = {line.split()[0]: line for line in outcome.out.splitlines() if line[:1].isdigit() or line.startswith("all")}
    for begin, bucket in [*((f"{b['begin']}-{b['end'] - 1}", b) for b in result["buckets"]), ("all", result["all"])]:
        assert begin in table
        for level in bucket["levels"].values():
            assert f"{level['value']:.3f}" in outcome.out
    # Dense and off share every weight but those that ten steps of training made differ.
    assert result["all"]["levels"]["off"]["value"] == pytest.approx(result["all"]["levels"]["dense"]["value"], abs=0.01)

    before = contents(folder)
    done(*command)
    assert contents(folder) == before, "an evaluation never replaces an earlier one"
    again = json.loads((straight / "eval" / f"{NUM_STEPS}-2" / "positions.json").read_text())
    assert again == result


def test_eval_reads_the_model_from_the_run(world: World, dense: Path, straight: Path) -> None:
    outcome = done("eval", world.config, f"--workdir={dense}")  # the configuration names the variant with TTT
    assert "model.* of --config is not used" in outcome.err
    assert outcome.out.startswith("small-dense: ") and "on - off" not in outcome.out
    with unchanged(straight / "checkpoints"):
        earlier = done("eval", world.config, f"--workdir={straight}", "--step=2", "--config.data.train=()")
    assert "not used" not in earlier.err
    content = json.loads((straight / "eval" / "2" / "positions.json").read_text())
    assert content["step"] == 2 and list(content["all"]["levels"]) == ["on", "off"]  # no text to count n-grams in


def test_update_on_and_off_differ_where_the_update_is_large(world: World, wild: tuple[Path, str]) -> None:
    done("eval", world.config, f"--workdir={wild[0]}", "--config.data.train=()")
    (document,) = (wild[0] / "eval").rglob("positions.json")
    content: dict[str, Any] = json.loads(document.read_text())
    first, later = content["buckets"][0]["levels"], content["buckets"][2]["levels"]
    assert first["on"]["value"] == pytest.approx(first["off"]["value"], abs=1e-5)  # nothing is learned before a chunk
    assert abs(later["on"]["value"] - later["off"]["value"]) > 0.01
    assert content["all"]["state_norm"] > 10 and any("state grows" in line for line in content["warnings"])


def test_generate(wild: tuple[Path, str], tmp_path: Path) -> None:
    def continuation(*flags: str) -> str:
        command = ("generate", f"--workdir={wild[0]}", f"--prompt={PROMPT}", "--max_new_tokens=12")
        out = done(*command, f"--json={tmp_path / 'g.json'}", *flags).out
        result = json.loads((tmp_path / "g.json").read_text())
        (found,) = result["continuations"]
        assert found["prompt"] == PROMPT and out == PROMPT + found["text"] + "\n"
        assert result["step"] == 5 and result["update"] == ("off" if "--update=off" in flags else "on")
        return str(found["text"])

    with unchanged(wild[0]):
        first = continuation("--seed=1")
        assert continuation("--seed=1") == first != ""
        assert continuation("--seed=2") != first
        likely = continuation("--temperature=0")
        assert continuation("--temperature=0", "--seed=2") == likely
        assert continuation("--temperature=0", "--update=off") != likely
        assert continuation("--temperature=0", "--gate=never") == continuation("--temperature=0", "--update=off")


def test_generate_many_and_in_turns(wild: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prompts of a batch do not see each other; lines of a talk are one document."""
    command = ("generate", f"--workdir={wild[0]}", "--max_new_tokens=4", "--temperature=0")
    second = "another prompt of another length"
    alone = [done(*command, f"--prompt={prompt}").out for prompt in (PROMPT, second)]
    out = done(*command, f"--prompt={PROMPT}", f"--prompt={second}").out
    assert sorted(out.split("\n[")) and all(text.rstrip("\n") in out for text in alone)

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n{second}\n\nnever read\n"))
    done(*command, f"--json={tmp_path / 't.json'}")
    turns = json.loads((tmp_path / "t.json").read_text())["turns"]
    assert [turn["prompt"] for turn in turns] == [PROMPT, second]
    document = f"{PROMPT}\n{turns[0]['text']}{second}\n"
    assert done(*command, f"--prompt={document}").out == document + turns[1]["text"] + "\n"


def test_export(straight: Path, tmp_path: Path) -> None:
    command = ("export", f"--workdir={straight}", "--step=3", "--dtype=float32")
    with unchanged(straight):
        outcome = done(*command, f"--output={tmp_path / 'hf'}", f"--json={tmp_path / 'export.json'}")
    result = json.loads((tmp_path / "export.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert result == {"step": 3, "output": str(tmp_path / "hf"), "files": files}
    assert {"config.json", "model.safetensors", "modeling_intttrain.py"} <= set(files)
    assert f"step 3 -> {tmp_path / 'hf'}" in outcome.out and all(name in outcome.out for name in files)
    assert cli(*command, f"--output={tmp_path / 'hf'}").status == 2
