"""Which configuration may continue which checkpoint."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import pytest

from intttrain.config import as_dict, default_config, resolve
from intttrain.config.completion import complete
from intttrain.config.dotted import flatten
from intttrain.config.errors import UserError
from intttrain.train.checkpoint_info import CheckpointInfo, package_versions
from intttrain.train.compatibility import check_compatible
from tests.train.checkpoint_cases import (
    make_info,
)


def flat_default() -> dict[str, Any]:
    tree = default_config()
    tree.data.train = ({"path": "/data/a", "weight": 1.0},)
    return flatten(as_dict(resolve(tree)))


def info_of(flat: dict[str, Any]) -> CheckpointInfo:
    return dataclasses.replace(make_info(300), config=json.loads(json.dumps(flat)))


@pytest.mark.parametrize(
    "change",
    [{"name": "other"}, {"train.log_every_steps": 1}, {"train.checkpoint.every_steps": 7}, {"train.microbatches": 2},
     {"eval.documents": 3}, {"prepare.seed": 5}, {"data.prefetch_rows": 1}, {"data.heldout": "/elsewhere"},
     {"model.remat": "none"}, {"model.attention": "dense"}, {"model.loss_chunk_tokens": 64},
     {"model.ttt.implementation": "reference"}, {"data.train": ({"path": "/moved", "weight": 1.0},)}],
)  # fmt: skip
def test_keys_that_may_change(change):
    flat = flat_default()
    assert set(change) <= set(flat)
    check_compatible(info_of(flat), flat | change, "abc")


@pytest.mark.parametrize(
    "change",
    [{"model.d_ff": 1}, {"model.ttt.eta": 0.5}, {"model.compute_dtype": "float32"}, {"data.seed": 1},
     {"data.seq_len": 2048}, {"data.train": ({"path": "/data/a", "weight": 2.0},)}, {"train.batch_rows": 16},
     {"train.num_steps": 5}, {"train.seed": 1}, {"train.optimizer.b2": 0.5}, {"train.schedule.kind": "wsd"}],
)  # fmt: skip
def test_keys_that_make_another_run(change):
    flat = flat_default()
    assert set(change) <= set(flat)
    with pytest.raises(UserError, match=next(iter(change)).replace(".", r"\.")):
        check_compatible(info_of(flat), flat | change, "abc")


def test_stages_bind_but_for_keys_that_may_change():
    def staged(until_step: int, **overrides: Any) -> dict[str, Any]:
        named = {key.replace("__", "."): value for key, value in overrides.items()}
        return flat_default() | {"train.stages": [{"until_step": until_step, "overrides": named}]}

    run = info_of(staged(9, data__seq_len=8, mesh__context=2))
    check_compatible(run, staged(9, data__seq_len=8, mesh__fsdp=2, model__remat="none"), "abc")
    check_compatible(info_of(flat_default()), staged(9, mesh__context=2), "abc")
    for other in (staged(8, data__seq_len=8), staged(9, data__seq_len=4), staged(9), flat_default()):
        with pytest.raises(UserError, match=r"train\.stages"):
            check_compatible(run, other, "abc")
    without = {key: value for key, value in flat_default().items() if key != "train.stages"}
    check_compatible(info_of(without), flat_default(), "abc")  # of a run that began before there were stages


def test_all_differences_are_listed_with_both_values():
    flat = flat_default()
    changed = {key: value for key, value in flat.items() if not key.startswith("model.ttt")}
    changed |= {"model.ttt": None, "train.seed": 9}
    with pytest.raises(UserError) as caught:
        check_compatible(info_of(flat), changed, "def")
    message = str(caught.value)
    for part in (
        "the run in --workdir",
        "train.seed=0 in the run but 9 now",
        "model.ttt.eta=0.3 in the run but not set now",
        "model.ttt=not set in the run but null now",
        "fingerprint abc in the run but def now",
        "use another --workdir",
    ):
        assert part in message
    assert "\n" not in message


def test_a_key_that_one_side_does_not_have_has_its_default_there():
    flat = json.loads(json.dumps(flat_default()))
    defaults = {}
    for key in flat:
        completed = json.loads(json.dumps(complete({name: value for name, value in flat.items() if name != key})))
        if key in completed:
            defaults[key] = completed[key]
    assert {"model.ttt.preserve_row_norm", "train.skip.max_total", "mesh.fsdp", "train.stages"} < set(defaults)
    assert not {"model.ttt.eta", "model.ttt.layers", "name"} & set(defaults)  # these a run always has

    plain = flat | defaults
    for key in ("train.optimizer.b1", "train.checkpoint.every_steps"):
        del defaults[key]  # the sections themselves have no default, so a run has some of their fields
    sparse = {key: value for key, value in plain.items() if key not in defaults}  # a run from before these fields
    assert len(sparse) < len(plain) - 50
    check_compatible(info_of(sparse), plain, "abc")
    check_compatible(info_of(plain), sparse, "abc")


@pytest.mark.parametrize(
    ("absent", "now", "said"),
    [
        ("model.ttt.preserve_row_norm", True, "model.ttt.preserve_row_norm=false in the run but true now"),
        ("train.skip.spike_deviations", 4.0, "train.skip.spike_deviations=null in the run but 4.0 now"),
        ("train.optimizer.b2", 0.5, "train.optimizer.b2=0.95 in the run but 0.5 now"),
        ("model.ttt.eta", 0.3, "model.ttt.eta=not set in the run but 0.3 now"),
        ("model.rope.scaling", {"kind": "yarn"}, "model.rope.scaling=null in the run but not set now"),
    ],
)
def test_a_value_other_than_the_default_of_an_absent_key_binds(absent, now, said):
    flat = flat_default()
    old = info_of({key: value for key, value in flat.items() if key != absent})
    new = {key: value for key, value in flat.items() if key != absent} | flatten({absent: now})
    with pytest.raises(UserError) as caught:
        check_compatible(old, new, "abc")
    assert said in str(caught.value)


def test_a_section_that_a_run_does_not_have_at_all_has_its_defaults():
    flat = flat_default()
    assert any(key.startswith("train.skip.") for key in flat)
    without = {key: value for key, value in flat.items() if not key.startswith(("train.skip.", "mesh."))}
    check_compatible(info_of(without), flat, "abc")
    with pytest.raises(UserError, match=r"train\.skip\.spike_deviations=null in the run but 9\.0 now"):
        check_compatible(info_of(without), flat | {"train.skip.spike_deviations": 9.0}, "abc")


def test_a_key_that_only_the_run_knows_binds_unless_its_section_is_free():
    flat = flat_default()
    with pytest.raises(UserError, match=r"model\.ttt\.decay is a key of the run \(intttrain .*does not know"):
        check_compatible(info_of(flat | {"model.ttt.decay": 0.5}), flat, "abc")
    check_compatible(info_of(flat | {"eval.gone": 1}), flat, "abc")


def test_package_versions_name_what_is_installed():
    versions = package_versions()
    assert versions["jax"] == jax.__version__ and versions["python"].count(".") == 2
    assert {"optax", "orbax-checkpoint", "numpy"} <= set(versions)
