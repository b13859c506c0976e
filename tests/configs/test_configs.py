"""The shipped experiments are what their files say: published shapes and recipes, on meshes that hold them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from intttrain.app.commands import derived_values
from intttrain.config import Config, as_dict, resolve
from intttrain.config.dotted import flatten
from intttrain.config.run_stages import make_stages
from tests.app.small import REPO, cli, done, error_line
from tests.configs.programs import CONFIGS, FILES, MISFITS, device_count, load

ALL = [(name, variant) for name in FILES for variant in load(name).TOPOLOGIES]
TTT = [(name, variant) for name, variant in ALL if not variant.endswith("_dense")]
PLANNED = [(*pair, topology) for pair in ALL for topology in load(pair[0]).TOPOLOGIES[pair[1]]]
LIBTPU = importlib.util.find_spec("libtpu") is not None
MILLION, BILLION = 2**20, 1e9  # batch sizes are counted in powers of two, training tokens are not


@functools.cache
def config(name: str, variant: str) -> Config:
    return resolve(load(name).get_config(variant))


@functools.cache
def derived(name: str, variant: str) -> dict[str, Any]:
    return derived_values(config(name, variant))


def of_size(table: dict[str, Any], name: str, variant: str) -> Any:
    """Returns the entry whose key begins ``FILE:VARIANT``; exactly one must."""
    found = [value for key, value in table.items() if re.match(rf"{re.escape(key)}(_|$)", f"{name}:{variant}")]
    assert len(found) == 1, f"{name}:{variant} is in no row of this table, or in several"
    return found[0]


# --- published numbers ---------------------------------------------------------------------------------------------

# Billions of parameters of the plain model. The paper's own sizes are named roughly; these are what its shapes have.
PARAMETERS = {
    "qwen3:4b": 4.02, "qwen3:8b": 8.19, "qwen3:14b": 14.77, "llama3:8b": 8.03,
    "paper:1.7b": 1.72, "paper:4b": 4.02, "paper:500m": 0.393, "paper:1.5b": 1.440,
}  # fmt: skip

# Tokens a row, tokens a step, tokens in all, peak learning rate.
RECIPES = {
    "qwen3:4b_8k": (8192, 2 * MILLION, 20 * BILLION, 5e-6),
    **{f"qwen3:{size}_32k": (32768, 2 * MILLION, 20 * BILLION, 5e-6) for size in ("4b", "8b", "14b")},
    **{f"qwen3:{size}_128k": (131072, 2 * MILLION, 15 * BILLION, 5e-6) for size in ("4b", "8b", "14b")},
    "llama3:8b_32k": (32768, 2 * MILLION, 20 * BILLION, 5e-6),
    "llama3:8b_128k": (131072, 2 * MILLION, 15 * BILLION, 5e-6),
    "paper:500m": (32768, 2 * MILLION, 20 * BILLION, 5e-4),
    "paper:1.5b": (32768, 4 * MILLION, 60 * BILLION, 3e-4),
    "paper:1.7b": (8192, 8 * MILLION, 120 * BILLION, 3e-4),
    "paper:4b": (8192, 8 * MILLION, 120 * BILLION, 3e-4),
}


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_parameters_are_the_published_number(name: str, variant: str) -> None:
    numbers = derived(name, variant)
    plain = numbers["parameters"] - numbers["ttt_parameters"]
    assert plain == pytest.approx(of_size(PARAMETERS, name, variant) * 1e9, rel=0.01)
    assert (numbers["ttt_parameters"] == 0) == variant.endswith("_dense")


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_tokens_and_optimizer_are_the_recipe(name: str, variant: str) -> None:
    seq_len, per_step, in_all, learning_rate = of_size(RECIPES, name, variant)
    numbers, train = derived(name, variant), config(name, variant).train
    assert config(name, variant).data.seq_len == seq_len
    assert numbers["tokens_per_step"] == pytest.approx(per_step, rel=0.01)
    assert numbers["tokens_in_all"] == pytest.approx(in_all, rel=0.01)
    assert train.schedule.peak_learning_rate == learning_rate and train.schedule.kind == "cosine"
    assert (train.optimizer.weight_decay, train.optimizer.clip_norm) == (0.1, 1.0)
    assert name != "paper" or train.schedule.warmup_steps == 1024


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_rope_is_that_of_the_model_and_length(name: str, variant: str) -> None:
    rope = as_dict(config(name, variant))["model"]["rope"]
    scaling = rope["scaling"] or {}
    if name == "llama3":
        assert rope["theta"] == 5e5 and config(name, variant).model.norm_eps == 1e-5
        assert list(scaling.values()) == ["llama3", 8.0, 1.0, 4.0, 8192]
    else:
        assert rope["theta"] == 1e6 and config(name, variant).model.norm_eps == 1e-6
        assert scaling.get("kind") == ("yarn" if "128k" in variant else None)
        assert not scaling or scaling["factor"] * scaling["original_max_position"] == config(name, variant).data.seq_len


@pytest.mark.parametrize(("name", "variant"), TTT)
def test_every_sixth_layer_learns(name: str, variant: str) -> None:
    model = config(name, variant).model
    assert model.ttt is not None
    assert model.ttt.layers == tuple(range(0, model.num_layers, 6))
    assert model.ttt.target == ("input_embed" if name == "paper" else "hidden_states")
    assert model.ttt.chunk_tokens <= (model.sliding_window or 1024), "text leaves the window before it is learned"


def test_windows_are_the_papers() -> None:
    windows = {variant: config("paper", variant).model.sliding_window for name, variant in TTT if name == "paper"}
    assert {variant: window for variant, window in windows.items() if window} == {"500m": 2048, "1.5b": 4096}
    assert {"500m_full", "1.5b_full"} < windows.keys()


def test_a_staged_run_has_the_stages_of_the_single_variants() -> None:
    """So the plans of those are its plans; only the schedule spans all of them."""
    for twin in ("", "_dense"):
        staged = config("qwen3", f"4b_staged{twin}")
        stages = make_stages(staged)
        assert [stage.until_step - stage.first_step for stage in stages] == [4768, 4768, 7153]
        for stage, length in zip(stages, ("8k", "32k", "128k"), strict=True):
            one = config("qwen3", f"4b_{length}{twin}")
            assert (stage.config.model, stage.config.data, stage.config.mesh) == (one.model, one.data, one.mesh)
            assert stage.config.train.batch_rows == one.train.batch_rows
        assert derived("qwen3", f"4b_staged{twin}")["tokens_in_all"] == pytest.approx(35 * BILLION, rel=0.01)


# --- variants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), TTT)
def test_twins_differ_only_in_ttt(name: str, variant: str) -> None:
    ttt, dense = (flatten(as_dict(config(name, v))) for v in (variant, f"{variant}_dense"))
    differing = {key for key in ttt.keys() | dense.keys() if ttt.get(key, "") != dense.get(key, "")}
    assert {key for key in differing if not key.startswith("model.ttt")} == {"name"}
    assert dense["model.ttt"] is None and ttt["model.ttt.eta"] > 0


def test_names_tell_variants_apart() -> None:
    names = [config(name, variant).name for name, variant in ALL]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", FILES)
def test_the_command_line_takes_variants_and_refuses_others_in_one_line(name: str) -> None:
    file = CONFIGS / f"{name}.py"
    variants = list(load(name).TOPOLOGIES)
    assert f"{name}-{variants[0]}" in done("config", f"--config={file}").out, "the first is the default"
    assert f"{name}-{variants[-1]}" in done("config", f"--config={file}:{variants[-1]}").out
    refusal = error_line(cli("config", f"--config={file}:nosuch"))
    assert f"configs/{name}.py has the variants {', '.join(variants)}, " in refusal and refusal.endswith("not 'nosuch'")


# --- meshes --------------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("tpu", marks=pytest.mark.skipif(not LIBTPU, reason="no libtpu"))]
)
def programs(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What ``make_program`` answers, on CPU devices and on the devices that libtpu describes."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    if request.param == "cpu":
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"
    else:
        environment |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    program = [sys.executable, str(REPO / "tests" / "configs" / "programs.py"), request.param]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_programs_can_be_made_for_every_topology(programs: dict[str, dict[str, Any]]) -> None:
    planned = {key: result for key, result in programs.items() if key not in MISFITS}
    assert {key: result["error"] for key, result in planned.items() if "error" in result} == {}
    assert planned.keys() == {f"{name}:{variant} {topology}" for name, variant, topology in PLANNED}
    for key, result in planned.items():
        assert result["devices"] == device_count(key.split()[-1]), key


def documented(name: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Returns {(variant, topology): (mesh, rows x tokens)} of the table in a file's docstring."""
    text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text())) or ""
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert lines[0] == ["variant", "topology", "mesh", "rows x tokens", "peak GiB", "step s"]
    return {(row[0], row[1]): (row[2], row[3]) for row in lines[2:]}


@pytest.mark.parametrize("name", FILES)
def test_tables_say_what_the_files_do(name: str, programs: dict[str, dict[str, Any]]) -> None:
    table = documented(name)
    assert list(dict.fromkeys(variant for variant, _ in table)) == [v for file, v in TTT if file == name]
    assert table.keys() == {(v.removesuffix("_dense"), topology) for file, v, topology in PLANNED if file == name}
    for (variant, topology), (mesh, rows) in table.items():
        shown = config(name, variant)
        twins = [programs.get(f"{name}:{one} {topology}") for one in (variant, f"{variant}_dense")]
        assert {twin["mesh"] for twin in twins if twin} == {mesh}
        assert rows == f"{shown.train.batch_rows} x {shown.data.seq_len}"


def test_a_mesh_that_does_not_fit_is_noticed(programs: dict[str, dict[str, Any]]) -> None:
    for key in MISFITS:
        assert "train.batch_rows" in programs[key]["error"], "more devices than rows, and rows are not cut further"
