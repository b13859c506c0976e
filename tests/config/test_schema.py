"""The typed configuration: what is accepted, what is refused, and whether a refusal teaches."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from intttrain.config import Config, as_dict, default_config, default_ttt, resolve
from intttrain.config.dotted import flatten
from intttrain.config.errors import UserError, did_you_mean, nearest_divisors


def resolve_with(**changes: Any) -> Config:
    """Resolves the default with changes; ``model__ttt__eta=1.0`` stands for ``model.ttt.eta``."""
    config = default_config()
    for path, value in changes.items():
        *sections, name = path.split("__")
        section = config
        for part in sections:
            section = section[part]
        with section.unlocked(), section.ignore_type():
            section[name] = value
    return resolve(config)


def refusal(**changes: Any) -> str:
    """The message of the ``UserError`` that the changes provoke; always one line."""
    with pytest.raises(UserError) as caught:
        resolve_with(**changes)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


YARN = {"kind": "yarn", "factor": 4.0, "original_max_position": 32768}
LLAMA3 = {
    "kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192,
}  # fmt: skip


# --- accepted ----------------------------------------------------------------------------------------------------


def test_default_resolves_to_frozen_hashable_sections():
    config = resolve(default_config())
    assert config == resolve(default_config())
    assert {config: "a static argument of jit"}[resolve(default_config())]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.d_model = 1


def test_default_is_not_shared_between_callers():
    first = default_config()
    first.model.d_model = 64
    assert default_config().model.d_model != 64


def test_a_changed_value_arrives():
    assert resolve_with(model__ttt__eta=0.7).model.ttt.eta == 0.7
    assert resolve_with(model__d_ff=100).model.d_ff == 100


def test_sequences_become_tuples_so_that_the_result_stays_hashable():
    config = resolve_with(model__ttt__layers=[0, 2], data__train=[{"path": "a"}, {"path": "b", "weight": 2}])
    assert config.model.ttt.layers == (0, 2)
    assert [(item.path, item.weight) for item in config.data.train] == [("a", 1.0), ("b", 2.0)]
    hash(config)


def test_whole_numbers_are_floats_where_a_float_is_asked_for():
    eta = resolve_with(model__ttt__eta=1).model.ttt.eta
    assert (eta, type(eta)) == (1.0, float)


def test_dense_model_has_no_ttt_section_and_needs_no_chunk_grid():
    config = resolve_with(model__ttt=None, data__seq_len=1000, eval__seq_len=999, eval__position_edges=(999,))
    assert config.model.ttt is None


def test_default_ttt_is_a_section_for_files_that_start_dense():
    section = default_ttt()
    section.eta = 0.9
    assert resolve_with(model__ttt=section).model.ttt.eta == 0.9
    assert default_ttt().eta != 0.9


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "text", "paths": ("a",), "patterns": ("*.py",), "max_bytes": 10},
        {"kind": "seqio", "name": "task", "imports": ("registers",)},
        {"kind": "tfds", "name": "builder", "data_dir": "dir"},
    ],
    ids=lambda source: source["kind"],
)
def test_every_data_source_resolves_by_its_kind(source):
    resolved = resolve_with(prepare__source=source).prepare.source
    assert {key: getattr(resolved, key) for key in source} == source


@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "yarn", "factor": 4.0, "original_max_position": 32768},
        {
            "kind": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position": 8192,
        },
    ],
    ids=lambda scaling: scaling["kind"],
)
def test_every_rope_scaling_resolves_by_its_kind(scaling):
    resolved = resolve_with(model__rope__scaling=scaling).model.rope.scaling
    assert {key: getattr(resolved, key) for key in scaling} == scaling


# --- flat and plain forms ----------------------------------------------------------------------------------------


def test_flatten_joins_names_and_keeps_sequences_whole():
    assert flatten({"a": {"b": {"c": 1}, "d": (1, 2)}, "e": None}) == {"a.b.c": 1, "a.d": (1, 2), "e": None}


def test_flat_default_names_every_field_once():
    flat = flatten(as_dict(resolve(default_config())))
    assert flat["model.ttt.eta"] == 0.3
    assert flat["model.rope.scaling"] is None
    assert not any(isinstance(value, dict) for value in flat.values())
    assert {key.split(".")[0] for key in flat} == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("changes", [{}, {"model__ttt": None}, {"data__train": [{"path": "a"}]}])
def test_json_round_trip_gives_the_same_config(changes):
    # Checkpoints store this form, and a resumed run has to understand it.
    config = resolve_with(**changes)
    assert resolve(json.loads(json.dumps(as_dict(config)))) == config


def test_resolve_takes_plain_dictionaries_and_leaves_them_alone():
    tree = default_config().to_dict()
    before = json.dumps(tree)
    resolve(tree)
    assert json.dumps(tree) == before


# --- refused: one field --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "dotted", "suggestion"),
    [
        ({"modle": 1}, "modle", "model"),
        ({"model__ttt__chunk_token": 1}, "model.ttt.chunk_token", "chunk_tokens"),
        ({"model__rope__thetas": 1}, "model.rope.thetas", "theta"),
        ({"data__seqlen": 1}, "data.seqlen", "seq_len"),
        ({"prepare__source__path": 1}, "prepare.source.path", "paths"),
        ({"prepare__tokenizer__kinds": 1}, "prepare.tokenizer.kinds", "kind"),
        ({"train__optimizer__weight_deacy": 1}, "train.optimizer.weight_deacy", "weight_decay"),
        ({"train__schedule__warmup_step": 1}, "train.schedule.warmup_step", "warmup_steps"),
        ({"train__checkpoint__every_step": 1}, "train.checkpoint.every_step", "every_steps"),
        ({"eval__document": 1}, "eval.document", "documents"),
        (
            {
                "model__rope__scaling": {
                    "kind": "yarn",
                    "factor": 4.0,
                    "original_max_position": 32768,
                    "beta_fst": 1.0,
                }
            },
            "model.rope.scaling.beta_fst",
            "beta_fast",
        ),
        ({"data__train": [{"path": "a", "weigth": 2.0}]}, "data.train.0.weigth", "weight"),
        (
            {"prepare__source": {"kind": "seqio", "name": "x", "imports": ("m",), "tex_feature": "a"}},
            "prepare.source.tex_feature",
            "text_feature",
        ),
        (
            {"prepare__source": {"kind": "tfds", "name": "x", "data_dir": "d", "splits": "a"}},
            "prepare.source.splits",
            "split",
        ),
        (
            {
                "model__rope__scaling": {
                    "kind": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position": 8192,
                    "low_freq": 1.0,
                }
            },
            "model.rope.scaling.low_freq",
            "low_freq_factor",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_key_is_named_with_its_path_and_the_closest_name(changes, dotted, suggestion):
    assert refusal(**changes) == f"unknown key {dotted}; did you mean {suggestion!r}?"


def test_the_best_checkpoint_needs_an_evaluation():
    message = refusal(train__checkpoint__keep_best=2)
    assert message.startswith("train.checkpoint.keep_best=2 needs eval.every_steps, which is None")


def test_unknown_key_far_from_every_name_lists_the_choices():
    message = refusal(train__checkpoint__zzz=1)
    assert (
        message == "unknown key train.checkpoint.zzz; choose from every_steps, keep_best, keep_every_steps, keep_last"
    )


@pytest.mark.parametrize("name", ["text", "seqio", "yarn", "llama3", "tfds"])
def test_unknown_key_that_is_also_the_name_of_a_kind(name):
    assert refusal(**{name: 1}).startswith(f"unknown key {name};")


@pytest.mark.parametrize(
    ("changes", "dotted", "value"),
    [
        ({"model__num_layers": "four"}, "model.num_layers", "'four'"),
        ({"model__num_layers": "4"}, "model.num_layers", "'4'"),
        ({"model__num_layers": True}, "model.num_layers", "True"),
        ({"model__num_layers": 4.5}, "model.num_layers", "4.5"),
        ({"model__num_layers": 0}, "model.num_layers", "0"),
        ({"model__num_layers": None}, "model.num_layers", "None"),
        ({"model__tie_embeddings": "yes"}, "model.tie_embeddings", "'yes'"),
        ({"model__tie_embeddings": 1}, "model.tie_embeddings", "1"),
        ({"model__ttt__eta": "0.3"}, "model.ttt.eta", "'0.3'"),
        ({"model__ttt__eta": float("nan")}, "model.ttt.eta", "nan"),
        ({"model__ttt__eta": float("inf")}, "model.ttt.eta", "inf"),
        ({"model__ttt__eta": -0.1}, "model.ttt.eta", "-0.1"),
        ({"model__ttt__delta_clip": 0.0}, "model.ttt.delta_clip", "0.0"),
        ({"model__ttt__layers": 0}, "model.ttt.layers", "0"),
        ({"model__ttt__layers": (0, -1)}, "model.ttt.layers.1", "-1"),
        ({"model__ttt__layers": ("all",)}, "model.ttt.layers.0", "'all'"),
        ({"model": 3}, "model", "3"),
        ({"train__optimizer": None}, "train.optimizer", "None"),
        ({"name": 3}, "name", "3"),
        ({"train__optimizer__b1": 1.0}, "train.optimizer.b1", "1.0"),
        ({"train__optimizer__b2": 1.0}, "train.optimizer.b2", "1.0"),
        ({"train__optimizer__b2": 1 - 1e-9}, "train.optimizer.b2", "0.999999999"),
        ({"train__optimizer__eps": 1e-50}, "train.optimizer.eps", "1e-50"),
        ({"train__optimizer__eps": 1e-40}, "train.optimizer.eps", "1e-40"),
        ({"train__optimizer__clip_norm": 1e-39}, "train.optimizer.clip_norm", "1e-39"),
        ({"train__schedule__peak_learning_rate": 1e39}, "train.schedule.peak_learning_rate", "1e+39"),
        ({"model__norm_eps": 1e-46}, "model.norm_eps", "1e-46"),
        ({"model__ttt__eta": 1e39}, "model.ttt.eta", "1e+39"),
        ({"model__ttt__delta_clip": 1e-42}, "model.ttt.delta_clip", "1e-42"),
        ({"model__rope__theta": 1.0}, "model.rope.theta", "1.0"),
        ({"train__seed": 2**32}, "train.seed", "4294967296"),
        ({"data__seed": 2**32}, "data.seed", "4294967296"),
        ({"prepare__seed": 2**32}, "prepare.seed", "4294967296"),
        ({"eval__seed": -1}, "eval.seed", "-1"),
        ({"eval__ruler__seed": 2**32}, "eval.ruler.seed", "4294967296"),
        ({"eval__code__seed": 2**32}, "eval.code.seed", "4294967296"),
        ({"eval__gates": [{"rule": "threshold", "thresholds": ["0.9"]}]}, "eval.gates.0.thresholds.0", "'0.9'"),
        ({"eval__gates": [{"rule": "threshold", "thresholds": [float("nan")]}]}, "eval.gates.0.thresholds.0", "nan"),
        ({"eval__gating__shared": "yes"}, "eval.gating.shared", "'yes'"),
        ({"prepare__heldout_fraction": 1.5}, "prepare.heldout_fraction", "1.5"),
        ({"data__train": "store"}, "data.train", "'store'"),
        ({"data__train": [{"path": "a", "weight": 0.0}]}, "data.train.0.weight", "0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_value_is_named_with_its_path(changes, dotted, value):
    assert refusal(**changes).startswith(f"{dotted}={value}: ")


@pytest.mark.parametrize(
    ("changes", "choices"),
    [
        ({"model__family": "qwen"}, ["'qwen3'", "'llama'"]),
        ({"model__ttt__target": "input_embeds"}, ["'input_embed'", "'hidden_states'", "'next_hidden'"]),
        ({"train__schedule__kind": "linear"}, ["'cosine'", "'wsd'"]),
        ({"prepare__source": {"kind": "web", "name": "x"}}, ["prepare.source.kind='web'", "'text', 'seqio', 'tfds'"]),
        ({"prepare__source": {"name": "x"}}, ["prepare.source=", "kind is not set", "'text' or 'seqio' or 'tfds'"]),
        ({"model__rope__scaling": {"factor": 2.0}}, ["model.rope.scaling=", "'llama3' or 'yarn'"]),
    ],
)
def test_wrong_choice_lists_all_choices(changes, choices):
    message = refusal(**changes)
    assert all(choice in message for choice in choices)


def test_a_value_with_a_line_break_still_gives_one_line():
    assert r"model.family='a\nb'" in refusal(model__family="a\nb")


@pytest.mark.parametrize("path", ["data", "model.d_ff", "model.ttt", "train.schedule.warmup_steps", "eval.documents"])
def test_missing_key_is_named(path):
    tree = default_config().to_dict()
    *sections, name = path.split(".")
    section = tree
    for part in sections:
        section = section[part]
    del section[name]
    with pytest.raises(UserError, match=rf"^{path.replace('.', '[.]')} is not set$"):
        resolve(tree)


def test_all_problems_are_reported_together():
    message = refusal(model__num_layers=0, trian=1, eval__document=1)
    assert len(message.split(" | ")) == 3


# --- refused: fields that contradict each other --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"model__ttt__chunk_tokens": 768}, ["model.ttt.chunk_tokens=768", "data.seq_len=1024", "use 256, 512, 1024"]),
        ({"model__ttt__chunk_tokens": 2048}, ["model.ttt.chunk_tokens=2048", "data.seq_len=1024", "1024"]),
        (
            {"eval__seq_len": 960, "eval__position_edges": (960,)},
            ["model.ttt.chunk_tokens=128", "eval.seq_len=960", "use"],
        ),
        ({"model__ttt__layers": (0, 4)}, ["model.ttt.layers=[0, 4]", "model.num_layers=4", "0 to 3"]),
        ({"model__ttt__layers": (99,)}, ["layer 99", "model.num_layers=4", "0 to 3"]),
        ({"model__ttt__layers": (0, 0)}, ["model.ttt.layers=[0, 0]", "increasing", "None"]),
        ({"model__ttt__layers": (2, 1)}, ["model.ttt.layers=[2, 1]", "increasing"]),
        ({"model__ttt__layers": ()}, ["model.ttt.layers=[]", "model.ttt to None"]),
        ({"model__num_kv_heads": 3}, ["model.num_kv_heads=3", "model.num_heads=4", "[1, 2, 4]"]),
        ({"model__num_kv_heads": 8}, ["model.num_kv_heads=8", "model.num_heads=4", "4]"]),
        ({"model__head_dim": 31}, ["model.head_dim=31", "even", "32"]),
        ({"model__attention": "banded"}, ['model.attention="banded"', "model.sliding_window"]),
        ({"model__rope__scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ["low_freq_factor=4.0", "high_freq_factor=4.0"]),
        ({"model__rope__scaling": LLAMA3 | {"low_freq_factor": 8.0}}, ["low_freq_factor=8.0", "must be below"]),
        ({"model__rope__scaling": YARN | {"beta_slow": 32.0}}, ["beta_slow=32.0", "beta_fast=32.0", "must be below"]),
        ({"model__rope__scaling": YARN | {"original_max_position": 6}}, ["original_max_position=6", "7 or more"]),
        (
            {"train__schedule__peak_learning_rate": 0.5, "train__optimizer__weight_decay": 2.0},
            ["peak_learning_rate=0.5", "weight_decay=2.0", "below 2,"],
        ),
        ({"train__microbatches": 3}, ["train.microbatches=3", "train.batch_rows=8", "[2, 4, 8]"]),
        ({"data__align_documents": 1000}, ["data.align_documents=1000", "data.seq_len=1024", "1024"]),
        ({"train__schedule__decay_steps": 9}, ["train.schedule.decay_steps=9", "cosine", "wsd"]),
        ({"train__num_steps": 20}, ["train.schedule.warmup_steps=50", "train.num_steps=20", "2"]),
        ({"eval__position_edges": (512, 256, 1024)}, ["eval.position_edges=[512, 256, 1024]", "eval.seq_len=1024"]),
        ({"eval__position_edges": (256, 256, 1024)}, ["eval.position_edges=[256, 256, 1024]", "increase"]),
        ({"eval__position_edges": (256,)}, ["eval.position_edges=[256]", "eval.seq_len=1024", "[512, 1024]"]),
        ({"eval__position_edges": ()}, ["eval.position_edges=[]", "eval.seq_len=1024"]),
        ({"model__ttt": None, "train__gate_rate": 0.5}, ["train.gate_rate=0.5", "model.ttt", "1.0"]),
        ({"eval__min_document_tokens": 1}, ["eval.min_document_tokens=1", "2"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_contradiction_names_both_values_and_a_way_out(changes, mentions):
    message = refusal(**changes)
    missing = [text for text in mentions if text not in message]
    assert not missing, message


@pytest.mark.parametrize(
    "fix",
    [
        {"train__num_steps": 100, "train__schedule__kind": "wsd", "train__schedule__decay_steps": 95},
        {"train__num_steps": 20},
    ],
)
def test_the_proposed_warmup_is_valid(fix):
    proposed = int(refusal(**fix).split("use warm-up ")[1].split()[0])
    resolve_with(**fix, train__schedule__warmup_steps=proposed)


def test_scaling_that_would_speed_positions_up_is_refused():
    for scaling in (YARN, LLAMA3):
        message = refusal(model__rope__scaling=scaling | {"factor": 0.5})
        assert message.startswith("model.rope.scaling.factor=0.5: ") and "1" in message


def test_the_largest_seed_is_one_of_its_own():
    assert resolve_with(train__seed=2**32 - 1).train.seed == 2**32 - 1


def test_a_stage_holds_to_the_same_rules():
    stages = [{"until_step": 1000, "overrides": {"model.ttt.eta": float("nan")}}]
    message = refusal(train__stages=stages)
    assert message.startswith("train.stages[0]: model.ttt.eta=nan: ")
    stages = [{"until_step": 1000, "overrides": {"model.rope.scaling": LLAMA3 | {"low_freq_factor": 9.0}}}]
    assert "low_freq_factor=9.0" in refusal(train__stages=stages)


def test_the_proposed_chunk_divides_every_row_it_has_to():
    rows = {"eval__seq_len": 960, "eval__position_edges": (960,)}
    proposed = refusal(**rows).split("; use ")[1].split(", ")
    for chunk in proposed:
        resolve_with(**rows, model__ttt__chunk_tokens=int(chunk))


# --- the two small aids --------------------------------------------------------------------------------------------


def test_did_you_mean():
    assert did_you_mean("thata", ["theta", "scaling"]) == "; did you mean 'theta'?"
    assert did_you_mean("zzz", ["theta", "scaling"]) == "; choose from scaling, theta"


@pytest.mark.parametrize(
    ("total", "wanted", "expected"),
    [(8192, 768, [512, 1024, 2048]), (1024, 4096, [256, 512, 1024]), (7, 3, [1, 7]), (1, 5, [1]), (36, 5, [4, 6])],
)
def test_nearest_divisors(total, wanted, expected):
    found = nearest_divisors(total, wanted, count=len(expected))
    assert found == expected
    assert all(total % divisor == 0 for divisor in found)
