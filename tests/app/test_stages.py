"""A run in stages is one run: exact to resume anywhere, on a mesh and with rows of their own in every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intttrain import planner
from intttrain.config.errors import UserError
from tests.app.small import cli, error_line
from tests.app.staged import STAGES, STOPS
from tests.forced_devices import on_eight_cpu_devices


def with_stages(world, folder, stages):
    """Returns the flag for the small configuration in stages."""
    end = "    return config"
    text = (world.root / "small.py").read_text()
    (folder / "staged.py").write_text(text.replace(end, f"    config.train.stages = {stages}\n{end}"))
    return f"--config={folder / 'staged.py'}"


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("staged")
    return root, on_eight_cpu_devices("tests.app.staged", str(root))


@pytest.mark.slow
def test_stopped_in_every_stage_is_the_undisturbed_run(staged):
    _, found = staged
    assert set(found["straight"]) == {"2", "4", "6"}, "the end of a stage is always saved"
    for step, wanted in found["straight"].items():
        assert found["stopped"][step] == wanted, f"step {step}"
    # 256 tokens a step, in rows of the shortest stage whatever the stage.
    assert {step: sums["data_cursor"] for step, sums in found["stopped"].items()} == {
        str(step): 8 * step for step in (*STOPS, 4, 6)
    }


@pytest.mark.slow
def test_every_stage_is_announced(staged):
    reports = staged[1]["reports"]
    assert "new run" in reports[0] and "stage 1 of 3, steps 1 to 2: 8 rows of 32 tokens" in reports[0]
    assert "stage 3 of 3, steps 5 to 6: 2 rows of 128 tokens; compiling" in reports[0]
    for report, stage in zip(reports[1:], (1, 1, 2, 2, 3), strict=True):
        assert f"stage {stage} of 3" in report.splitlines()[0]


@pytest.mark.slow
def test_a_model_is_read_back_as_the_stage_had_it(staged):
    assert staged[1]["thetas"] == [1e4, 1e4, 1e5]


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("train --workdir={new}", "train.stages[1]: mesh: data 1 x fsdp 3 x context 1 x tensor 1 = 3, but there"),
        ("plan --topology=v5e:2x2", "--stage is not set: small-ttt has 2 (stage 1 of 2, steps 1 to 4: 2 rows of 64"),
        ("plan --topology=v5e:2x2 --stage=3", "--stage=3 does not exist: small-ttt has 2"),
        ("config --config.train.num_steps=9", "train.stages have until_step=[4, 10], which must increase and end at"),
        ("config --config.train.stages[0].until_step=10", "until_step=[10, 10], which must increase"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_compiled(world, tmp_path, command, wanted):
    stages = ({"until_step": 4, "overrides": {}}, {"until_step": 10, "overrides": {"mesh.fsdp": 3}})
    config = with_stages(world, tmp_path, stages)
    name, *flags = command.format(new=tmp_path / "new").split()
    assert wanted in error_line(cli(name, config, *flags))
    assert not (tmp_path / "new").exists()


def test_one_stage_is_planned(world, tmp_path, monkeypatch):
    def make_plan(config, topology, *, hlo):
        raise UserError(f"{config.name} on {topology}: rows of {config.data.seq_len}, {config.train.stages}")

    monkeypatch.setattr(planner, "make_plan", make_plan)
    stages = ({"until_step": 4, "overrides": {"data.seq_len": 32}}, {"until_step": 10, "overrides": {}})
    config = with_stages(world, tmp_path, stages)
    line = error_line(cli("plan", config, "--topology=v5e:2x2", "--stage=1"), after_other_lines=True)
    assert line == "error: small-ttt-stage-1 on v5e:2x2: rows of 32, ()"


@pytest.mark.slow
def test_metrics_of_both_are_the_same_and_of_the_text_in_order(staged):
    root, found = staged
    timing = ("time", "tokens_per_second", "eta_seconds")
    records = [
        [
            {key: value for key, value in json.loads(line).items() if key not in timing}
            for line in (root / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "stopped")
    ]
    assert records[0] == records[1]
    of_steps = [record for record in records[0] if "loss" in record]
    assert [record["step"] for record in of_steps] == list(range(1, STAGES[-1]["until_step"] + 1))
    assert [record["tokens"] for record in of_steps] == found["labels"], "step n reads blocks 2 n and 2 n + 1"
    assert len(set(found["labels"])) > 3, "another text would show"
    # Live, on the mesh and with the model of the stage that ends there; afterwards on one mesh (fp32 rounding).
    live = {str(record["step"]): record["eval/on"] for record in records[0] if "loss" not in record}
    assert list(live) == ["2", "4", "6"]
    assert live == pytest.approx(found["evaluated"], rel=1e-5)
