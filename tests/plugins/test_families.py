"""A Hugging Face family from outside the package: trained, exported, loaded by transformers, and read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.config.registry import FAMILIES, import_plugins
from intttrain.interop.export import modeling_text
from intttrain.interop.importer import load_hf_folder
from tests.app.small import World, done
from tests.interop.cases import CHUNK, export, make_model, make_params, random_tokens
from tests.plugins.conftest import MODULE, PLUGINS, forget

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

from tests.interop import test_decoder_parity as parity  # noqa: E402  (needs torch)


@pytest.fixture(autouse=True)
def _registered() -> None:
    """Every test may be the only one, and any may forget."""
    import_plugins((MODULE,))


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.as_tensor(tokens)).logits.numpy()


def test_a_trained_run_is_exported(world: World, tmp_path: Path) -> None:
    run = f"--workdir={tmp_path / 'run'}"
    done("train", world.config, PLUGINS, "--config.model.family=mistral", run, "--stop_at_step=1")
    forget()  # what is stored with the run names the module
    done("export", run, f"--output={tmp_path / 'hf'}", "--dtype=float32")
    tokens = random_tokens(1, 32)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(read).__name__ == "InPlaceTTTMistralForCausalLM" and isinstance(read, transformers.MistralForCausalLM)
    assert logits_of(read, tokens).shape == (1, 32, 257)
    assert load_hf_folder(tmp_path / "hf")[0].family == "mistral"


def test_fast_weights_of_an_exported_folder_are_ours(tmp_path: Path) -> None:
    model, tokens = make_model("mistral", sliding_window=5), random_tokens(2, 6 * CHUNK)
    export(model, tmp_path / "hf")
    ours = parity.logits_of(parity.make_decoder(model, make_params(model)), tokens)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    np.testing.assert_allclose(ours, logits_of(read, tokens), **parity.LOGITS)
    off = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert np.abs(ours - logits_of(off, tokens)).max() > 0.1


@pytest.mark.parametrize("window", [None, 5])
def test_a_stock_model_is_read_and_written(tmp_path: Path, window: int | None) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.MistralConfig(
        vocab_size=50, num_key_value_heads=2, head_dim=6, initializer_range=0.2, sliding_window=window, **sizes
    )
    stock = transformers.MistralForCausalLM(config)
    stock.save_pretrained(tmp_path / "stock")
    model, params = load_hf_folder(tmp_path / "stock")
    assert (model.family, model.sliding_window, model.ttt) == ("mistral", window, None)
    tokens = random_tokens(2, 6 * CHUNK)
    ours = dataclasses.replace(model, compute_dtype="float32", attention="dense", remat="none")
    theirs = logits_of(stock, tokens)
    np.testing.assert_allclose(parity.logits_of(parity.make_decoder(ours, params), tokens), theirs, **parity.LOGITS)
    result = export(model, tmp_path / "again", params)
    assert "modeling_intttrain.py" not in result.files
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (type(again), again.config.sliding_window) == (transformers.MistralForCausalLM, window)
    np.testing.assert_array_equal(logits_of(again, tokens), theirs)


def test_the_modelling_file_defines_what_is_shipped_and_learns_the_rest() -> None:
    shipped = modeling_text("qwen3")
    assert modeling_text("mistral") == shipped + 'define_classes("Mistral", knows_window=True)\n'
    assert all(
        modeling_text(name) == shipped for name, entry in FAMILIES.entries().items() if "intttrain" in entry.home
    )


def test_a_family_that_nobody_registered() -> None:
    with pytest.raises(UserError, match="there is no family 'mistal'; .* did you mean 'mistral'"):
        FAMILIES["mistal"]
