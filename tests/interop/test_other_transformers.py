"""Releases of transformers that call the exported model in another way: right, or an error that says so.

Each case changes what stands between the stock classes and ours, as a later release may.
"""

from __future__ import annotations

from inspect import signature

import pytest

from tests.interop.cases import CHUNK, cache_name, export, make_model, random_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

FP32 = {"rtol": 1e-4, "atol": 1e-4}
CACHE = cache_name()
PROMPT = 2 * CHUNK + 1
UNKNOWN = "calls this model in a way that modeling_intttrain.py does not know"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "out"
    export(make_model(), folder)
    return folder


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture
def qwen3(folder):
    return load(folder)


@pytest.fixture
def tokens():
    return torch.as_tensor(random_tokens(2, 4 * CHUNK))


@torch.no_grad()
def decode(model, tokens, **options):
    """Returns the logits of a prompt of several chunks, then token by token."""
    out = model(tokens[:, :PROMPT], use_cache=True, **options)
    steps = [out.logits]
    for t in range(PROMPT, tokens.shape[1]):
        out = model(tokens[:, t : t + 1], use_cache=True, **{CACHE: out[CACHE]})
        steps.append(out.logits)
    return torch.cat(steps, dim=1)


class Box:
    """Hides a cache from anybody who does not know the box."""

    def __init__(self, cache):
        self.content = cache


def change_layer_call(monkeypatch, model, before, after=lambda kwargs: kwargs):
    """Changes keyword arguments on their way from the stock decoder to our layers, and from these to the stock ones."""
    ours, stock = type(model.model.layers[0]), transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer
    for layer, change in ((ours, before), (stock, after)):
        monkeypatch.setattr(layer, "forward", changed(layer.forward, change))


def changed(forward, change):
    return lambda self, *args, **kwargs: forward(self, *args, **change(dict(kwargs)))


def renamed(old, new):
    return lambda kwargs: {new if name == old else name: value for name, value in kwargs.items()}


def boxed(kwargs):
    cache = kwargs.pop(CACHE)
    return kwargs | {"box": Box(cache)}


def unboxed(kwargs):
    box = kwargs.pop("box")
    return kwargs | {CACHE: box.content}


def test_the_cache_under_another_name(qwen3, tokens, monkeypatch):
    with torch.no_grad():
        expected = qwen3(tokens, use_cache=False).logits
    change_layer_call(monkeypatch, qwen3, renamed(CACHE, "memory"), renamed("memory", CACHE))
    torch.testing.assert_close(decode(qwen3, tokens), expected, **FP32)


@pytest.mark.parametrize("given", [False, True])
def test_a_cache_that_only_the_attention_gets(qwen3, tokens, monkeypatch, given):
    change_layer_call(monkeypatch, qwen3, boxed, unboxed)
    options = {CACHE: transformers.DynamicCache(config=qwen3.config)} if given else {}
    with pytest.raises(RuntimeError, match=f"did not reach its fast weight: .*{transformers.__version__} {UNKNOWN}"):
        decode(qwen3, tokens, **options)


def test_another_cache_than_the_attentions(qwen3, tokens, monkeypatch):
    other = transformers.DynamicCache(config=qwen3.config)
    change_layer_call(
        monkeypatch, qwen3, lambda kwargs: boxed(kwargs) | {CACHE: other},
        lambda kwargs: unboxed({name: value for name, value in kwargs.items() if name != CACHE}),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=f"layer 0 has 0 columns of keys for {PROMPT} tokens: .*{UNKNOWN}"):
        decode(qwen3, tokens)


def test_a_cache_that_no_output_shows(qwen3, tokens, monkeypatch):
    stock = transformers.Qwen3Model.forward

    def hiding(self, *args, **kwargs):
        out = stock(self, *args, **kwargs)
        return type(out)(last_hidden_state=out.last_hidden_state)

    hiding.__wrapped__ = stock  # its signature is the same
    monkeypatch.setattr(transformers.Qwen3Model, "forward", hiding)
    with pytest.raises(RuntimeError, match="use_cache=True gave no cache"):
        decode(qwen3, tokens)


def test_earlier_tokens_without_their_cache(qwen3, tokens):
    with pytest.raises(ValueError, match="attention_mask has 5 columns for 0 in the cache and 1 in this call"):
        qwen3(tokens[:, :1], attention_mask=torch.ones(2, 5), use_cache=False)


def test_a_layer_that_leaves_out_its_mlp(qwen3, tokens, monkeypatch):
    stock = transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer
    monkeypatch.setattr(stock, "forward", lambda self, hidden_states, **kwargs: hidden_states)
    with pytest.raises(RuntimeError, match=rf"fast weights ran in layers \[\] instead of \[0, 2\]: .*{UNKNOWN}"):
        qwen3(tokens, use_cache=False)


def test_a_decoder_that_passes_on_what_it_knows_only(qwen3, tokens, monkeypatch):
    change_layer_call(monkeypatch, qwen3, lambda kwargs: {k: v for k, v in kwargs.items() if k != "ttt_call"})
    with pytest.raises(RuntimeError, match="got nothing from InPlaceTTT"):
        qwen3(tokens)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "inputs_embeds", "use_cache"])
def test_an_argument_that_was_renamed(folder, monkeypatch, name):
    stock = transformers.Qwen3Model.forward
    parameters = [p.replace(name="new") if p.name == name else p for p in signature(stock).parameters.values()]

    def forward(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    forward.__signature__ = signature(stock).replace(parameters=parameters)
    monkeypatch.setattr(transformers.Qwen3Model, "forward", forward)
    with pytest.raises(RuntimeError, match=f"the stock decoder takes no {name}: .*{UNKNOWN}"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
        lambda layer: layer.batch_repeat_interleave(2),
    ],
)
@torch.no_grad()
def test_rows_that_moved_without_their_fast_weights(qwen3, tokens, change):
    """As a beam search does that reorders its cache by a method of another name."""
    cache = qwen3(tokens[:, :PROMPT], use_cache=True)[CACHE]
    for layer in cache.layers:
        change(layer)
    rows = len(cache.layers[0].keys)
    with pytest.raises(NotImplementedError, match="cache of layer 0 was changed and its fast weight was not"):
        qwen3(tokens[:1, PROMPT : PROMPT + 1].expand(rows, 1), **{CACHE: cache})


def test_decoding_without_a_cache(qwen3, tokens):
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert qwen3.generate(tokens, use_cache=False, **options).tolist() == qwen3.generate(tokens, **options).tolist()


def test_assisted_decoding_is_refused(qwen3, tokens):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    with pytest.raises((NotImplementedError, ValueError), match="cannot be rolled back|requires a cache that can be"):
        qwen3.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), prompt_lookup_num_tokens=2, **options)
