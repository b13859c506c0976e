"""``--config.a.b=text``: the type of the field decides, whatever the field holds; what does not fit is one line."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_type_hints

import pytest

from intttrain.config import Config, default_config, resolve
from intttrain.config.dotted import flatten
from intttrain.config.errors import UserError
from intttrain.config.overrides import apply_overrides
from intttrain.config.registry import kinds_of

SCALING = "{'kind': 'yarn', 'factor': 4.0, 'original_max_position': 4096}"
STORES: tuple[dict[str, Any], ...] = ({"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0})


def tree(**changes: Any) -> dict[str, Any]:
    plain = default_config().to_dict()
    plain["data"]["train"] = STORES
    for path, value in changes.items():
        *sections, name = path.split("__")
        section = plain
        for part in sections:
            section = section[part]
        section[name] = value
    return plain


def changed(*overrides: str, **before: Any) -> dict[str, Any]:
    """Returns what ``a.b=text`` changes, as dotted keys and values."""
    texts = [(key, text if equals else None) for key, equals, text in (line.partition("=") for line in overrides)]
    old, new = flatten(tree(**before)), flatten(apply_overrides(tree(**before), texts))
    return {key: value for key, value in new.items() if key not in old or old[key] != value}


def refusal(*overrides: str, **before: Any) -> str:
    with pytest.raises(UserError) as caught:
        changed(*overrides, **before)
    message = str(caught.value)
    assert "\n" not in message and overrides[-1].partition("=")[0] in message
    return message


def optional_keys(section: Any = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(section).items():
        kinds = kinds_of(hint)
        keys += [f"{prefix}{name}"] if NoneType in kinds else []
        if len(kinds) == 1 and hasattr(kinds[0], "__dataclass_fields__"):
            keys += optional_keys(kinds[0], f"{prefix}{name}.")
    return keys


def test_there_are_optional_values_of_every_kind() -> None:
    wanted = {"model.ttt", "model.rope.scaling", "data.heldout", "mesh.fsdp", "eval.every_steps", "train.wandb_project"}
    assert wanted < set(optional_keys())


@pytest.mark.parametrize("key", optional_keys())
@pytest.mark.parametrize("held", ["as it is", None, "a value"])
def test_none_is_none_for_every_optional_value(key: str, held: Any) -> None:
    before = tree() if held == "as it is" else tree(**{key.replace(".", "__"): held})
    after = apply_overrides(before, [(key, "None")])
    value: Any = after
    for part in key.split("."):
        value = value[part]
    assert value is None


@pytest.mark.parametrize("key", ["name", "train.seed", "model.rope", "model.tie_embeddings", "train.optimizer.eps"])
def test_none_is_refused_where_a_value_is_needed(key: str) -> None:
    assert refusal(f"{key}=None") == f"--config.{key}=None: it cannot be None"


def test_an_empty_tuple_is_what_no_entries_are() -> None:
    assert refusal("eval.gates=None").endswith("use () for no entries")
    assert changed("data.train=()") == {"data.train": ()}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=8", "name", "8"),
        ("data.heldout=stores/x=y", "data.heldout", "stores/x=y"),
        ("train.wandb_project=p", "train.wandb_project", "p"),
        ("train.num_steps=1_000_000", "train.num_steps", 1_000_000),
        ("mesh.fsdp=4", "mesh.fsdp", 4),
        ("model.ttt.delta_clip=2", "model.ttt.delta_clip", 2.0),
        ("train.optimizer.eps=1e-6", "train.optimizer.eps", 1e-6),
        ("model.tie_embeddings=false", "model.tie_embeddings", False),
        ("model.ttt.preserve_row_norm=True", "model.ttt.preserve_row_norm", True),
        ("model.ttt.preserve_row_norm", "model.ttt.preserve_row_norm", True),
        ("model.ttt.layers=(0, 2)", "model.ttt.layers", (0, 2)),
        ("model.ttt.layers=[1]", "model.ttt.layers", (1,)),
        ("prepare.source.paths=('x',)", "prepare.source.paths", ("x",)),
        ("prepare.source.paths=texts/*.md", "prepare.source.paths", ("texts/*.md",)),
        ("eval.gating.rates=0.5", "eval.gating.rates", (0.5,)),
        ("data.train[1].path=x", "data.train", (STORES[0], {"path": "x", "weight": 2.0})),
        ("data.train[0]={'path': 'x'}", "data.train", ({"path": "x"}, STORES[1])),
    ],
)
def test_a_text_is_read_as_its_field_says(override: str, key: str, value: Any) -> None:
    assert changed(override) == {key: value}
    resolve(apply_overrides(tree(), [tuple(override.partition("=")[::2]) if "=" in override else (override, None)]))


def test_a_section_that_is_none_can_be_given_whole_and_then_in_parts() -> None:
    found = changed(f"model.rope.scaling={SCALING}", "model.rope.scaling.factor=8")
    assert found["model.rope.scaling.factor"] == 8.0 and found["model.rope.scaling.kind"] == "yarn"
    found = changed("model.ttt={'layers': (1,), 'chunk_tokens': 64, 'eta': 0.1}", model__ttt=None)
    assert found == {"model.ttt.layers": (1,), "model.ttt.chunk_tokens": 64, "model.ttt.eta": 0.1}


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("data.train[2].path=x", "data.train has no entry 2, the last is data.train[1]; to add one, give all"),
        ("data.train[-1].path=x", "[-1] is no index; entries are counted [0], [1], ..."),
        ("data.train[first].path=x", "[first] is no index"),
        ("data.train[0.path=x", "'train[0' is not the name of a value"),
        ("data.train[0].pth=x", "unknown configuration key data.train[0].pth; did you mean 'path'?"),
        ("data.seq_len[0]=4", "data.seq_len has no entries; set --config.data.seq_len itself"),
        ("data.seq_len.x=4", "data.seq_len is no section"),
        (
            "model.rope.scaling.factor=2",
            "model.rope.scaling is None; give all of it, --config.model.rope.scaling={'kind'",
        ),
        ("model.rope.scaling=yarn", "write {'kind': 'llama3', 'factor': ...,"),
        ("prepare.source=tfds", "or {'kind': 'tfds', 'name': ..., 'data_dir': ...}"),
        ("model.ttt=3", "is not a section; write {'layers': ..., 'chunk_tokens': ..., 'eta': ...} or None"),
        ("prepare.source.paths=('x')", "is not a tuple; one entry is written ('x',)"),
        ("prepare.source.paths=x,y", "write ('a', 'b'), with quotes around text"),
        ("eval.position_edges=(512)", "one entry is written (512,)"),
        ("eval.position_edges=512,1024.0.0", "write (1, 2)"),
        ("eval.position_edges=five", "this is no whole number"),
        ("eval.gates=online", "write {'rule': ...}"),
        ("model.ttt.layers={0, 1}", "is not a tuple"),
        ("train.num_steps=1e3", "this is no whole number"),
        ("train.batch_rows=8.0", "this is no whole number"),
        ("model.ttt.eta=big", "this is no number"),
        ("model.ttt.eta", "has no value; write --config.model.ttt.eta=VALUE"),
        ("model.tie_embeddings=yes", "use true or false"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(override: str, wanted: str) -> None:
    assert wanted in refusal(override)


def test_nothing_is_given_twice_or_undone() -> None:
    assert "given twice, as 1 and 2" in refusal("train.seed=1", "train.seed=2")
    assert "would undo it" in refusal("model.ttt.eta=1", "model.ttt=None")
    assert "would undo it" in refusal("data.train[0].path=x", "data.train=()")
    assert "model.ttt is None" in refusal("model.ttt=None", "model.ttt.eta=1")
