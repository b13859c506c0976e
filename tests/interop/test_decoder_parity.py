"""Our JAX decoder against the exported folder in transformers: logits and gradients, fp32, rows of several chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from intttrain.config.dotted import flatten
from intttrain.interop.importer import load_hf_folder
from intttrain.interop.names import list_tensors
from intttrain.model import Decoder
from tests.interop.cases import CHUNK, LLAMA3, YARN, export, make_model, make_params, make_ttt, random_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

# Two fp32 programs that add in different orders; logits are of order 10.
LOGITS = {"rtol": 0, "atol": 1e-4}
LENGTH = 6 * CHUNK

CASES = {
    "qwen3": make_model(),
    "qwen3 untied hidden": make_model(ttt=make_ttt(target="hidden_states", eta=0.05), tie_embeddings=False),
    "qwen3 next": make_model(ttt=make_ttt(target="next_hidden", eta=0.05)),
    "qwen3 window": make_model(sliding_window=5),
    "qwen3 yarn": make_model(scaling=YARN),
    "qwen3 bounds": make_model(ttt=make_ttt(delta_clip=0.7, preserve_row_norm=True)),
    "qwen3 dense": make_model(ttt=None),
    "llama": make_model("llama"),
    "llama untied llama3": make_model("llama", scaling=LLAMA3, tie_embeddings=False),
    "llama window yarn": make_model("llama", scaling=YARN, sliding_window=5),
    "llama dense": make_model("llama", None, tie_embeddings=False),
}


@pytest.fixture(params=list(CASES))
def pair(request, tmp_path):
    """Our decoder with random parameters, and the same model after export and loading by transformers."""
    model = CASES[request.param]
    params = make_params(model)
    export(model, tmp_path / "out", params)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    return make_decoder(model, params), loaded.eval()


def make_decoder(model, params):
    decoder = Decoder(model, rngs=nnx.Rngs(0))
    pure = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    shapes = {path: leaf.shape for path, leaf in flatten(pure).items()}
    assert shapes == {path: leaf.shape for path, leaf in flatten(params).items()}  # the tree that the table describes
    nnx.update(decoder, jax.tree.map(jnp.asarray, params))
    return decoder


def logits_of(decoder, tokens_BT):
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    hidden_BTD = decoder(tokens_BT, jnp.ones_like(tokens_BT), positions_BT).hidden_BTD
    return jnp.einsum("btd,vd->btv", hidden_BTD, decoder.output_weight())


def test_logits(pair):
    decoder, loaded = pair
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        theirs = loaded(torch.as_tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(decoder, tokens), theirs, **LOGITS)


def test_gradient_of_the_loss(pair):
    decoder, loaded = pair
    tokens = random_tokens(2, LENGTH)

    def loss_of(decoder):
        log_p = jax.nn.log_softmax(logits_of(decoder, tokens)[:, :-1], axis=-1)
        return -jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, 1:, None], axis=-1).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(decoder)
    ours = flatten(nnx.to_pure_dict(gradients))
    result = loaded(torch.as_tensor(tokens), labels=torch.as_tensor(tokens), use_cache=False)
    result.loss.backward()
    assert float(loss) == pytest.approx(result.loss.item(), abs=1e-5)
    theirs = dict(loaded.named_parameters())
    for tensor in list_tensors(decoder.config):
        expected = theirs[tensor.name].grad.numpy()
        scale = np.abs(expected).max()
        assert scale > 0, tensor.name
        # Gradients differ in size by orders of magnitude: the tolerance is relative to the largest of the tensor.
        difference = np.abs(tensor.export(ours[tensor.rule.path]) - expected).max() / scale
        assert difference < 1e-4, (tensor.name, difference)


def test_the_importer_returns_the_decoders_tree(tmp_path):
    model = CASES["qwen3 untied hidden"]
    export(model, tmp_path / "out")
    read_model, params = load_hf_folder(tmp_path / "out")
    tokens = random_tokens(1, LENGTH)
    expected = logits_of(make_decoder(model, make_params(model)), tokens)
    read_model = make_model(ttt=read_model.ttt, tie_embeddings=read_model.tie_embeddings)  # training settings back
    np.testing.assert_array_equal(logits_of(make_decoder(read_model, params), tokens), expected)
