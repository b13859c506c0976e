"""``config.json``: the literal keys, the way back, and refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest

from intttrain.config import RopeConfig
from intttrain.config.errors import UserError
from intttrain.interop.hf_config import make_hf_config, read_hf_config
from tests.interop.cases import LLAMA3, YARN, make_model, make_ttt


def written(model, **changes):
    choices = {"dtype": "bfloat16", "end_of_document": None} | changes
    return json.loads(json.dumps(make_hf_config(model, **choices)))


def trained(model):
    """What a checkpoint can tell: everything but the settings of training."""
    defaults = {"compute_dtype": "bfloat16", "attention": "auto", "remat": "full"}
    return dataclasses.replace(model, **defaults)


def test_literal_config_of_a_ttt_model():
    assert written(make_model(), end_of_document=49) == {
        "architectures": ["InPlaceTTTQwen3ForCausalLM"],
        "auto_map": {
            "AutoModel": "modeling_intttrain.InPlaceTTTQwen3Model",
            "AutoModelForCausalLM": "modeling_intttrain.InPlaceTTTQwen3ForCausalLM",
        },
        "model_type": "qwen3",
        "vocab_size": 50,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": 49,
        "pad_token_id": None,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 3,
        "layer_types": ["full_attention"] * 3,
        "max_position_embeddings": 32768,
        "rope_theta": 100.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "ttt_mode": True,
        "ttt_layers": [0, 2],
        "ttt_proj": True,
        "ttt_lr": 0.2,
        "ttt_chunk": 4,
        "ttt_target": "input_embed",
    }


def test_dense_models_are_stock():
    for family, stock in (("qwen3", "Qwen3ForCausalLM"), ("llama", "LlamaForCausalLM")):
        config = written(make_model(family, None))
        assert config["architectures"] == [stock]
        assert not [key for key in config if key.startswith(("ttt", "auto_map", "intttrain"))]


def test_scaling_and_window_keys():
    yarn = written(make_model(scaling=YARN, sliding_window=8))
    assert yarn["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0,
    }  # fmt: skip
    assert yarn["rope_parameters"] == yarn["rope_scaling"] | {"rope_theta": 100.0}
    assert yarn["max_position_embeddings"] == 64  # 4.x takes the factor from this / original
    assert (yarn["use_sliding_window"], yarn["sliding_window"], yarn["max_window_layers"]) == (True, 8, 0)
    assert yarn["layer_types"] == ["sliding_attention"] * 3
    llama = written(make_model("llama", None, LLAMA3, sliding_window=8), max_position_embeddings=256)
    assert (llama["sliding_window"], llama["ttt_mode"], llama["max_position_embeddings"]) == (8, False, 256)
    assert "auto_map" in llama  # stock Llama has no window
    assert llama["rope_scaling"] == {
        "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }  # fmt: skip


def test_the_default_rule_may_be_named():
    config = written(make_model()) | {"intttrain_update": {"kind": "sum"}}
    assert read_hf_config(config, "config.json") == trained(make_model())


def test_our_own_keys_only_where_they_matter():
    bounds = {"delta_clip": 0.5, "delta_spectral": 0.25, "preserve_row_norm": True}
    config = written(make_model(ttt=make_ttt(target="next_hidden", **bounds)))
    assert config["ttt_target"] == "next_hidden"
    assert {key: config[f"intttrain_{key}"] for key in bounds} == bounds


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["plain", "llama3", "yarn"])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize(
    "ttt",
    [None, make_ttt(target="hidden_states"), make_ttt(target="next_hidden", delta_clip=0.5, preserve_row_norm=True)],
    ids=["dense", "ttt", "bounds"],
)
def test_round_trip(family, scaling, window, ttt):
    model = make_model(family, ttt, scaling, sliding_window=window, tie_embeddings=False, norm_eps=1e-5)
    assert read_hf_config(written(model), "config.json") == trained(model)


def test_stock_configs_of_both_generations():
    stock = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072,
        "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    }  # fmt: skip
    old = read_hf_config(stock, "here")
    assert (old.head_dim, old.num_kv_heads, old.tie_embeddings, old.rope.theta) == (16, 4, False, 5e5)
    assert old.rope.scaling is not None and old.rope.scaling.factor == 8.0
    new = {key: value for key, value in stock.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert read_hf_config(new, "here").rope == RopeConfig(theta=5e5)
    qwen = new | {"model_type": "qwen3", "sliding_window": 4096, "use_sliding_window": False}
    assert (read_hf_config(qwen, "here").head_dim, read_hf_config(qwen, "here").sliding_window) == (128, None)


BROKEN = [
    ({"model_type": "qwen2"}, r"model_type='qwen2'.*did you mean 'qwen3'"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ({"vocab_size": -3}, "vocab_size"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale=0.7"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}}, "attention_factor=3.0"),
    ({"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": 1}, "mixes"),
    ({"ttt_lr": None}, "ttt_lr missing beside"),
    ({"ttt_mode": None}, "ttt_mode missing beside"),
    ({"ttt_layers": [0, 3]}, r"ttt_layers=\[0, 3\] must be increasing layer indices from 0 to 2"),
    ({"ttt_target": "input_embeds"}, "did you mean 'input_embed'"),
    ({"ttt_layers": [0, 2.5]}, r"ttt_layers=\[0, 2.5\] must be increasing layer indices"),
    ({"ttt_mode": "false"}, r"ttt_mode='false' must be true or false"),
    ({"ttt_lr": -1}, "ttt_lr=-1 must be a finite number, at least 0"),
    ({"ttt_lr": float("nan")}, "ttt_lr=nan must be"),
    ({"ttt_lr": "3"}, "ttt_lr='3' must be"),
    ({"ttt_chunk": 32.5}, "ttt_chunk=32.5 must be a whole number of tokens"),
    ({"ttt_proj": False}, "ttt_proj=False is not supported"),
    ({"ttt_proj": "false"}, "ttt_proj='false' is not supported"),
    ({"intttrain_delta_clip": -1.0}, "delta_clip"),
    ({"intttrain_update": {"kind": "summ"}}, "intttrain_update=.* has kind 'summ'; .* did you mean 'sum'"),
    ({"intttrain_update": ["sum"]}, "has kind None; it must be one of 'sum'"),
    ({"intttrain_update": {"kind": "sum", "retained": 1}}, "retained"),
    ({"intttrain_delta_klip": 1.0}, "did you mean 'intttrain_delta_clip'"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_refusals_name_the_file_and_the_value(change, message):
    with pytest.raises(UserError, match=message) as error:
        read_hf_config(written(make_model()) | change, "dir/config.json")
    assert str(error.value).startswith("dir/config.json")
    assert "\n" not in str(error.value)


def test_export_refuses_what_transformers_could_not_hold():
    with pytest.raises(UserError, match=r"d_model=20 is not a multiple of model.num_heads=6.*num_heads=2"):
        written(make_model("llama", num_heads=6))
    with pytest.raises(UserError, match=r"max_position_embeddings=100 contradicts .* is 64; use 64"):
        written(make_model(scaling=YARN), max_position_embeddings=100)
