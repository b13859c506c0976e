"""The shipped modelling file in transformers: full forwards against numpy loops, stock loading, loud failures."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.interop import plain
from tests.interop.cases import (
    CHUNK,
    LLAMA3,
    YARN,
    cache_name,
    export,
    make_model,
    make_params,
    make_ttt,
    random_tokens,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

# fp32 against fp64 over three layers and five chunks; logits are of order 10.
FP32 = {"rtol": 1e-4, "atol": 1e-4}


def load(folder, **options):
    options = {"trust_remote_code": True, "attn_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def run(model, tokens, **options):
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **options).logits.double().numpy()


MODELS = {
    "qwen3": make_model(),
    "qwen3 untied": make_model(tie_embeddings=False),
    "qwen3 hidden": make_model(ttt=make_ttt(target="hidden_states", eta=0.05)),
    "qwen3 next": make_model(ttt=make_ttt(target="next_hidden", eta=0.05)),
    "qwen3 window": make_model(sliding_window=5),
    "qwen3 clip": make_model(ttt=make_ttt(delta_clip=0.7)),
    "qwen3 spectral": make_model(ttt=make_ttt(delta_spectral=0.5)),
    "qwen3 rows": make_model(ttt=make_ttt(preserve_row_norm=True)),
    "llama": make_model("llama"),
    "llama untied window": make_model("llama", tie_embeddings=False, sliding_window=5),
    "llama dense window": make_model("llama", None, sliding_window=5),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_is_the_definition(tmp_path, name, attention):
    model = MODELS[name]
    params = make_params(model)
    export(model, tmp_path / "out", params)
    tokens = random_tokens(2, 5 * CHUNK + 2)  # five chunks and an open one
    expected = np.stack([plain.logits(model, params, row) for row in tokens])
    found = run(load(tmp_path / "out", attn_implementation=attention), tokens)
    np.testing.assert_allclose(found, expected, **FP32)
    if model.ttt is not None:  # the comparison means something only where the update moves the logits
        off = plain.logits(model, params, tokens[0], update=False)
        assert np.abs(off - expected[0])[CHUNK:].max() > 0.1
        np.testing.assert_allclose(off[:CHUNK], expected[0, :CHUNK])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_stock_loading_is_the_no_update_model(tmp_path, family):
    model = make_model(family, tie_embeddings=False)
    params = make_params(model)
    export(model, tmp_path / "out", params)
    stock = load(tmp_path / "out", trust_remote_code=False)
    assert type(stock).__module__.startswith("transformers.models.")
    tokens = random_tokens(1, 3 * CHUNK)
    expected = plain.logits(model, params, tokens[0], update=False)
    np.testing.assert_allclose(run(stock, tokens)[0], expected, **FP32)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_scaled_rope_reaches_the_rotary_tables(tmp_path, scaling):
    export(make_model(scaling=scaling), tmp_path / "out")
    rotary = load(tmp_path / "out").model.rotary_emb
    assert rotary.rope_type == scaling.kind
    assert rotary.config.rope_parameters["original_max_position_embeddings"] == 16
    unscaled = 100.0 ** -(np.arange(3) / 3)
    assert rotary.inv_freq[2] == pytest.approx(unscaled[2] / 4)  # factor 4 at the slow end


@pytest.mark.parametrize("name", ["qwen3", "qwen3 window", "llama", "llama untied window", "qwen3 rows"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_nothing(tmp_path, name, side):
    model = MODELS[name]
    export(model, tmp_path / "out")
    loaded = load(tmp_path / "out", attn_implementation="sdpa")
    lengths, width = (3 * CHUNK + 1, 2 * CHUNK, CHUNK - 1), 3 * CHUNK + 3
    tokens = random_tokens(len(lengths), width)
    column = np.arange(width)[None]
    count = np.array(lengths)[:, None]
    mask = (column >= width - count) if side == "left" else (column < count)
    together = run(loaded, tokens, attention_mask=torch.as_tensor(mask.astype(np.int64)))
    for row, kept in enumerate(mask):
        alone = run(loaded, tokens[row : row + 1, kept])[0]
        np.testing.assert_allclose(together[row, kept], alone, **FP32)


def test_gradient_checkpointing_recomputes_the_same(tmp_path):
    export(make_model(), tmp_path / "out")
    model = load(tmp_path / "out").train()
    tokens = torch.as_tensor(random_tokens(2, 3 * CHUNK))

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    usual = gradients()
    assert usual["model.layers.0.mlp.ttt_proj.weight"].abs().max() > 0
    renamed = hasattr(model, "activation_checkpointing_enable")  # since 5.x
    enable = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, usual[name], msg=name)


def test_half_precision_keeps_the_state_in_fp32(tmp_path):
    export(make_model(), tmp_path / "out", dtype="bfloat16")
    model = load(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    output = model(torch.as_tensor(random_tokens(2, 2 * CHUNK)), use_cache=True)
    assert output.logits.isfinite().all()
    states = output[cache_name()].fast_weights
    assert sorted(states) == [0, 2]
    assert {state.s_BDF.dtype for state in states.values()} == {torch.float32}


def test_saving_again_keeps_the_model(tmp_path):
    export(make_model(), tmp_path / "out")
    first = load(tmp_path / "out")
    first.save_pretrained(tmp_path / "again")
    tokens = random_tokens(1, 3 * CHUNK)
    second = load(tmp_path / "again")
    assert type(second).__name__ == "InPlaceTTTQwen3ForCausalLM"
    np.testing.assert_array_equal(run(second, tokens), run(first, tokens))


def test_base_model_and_fresh_initialisation(tmp_path):
    export(make_model(), tmp_path / "out")
    base = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    whole = load(tmp_path / "out", attn_implementation="sdpa")
    tokens = torch.as_tensor(random_tokens(1, 3 * CHUNK))
    with torch.no_grad():
        torch.testing.assert_close(base(tokens).last_hidden_state, whole.model(tokens).last_hidden_state)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    mlp = fresh.model.layers[2].mlp
    assert not mlp.ttt_conv.weight.any()
    target = mlp.ttt_proj.weight.detach()
    assert target.diagonal().all() and not (target - torch.diag(target.diagonal())).any()
    config.ttt_target = "next_hidden"  # without taps to be zero, the projection is
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert not fresh.model.layers[2].mlp.ttt_proj.weight.any()


# --- loud failures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(make_model(), folder)
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "DELETE"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttt_mode": "DELETE"}, "no ttt_mode"),
        ({"ttt_lr": "DELETE"}, "ttt_mode but no ttt_lr"),
        ({"ttt_mode": "false"}, r"ttt_mode='false' must be true or false \(no quotes\)"),
        ({"ttt_mode": 1}, "ttt_mode=1 must be true or false"),
        ({"ttt_lr": -1}, "ttt_lr=-1 must be a finite number, at least 0"),
        ({"ttt_lr": float("nan")}, "ttt_lr=nan must be"),
        ({"ttt_lr": float("inf")}, "ttt_lr=inf must be"),
        ({"ttt_lr": "3"}, "ttt_lr='3' must be"),
        ({"ttt_lr": True}, "ttt_lr=True must be"),
        ({"ttt_chunk": 32.5}, "ttt_chunk=32.5 must be a whole number of tokens, at least 1"),
        ({"ttt_chunk": 0}, "ttt_chunk=0 must be"),
        ({"ttt_chunk": True}, "ttt_chunk=True must be"),
        ({"ttt_layers": [0, 3]}, r"ttt_layers=\[0, 3\] must be increasing layer indices from 0 to 2"),
        ({"ttt_layers": [-1, 0]}, "must be increasing layer indices"),
        ({"ttt_layers": [0, 0, 2]}, "must be increasing layer indices"),
        ({"ttt_layers": [0, "2"]}, "must be increasing layer indices"),
        ({"ttt_layers": []}, "must be increasing layer indices"),
        ({"ttt_layers": 2}, "must be increasing layer indices"),
        ({"ttt_proj": False}, "ttt_proj=False must be true"),
        ({"ttt_target": "embeddings"}, "ttt_target='embeddings' must be one of input_embed, hidden_states"),
        ({"intttrain_delta_clip": 0.0}, "intttrain_delta_clip=0.0 must be a finite number above 0"),
        ({"intttrain_delta_spectral": "1"}, "intttrain_delta_spectral='1' must be"),
        ({"intttrain_preserve_row_norm": "yes"}, "intttrain_preserve_row_norm='yes' must be true or false"),
        ({"intttrain_update": {"kind": "forgets"}}, "intttrain_update.kind='forgets' must be one of sum"),
        ({"intttrain_update": {}}, "intttrain_update.kind=None must be one of sum"),
        ({"intttrain_update": {"kind": "sum", "r": 1}}, "'r': 1} must be a section of kind"),
        ({"intttrain_future": 1}, "intttrain_future, which this modelling file does not know"),
        ({"ttt_layers": [0]}, r"disagree: .*layers.2.mlp.ttt_conv.weight.* have no layer"),
        ({"ttt_layers": [0, 1, 2]}, r"disagree: .*layers.1.mlp.ttt_conv.weight.* are missing"),
    ],
)
def test_a_config_that_does_not_fit_fails_loudly(exported, tmp_path, changes, message):
    folder = tmp_path / "out"  # its name, so that all cases load one module
    shutil.copytree(exported, folder)
    edit_config(folder, **changes)
    for door in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        with pytest.raises(ValueError, match=message) as caught:
            door.from_pretrained(folder, trust_remote_code=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_mode_switched_off_is_the_stock_model(tmp_path, family):
    export(make_model(family), tmp_path / "out")
    stock = load(tmp_path / "out", trust_remote_code=False)
    tokens = torch.as_tensor(random_tokens(1, 3 * CHUNK))
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    asked = load(tmp_path / "out", ttt_mode=False)
    edit_config(tmp_path / "out", ttt_mode=False)
    for off in (asked, load(tmp_path / "out")):
        assert type(off).__name__.startswith("InPlaceTTT")
        np.testing.assert_array_equal(run(off, tokens), run(stock, tokens))
        assert off.generate(tokens, **options).tolist() == stock.generate(tokens, **options).tolist()


def test_packed_rows_and_prepared_masks_are_refused(tmp_path):
    export(make_model(), tmp_path / "out")
    model = load(tmp_path / "out")
    tokens = torch.as_tensor(random_tokens(1, 6))
    with pytest.raises(NotImplementedError, match="packed rows"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(NotImplementedError, match="2D attention_mask"):
        model(tokens, attention_mask=torch.zeros(1, 1, 6, 6))
