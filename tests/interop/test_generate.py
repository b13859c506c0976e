"""Decoding with the cache: prefill and token by token equal one full forward, whatever the batch looks like."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from tests.interop.cases import CHUNK, cache_name, export, make_model, make_ttt, random_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

FP32 = {"rtol": 1e-4, "atol": 1e-4}
CACHE = cache_name()

MODELS = {
    "qwen3": make_model(),
    "qwen3 hidden": make_model(ttt=make_ttt(target="hidden_states", eta=0.05)),
    "qwen3 next": make_model(ttt=make_ttt(target="next_hidden", eta=0.05)),
    "qwen3 window": make_model(sliding_window=5),
    "qwen3 bounds": make_model(ttt=make_ttt(delta_clip=0.7, preserve_row_norm=True)),
    "llama window": make_model("llama", sliding_window=5),
}


@pytest.fixture(params=list(MODELS))
def model(request, tmp_path):
    return load(tmp_path, MODELS[request.param])


@pytest.fixture
def qwen3(tmp_path):
    return load(tmp_path, MODELS["qwen3"])


def load(tmp_path, config):
    export(config, tmp_path / "out")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()


def left_padded(lengths):
    width = max(lengths)
    tokens = random_tokens(len(lengths), width)
    mask = (np.arange(width)[None] >= width - np.array(lengths)[:, None]).astype(np.int64)
    return torch.as_tensor(tokens), torch.as_tensor(mask)


@torch.no_grad()
def full(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("prefill", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
@torch.no_grad()
def test_prefill_and_decode_equal_one_forward(model, prefill):
    tokens = torch.as_tensor(random_tokens(2, 3 * CHUNK + 2))
    expected = full(model, tokens)
    out = model(tokens[:, :prefill], use_cache=True)
    steps = [out.logits]
    for t in range(prefill, tokens.shape[1]):
        out = model(tokens[:, t : t + 1], **{CACHE: out[CACHE]}, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, **FP32)


def test_gradient_through_decoding_equals_that_of_one_forward(qwen3):
    """The buffers of the open chunk are written in place only where no gradient needs their old contents."""
    tokens = torch.as_tensor(random_tokens(1, 2 * CHUNK + 2))

    def gradients(logits):
        qwen3.zero_grad()
        logits.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in qwen3.named_parameters()}

    expected = gradients(qwen3(tokens, use_cache=False).logits)
    cache = transformers.DynamicCache(config=qwen3.config)
    steps = [qwen3(tokens[:, t : t + 1], **{CACHE: cache}).logits for t in range(tokens.shape[1])]
    for name, gradient in gradients(torch.cat(steps, dim=1)).items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("cuts", [(3, 4, 9), (5, 6, 7), (1, 12, 13)])
@pytest.mark.parametrize("name", [name for name in MODELS if "window" not in name])
@torch.no_grad()
def test_several_pieces_with_padding_on_both_sides(tmp_path, name, cuts):
    """A conversation: every call brings several tokens, and rows are padded differently in every call.

    Not with a sliding window: transformers counts its columns, padding in the middle included.
    """
    model = load(tmp_path, MODELS[name])
    rows = [random_tokens(1, 14, seed=row)[0] for row in range(2)]
    expected = [full(model, torch.as_tensor(row)[None])[0] for row in rows]
    cache, mask, start = transformers.DynamicCache(config=model.config), torch.zeros(2, 0, dtype=torch.long), 0
    for stop in (*cuts, 14):
        piece = stop - start
        tokens, real = torch.zeros(2, piece + 2, dtype=torch.long), torch.zeros(2, piece + 2, dtype=torch.long)
        for row, offset in ((0, 0), (1, 2)):  # row 0 padded on the right, row 1 on the left
            tokens[row, offset : offset + piece] = torch.as_tensor(rows[row][start:stop])
            real[row, offset : offset + piece] = 1
        mask = torch.cat([mask, real], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -(piece + 2) :]
        logits = model(tokens, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits
        for row in range(2):
            torch.testing.assert_close(logits[row][real[row] == 1], expected[row][start:stop], **FP32)
        start = stop


@pytest.mark.parametrize("lengths", [(2 * CHUNK + 1, CHUNK - 1), (CHUNK, 3 * CHUNK - 1), (1, 2)])
def test_generate_with_left_padding_equals_rows_alone(model, lengths):
    tokens, mask = left_padded(lengths)
    new = 2 * CHUNK + 1
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    for row, length in enumerate(lengths):
        prompt = tokens[row : row + 1, -length:]
        alone = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        assert together[row, -new:].tolist() == alone[0, -new:].tolist()
        step_by_step = prompt
        for _ in range(new):  # the update is on: each step is the argmax of a full forward
            step_by_step = torch.cat([step_by_step, full(model, step_by_step)[:, -1:].argmax(-1)], dim=1)
        assert alone.tolist() == step_by_step.tolist()


def test_the_update_changes_what_is_generated(qwen3):
    tokens = torch.as_tensor(random_tokens(1, 2 * CHUNK))
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    on = qwen3.generate(tokens, **options)
    stock = transformers.AutoModelForCausalLM.from_pretrained(qwen3.name_or_path).eval()
    assert on.tolist() != stock.generate(tokens, **options).tolist()


def test_beam_search_carries_the_state_along(qwen3):
    with torch.no_grad():
        qwen3.model.norm.weight.mul_(0.1)  # an undecided model, so that beams overtake each other
    tokens = torch.as_tensor(random_tokens(2, CHUNK + 1))
    out = qwen3.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4 * CHUNK, num_beams=4, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    for row, score in zip(out.sequences, out.sequences_scores, strict=True):
        log_p = full(qwen3, row[None])[0].log_softmax(-1)
        exact = sum(log_p[t, row[t + 1]] for t in range(CHUNK, len(row) - 1))
        assert score.item() == pytest.approx(exact.item(), abs=1e-3)


@torch.no_grad()
def test_caches(qwen3):
    tokens = torch.as_tensor(random_tokens(1, 2 * CHUNK + 3))
    prompt, rest = tokens[:, : CHUNK + 2], tokens[:, CHUNK + 2 :]
    shared = qwen3(prompt, use_cache=True)[CACHE]
    copied = copy.deepcopy(shared)  # a prompt cache used twice
    first = qwen3(rest, **{CACHE: shared}).logits
    torch.testing.assert_close(qwen3(rest, **{CACHE: copied}).logits, first)
    torch.testing.assert_close(first, full(qwen3, tokens)[:, CHUNK + 2 :], **FP32)
    shared.reset()  # starts a new document
    torch.testing.assert_close(qwen3(tokens, **{CACHE: shared}).logits, full(qwen3, tokens))
    repeated = qwen3(prompt, use_cache=True)[CACHE]
    repeated.batch_repeat_interleave(2)
    repeated.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(qwen3(rest, **{CACHE: repeated}).logits, first)


@torch.no_grad()
def test_caches_that_cannot_carry_a_state_are_refused(qwen3):
    tokens = torch.as_tensor(random_tokens(1, 6))
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 2, "pad_token_id": 0}
    with pytest.raises(NotImplementedError, match=r"prepared one|StaticCache is not supported"):
        qwen3.generate(tokens, cache_implementation="static", disable_compile=True, **options)
    cache = qwen3(tokens, use_cache=True)[CACHE]
    with pytest.raises(NotImplementedError, match="cannot be rolled back"):
        cache.crop(-1)
    for layer in cache.layers:  # behind the cache's back
        layer.crop(-1)
    with pytest.raises(NotImplementedError, match="holds 5 columns, but the fast weight of layer 0 has seen 6"):
        qwen3(tokens[:, -1:], **{CACHE: cache})
    stock = transformers.AutoModelForCausalLM.from_pretrained(qwen3.name_or_path).eval()
    with pytest.raises(ValueError, match="filled without fast weights"):
        qwen3(tokens[:, -1:], **{CACHE: stock(tokens, use_cache=True)[CACHE]})
