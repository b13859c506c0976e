"""Stages: what each resolves to, where it reads, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from intttrain.config import Config, as_dict, default_config, resolve
from intttrain.config.dotted import flatten, unflatten
from intttrain.config.errors import UserError
from intttrain.config.run_stages import make_stages, stage_after, stage_before

YARN = {"kind": "yarn", "factor": 4.0, "original_max_position": 512}


def with_stages(*stages: tuple[int, dict[str, Any]]) -> Config:
    """The default configuration of 1000 steps of 8 rows of 1024 tokens, in stages."""
    config = default_config()
    config.train.stages = tuple({"until_step": until, "overrides": overrides} for until, overrides in stages)
    return resolve(config)


def test_a_run_without_stages_is_one() -> None:
    config = resolve(default_config())
    (stage,) = make_stages(config)
    assert stage.config is config
    assert (stage.first_step, stage.until_step, stage.block_tokens, stage.cursor_per_row) == (0, 1000, 1024, 1)
    assert stage.first_row(24) == 24 and stage.cursor_after(24) == 32


def test_every_stage_resolves_with_its_values() -> None:
    config = with_stages((400, {"data.seq_len": 256, "train.batch_rows": 32}), (1000, {"model.rope.scaling": YARN}))
    short, long = make_stages(config)
    assert (short.config.data.seq_len, short.config.train.batch_rows, short.config.model.rope.scaling) == (
        256,
        32,
        None,
    )
    assert (long.config.data.seq_len, long.config.train.batch_rows) == (1024, 8)
    assert long.config.model.rope.scaling.kind == "yarn"
    assert short.config.train.stages == () and short.config.train.num_steps == 1000, "the schedule is that of the run"
    assert str(long) == "stage 2 of 2, steps 401 to 1000: 8 rows of 1024 tokens"
    stored = json.loads(json.dumps(flatten(as_dict(config))))
    assert resolve(unflatten(stored)) == config and hash(config) == hash(resolve(unflatten(stored)))


def test_a_section_can_be_taken_away() -> None:
    config = default_config()
    config.model.rope.scaling = YARN
    config.train.stages = ({"until_step": 1000, "overrides": {"model.rope.scaling": None}},)
    assert make_stages(resolve(config))[0].config.model.rope.scaling is None


def test_which_stage_made_a_step_and_which_goes_on() -> None:
    stages = make_stages(with_stages((400, {}), (700, {}), (1000, {})))
    assert [stage_before(stages, step).number for step in (0, 1, 400, 401, 700, 1000)] == [1, 1, 1, 2, 2, 3]
    assert [stage_after(stages, step).number for step in (0, 399, 400, 699, 700, 1000)] == [1, 1, 2, 2, 3, 3]


def test_the_cursor_counts_the_shortest_rows() -> None:
    """Rows of 256, 1024 and 512: a stage goes on at the next whole row of its own, and no other row is left out."""
    config = with_stages(
        (3, {"data.seq_len": 256, "train.batch_rows": 1}),
        (5, {"train.batch_rows": 2}),
        (1000, {"data.seq_len": 512, "train.batch_rows": 1}),
    )
    cursor, read = 0, []
    for stage in make_stages(config):
        for _ in range(stage.first_step, min(stage.until_step, 7)):
            first = stage.first_row(cursor) * stage.cursor_per_row
            cursor = stage.cursor_after(cursor)
            read.append((first, cursor))
    assert read == [(0, 1), (1, 2), (2, 3), (4, 12), (12, 20), (20, 22), (22, 24)]
    assert {stage.block_tokens for stage in make_stages(config)} == {1024}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([(400, {}), (300, {})], "until_step=[400, 300], which must increase and end at train.num_steps=1000; use"),
        ([(400, {}), (900, {})], "until_step=[400, 900], which must increase and end at train.num_steps=1000; use"),
        ([(500, {}), (500, {}), (1000, {})], "use for example [333, 666, 1000]"),
        ([(0, {}), (1000, {})], "until_step=0: input should be greater than 0"),
        ([(1000, {"data.seqlen": 8})], "train.stages[0]: a stage cannot set data.seqlen; did you mean 'data.seq_len'?"),
        ([(1000, {"model.d_model": 8})], "train.stages[0]: a stage cannot set model.d_model"),
        ([(1000, {"data.seq_len": "8"})], "train.stages[0]: data.seq_len='8': input should be a valid integer"),
        ([(400, {}), (1000, {"data.seq_len": 1000})], "train.stages[1]: model.ttt.chunk_tokens=128 does not divide"),
        ([(400, {"mesh.fsdp": None, "mesh.context": None}), (1000, {})], "train.stages[0]: mesh.fsdp=None and mesh"),
        ([(400, {"data.seq_len": 384}), (1000, {})], "data.seq_len=384 and 1024: a longer row must hold whole rows of"),
    ],
)
def test_what_does_not_fit_is_one_line(stages: list[tuple[int, dict[str, Any]]], said: str) -> None:
    with pytest.raises(UserError) as error:
        with_stages(*stages)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_stage_of_a_dense_run_has_no_fast_weight_to_set() -> None:
    config = default_config()
    config.model.ttt = None
    config.train.stages = ({"until_step": 1000, "overrides": {"model.ttt.eta": 0.1}},)
    with pytest.raises(UserError, match=r"train.stages\[0\]: model.ttt.eta cannot be set: model.ttt is None"):
        resolve(config)
