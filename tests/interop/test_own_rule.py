"""An update rule of somebody else's through the whole export: a subclass here, one in the modelling file, no more."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from intttrain.interop import export as export_module
from intttrain.interop import implemented
from intttrain.interop.importer import load_hf_folder
from tests.interop.cases import CHUNK, cache_name, export, make_model, make_params, make_ttt, random_tokens
from tests.plugins.conftest import MODULE, forget

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

TABLE = 'UPDATE_RULES = {"sum": UpdateRule}'
OWN = '''@dataclasses.dataclass(frozen=True)
class Forgets(UpdateRule):
    """Scales the state at every chunk."""

    retained: float = 0.8
    bounded: bool = True

    @property
    def retention(self) -> float:
        return self.retained


UPDATE_RULES = {"sum": UpdateRule, "forgets": Forgets}'''
LENGTH = 5 * CHUNK + 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose rule forgets, exported with a modelling file that knows the rule."""
    section = importlib.import_module(MODULE).ForgetsConfig(retained=0.6)
    text = implemented.MODELING_PATH.read_text()
    assert text.count(TABLE) == 1
    (tmp_path / "modeling.py").write_text(text.replace(TABLE, OWN))
    for module in (implemented, export_module):
        monkeypatch.setattr(module, "MODELING_PATH", tmp_path / "modeling.py")
    model = make_model(ttt=make_ttt(update=section, preserve_row_norm=True))
    export(model, tmp_path / "forgetful", make_params(model))
    yield model, tmp_path / "forgetful"
    forget()


def test_logits_of_several_chunks_equal_ours(folder):
    from tests.interop.test_decoder_parity import LOGITS, logits_of, make_decoder

    model, path = folder
    decoder, tokens = make_decoder(model, make_params(model)), random_tokens(2, LENGTH)
    padded = np.pad(tokens, ((0, 0), (0, CHUNK - 3)))  # ours takes whole chunks
    wanted = np.asarray(logits_of(decoder, padded))[:, :LENGTH]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(loaded(torch.as_tensor(tokens)).logits.numpy(), wanted, **LOGITS)
        cut, name = CHUNK + 1, cache_name()
        output = loaded(torch.as_tensor(tokens[:, :cut]), use_cache=True)
        for t in range(cut, LENGTH):
            output = loaded(torch.as_tensor(tokens[:, t : t + 1]), **{name: output[name]})
            np.testing.assert_allclose(output.logits[:, 0].numpy(), wanted[:, t], **LOGITS)
    keeps = make_decoder(make_model(ttt=make_ttt(preserve_row_norm=True)), make_params(model))
    apart = np.abs(np.asarray(logits_of(keeps, padded))[:, :LENGTH] - wanted).max(axis=(0, 2))
    assert apart[: 2 * CHUNK].max() < 1e-4 and apart[2 * CHUNK :].min() > 1e-3, "forgetting is seen in the third chunk"


def test_the_section_is_read_back(folder):
    model, path = folder
    config = json.loads((path / "config.json").read_text())
    assert config["intttrain_update"] == {"kind": "forgets", "retained": 0.6, "bounded": True}
    assert load_hf_folder(path)[0].ttt == model.ttt


def test_a_folder_is_refused_by_a_modelling_file_that_does_not_know_its_rule(folder):
    _, path = folder
    module = path / "modeling_intttrain.py"
    module.write_text(module.read_text().replace('"forgets": Forgets', '"forgot": Forgets'))
    unknown = r"intttrain_update.kind='forgets' must be one of sum, forgot"
    with pytest.raises(ValueError, match=unknown):
        transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
