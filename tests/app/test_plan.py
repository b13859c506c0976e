"""`intttrain plan` from end to end, on a model that compiles in seconds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.app.small import cli, done, error_line

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")

CONFIG = """
from intttrain.config import default_config


def get_config(variant="ttt"):
    config = default_config()
    config.name = "planned"
    model = config.model
    model.vocab_size, model.d_model, model.d_ff, model.num_layers = 1536, 256, 768, 4
    model.num_heads, model.num_kv_heads, model.head_dim = 4, 2, 128
    model.ttt.layers, model.ttt.chunk_tokens = (0, 2), 128
    if variant == "dense":
        model.ttt = None
    model.loss_chunk_tokens = 128
    config.data.seq_len = 512
    config.eval.seq_len, config.eval.position_edges = 512, (512,)
    config.train.batch_rows = 8
    return config
"""
D, F, L, N, K, H, V, T, ROWS, DEVICES = 256, 768, 4, 4, 2, 128, 1536, 512, 8, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "planned.py"
    path.write_text(CONFIG)
    return f"--config={path}"


@pytest.fixture(scope="module")
def said_of_memory() -> list[Any]:
    """What the compiler says of both programs that are compared, as ``compared`` hears it."""
    return []


@pytest.fixture(scope="module")
def compared(
    config: str, said_of_memory: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict, dict, Path]:
    from intttrain.planner import plan

    def read_memory(compiled: Any, *arguments: Any, **named: Any) -> Any:
        said_of_memory.append(compiled.memory_analysis())
        return read(compiled, *arguments, **named)

    folder, read = tmp_path_factory.mktemp("compared"), plan.read_memory
    flags = ("--topology=v5e:2x2", "--compare", f"--json={folder / 'plan.json'}", f"--hlo={folder / 'hlo'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_memory", read_memory)
        out = done("plan", config, *flags).out
    content = json.loads((folder / "plan.json").read_text())
    return out, content["plan"], content["without_ttt"], folder / "hlo"


def test_the_page(compared: tuple[str, dict, dict, Path]) -> None:
    out, with_ttt, dense, hlo = compared
    for part in (
        "planned on v5e:2x2: 4 devices, mesh fsdp 4", "fits with", "optimizer state", "largest temporaries", "MFU",
        "model FLOPs per token = 6 x", "by line of the program", "by pass and scope of the model",
        "intttrain/model/linear.py:", "all-gather over fsdp", "TTT costs +",
    ):  # fmt: skip
        assert part in out, out
    assert sorted(path.name for path in hlo.iterdir()) == [
        "planned-without-ttt.v5e-2x2.txt", "planned.v5e-2x2.txt",
    ]  # fmt: skip
    assert with_ttt["cost"]["unresolved_loops"] == dense["cost"]["unresolved_loops"] == []
    assert with_ttt["prediction"]["step_seconds"] > dense["prediction"]["step_seconds"] > 0
    assert [item for item in dense["replicated"] if item["kind"] == "activation"] == []


def test_flops_of_the_model_by_hand(compared: tuple[str, dict, dict, Path]) -> None:
    """Full remat: a layer's weights are used twice forward and twice backward, the output head too.

    But for the down projection: nothing needs its recomputed result, so it has three products. A TTT layer has seven
    instead: forward the read and the update, backward two that bring the state back and three with its gradient. Four
    more are with the target projection.
    RoPE turns queries and keys by a product forward, again, and backward.
    """
    _, with_ttt, dense, _ = compared
    unit = 2 * ROWS * T / DEVICES  # FLOPs of one product with a weight of one number
    layer = 4 * (D * H * (2 * N + 2 * K) + 3 * D * F) - D * F + 3 * (N + K) * H * H
    by_hand = unit * (L * layer + 4 * V * D)
    assert dense["cost"]["matmul_flops"] == pytest.approx(by_hand, rel=0.01)
    assert with_ttt["cost"]["matmul_flops"] == pytest.approx(by_hand + unit * 2 * (4 * D * F + 4 * D * D), rel=0.01)


def test_memory_is_the_compilers(compared: tuple[str, dict, dict, Path], said_of_memory: list[Any]) -> None:
    for memory, said in zip((compared[1]["memory"], compared[2]["memory"]), said_of_memory, strict=True):
        assert memory["arguments"] == said.argument_size_in_bytes
        assert memory["temporaries"] == said.temp_size_in_bytes
        assert memory["aliased"] == said.alias_size_in_bytes
    parameters = V * D + L * (D * H * (2 * N + 2 * K) + 3 * D * F)
    assert memory["parameters"] == pytest.approx(4 * parameters / DEVICES, rel=0.01)
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)


def test_a_text_that_is_there_is_not_overwritten(
    config: str, compared: tuple[str, dict, dict, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from intttrain.planner import plan

    monkeypatch.setattr(plan, "lower", lambda program: pytest.fail("it compiles"))
    line = error_line(cli("plan", config, "--topology=v5e:2x2", f"--hlo={compared[3]}"), after_other_lines=True)
    assert "planned.v5e-2x2.txt is there already" in line


@pytest.mark.slow
def test_a_sweep(config: str) -> None:
    out = done("plan", config + ":dense", "--topology=v5e:2x2", "--sweep=model.remat=full,qkv").out
    assert "remat=full" in out and "remat=qkv" in out and out.count("*") >= 1


def test_too_large_is_said_without_a_stack_trace(config: str) -> None:
    large = ("--config.model.d_ff=524288", "--config.model.vocab_size=262144", "--config.train.batch_rows=64")
    result = cli("plan", config + ":dense", "--topology=v5e:2x2", *large)
    assert result.status == 1, result.err
    assert "does not fit by" in result.out and "try" in result.out and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=v5x:2x2"], ["v5x", "did you mean"]),
        (["--topology=v5e:3x5"], ["v5e:3x5", "v5e:"]),
        (["--topology=v5e:2x2", "--config.mesh.tensor=3"], ["tensor 3", "4 devices", "[1, 2, 4]"]),
        (["--topology=v5e:2x2", "--config.train.batch_rows=6"], ["train.batch_rows=6", "fsdp 4", "4 or 8"]),
        (
            [
                "--topology=v5e:2x2",
                "--config.mesh.tensor=4",
                "--config.model.num_kv_heads=4",
                "--config.model.d_ff=1022",
            ],
            ["'mlp'", "1022", "tensor 4"],
        ),
        (["--topology=v5e:2x2", "--sweep=model.remta=full"], ["model.remta", "model.remat"]),
        (["--topology=v5e:2x2", "--sweep=model.remat=full", "--compare"], ["--compare", "--sweep"]),
        ([], ["--topology"]),
    ],
)
def test_bad_input_is_refused_before_compiling(
    config: str, flags: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from intttrain.planner import plan

    monkeypatch.setattr(plan, "lower", lambda program: pytest.fail("it compiles"))
    line = error_line(cli("plan", config, *flags), after_other_lines=True)
    assert all(part in line for part in said), line
