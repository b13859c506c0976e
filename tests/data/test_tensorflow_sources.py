"""SeqIO and TFDS sources, on data that the tests make themselves."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from intttrain.config import PrepareConfig, SeqioSource, TfdsSource, TokenizerConfig
from intttrain.config.errors import UserError
from intttrain.data import TokenStore, make_tokenizer, prepare
from intttrain.data.tensorflow_sources import read_seqio, read_tfds
from tests.data.plain import one_line

# TensorFlow and its friends warn about themselves while they are imported and used.
pytestmark = [pytest.mark.tf, pytest.mark.filterwarnings("ignore")]

TEXTS = ["kurz", "long " * 2000, "größer 🎉", "four\nlines\n\n"]

REGISTER = """
import functools
import seqio
import tensorflow as tf

TEXTS = {texts!r}


class MarkedVocabulary(seqio.ByteVocabulary):
    # Shows in the text that it decoded it, and whether the end id came along.
    def _decode(self, ids):
        return super()._decode(ids) + ("|with end" if self.eos_id in ids else "|decoded")


FEATURE = seqio.Feature(MarkedVocabulary(), add_eos=True, required=False)


def from_texts(split, shuffle_files, texts=TEXTS):
    return tf.data.Dataset.from_tensor_slices({{"text": texts}})


def bare(split, shuffle_files):
    return tf.data.Dataset.from_tensor_slices(TEXTS)


def numbers(split, shuffle_files):
    return tf.data.Dataset.from_tensor_slices({{"targets": [[5, 6, 1], [7, 8, 1]], "label": [0, 1]}})


def source(function, splits=("train", "validation")):
    return seqio.FunctionDataSource(function, splits=splits)


def add(name, data, preprocessors):
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(name, source=data, preprocessors=preprocessors, output_features={{"targets": FEATURE}})


rekey = functools.partial(seqio.preprocessors.rekey, key_map={{"targets": "text"}})
upper = lambda ds: ds.map(lambda x: {{"targets": tf.strings.upper(x["targets"])}})
tokenize_only = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
steps = [rekey, upper, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
add("it_plain", source(from_texts), steps)
add("it_other", source(functools.partial(from_texts, texts=["other"])), steps)
add("it_ids_only", source(from_texts), [rekey, tokenize_only, seqio.preprocessors.append_eos])
add("it_bare", source(bare), [lambda ds: ds.map(lambda x: {{"targets": x}}), seqio.preprocessors.tokenize])
add("it_numbers", source(numbers), [])
seqio.MixtureRegistry.remove("it_mixture")
seqio.MixtureRegistry.add("it_mixture", [("it_plain", 1.0), ("it_other", 100.0)])
"""


@pytest.fixture
def registered(tmp_path, monkeypatch):
    pytest.importorskip("seqio")
    (tmp_path / "it_register.py").write_text(REGISTER.format(texts=TEXTS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "it_register", raising=False)


def seqio_source(name="it_plain", **changes):
    return SeqioSource(**{"kind": "seqio", "name": name, "imports": ("it_register",), **changes})


def read(source):
    return list(read_seqio(source, lambda line: None))


def test_raw_text_is_untouched_and_untrimmed(registered):
    pairs = read(seqio_source())
    assert [text for _, text in pairs] == TEXTS
    assert [name for name, _ in pairs] == [f"it_plain/train/{i:09d}" for i in range(4)]


def test_an_output_feature_is_read_before_it_was_tokenised(registered):
    assert [text for _, text in read(seqio_source(text_feature="targets"))] == [
        "KURZ", "LONG " * 2000, "GRößER 🎉", "FOUR\nLINES\n\n",
    ]  # fmt: skip


def test_token_ids_are_decoded_whole(registered):
    assert [text for _, text in read(seqio_source("it_ids_only", text_feature="targets"))] == [
        text + "|decoded" for text in TEXTS
    ]


def test_tokenised_sources(registered):
    # ByteVocabulary: id 3 is byte 0, id 1 ends the sequence.
    texts = [text for _, text in read(seqio_source("it_numbers", text_feature="targets"))]
    assert texts == ["\x02\x03|decoded", "\x04\x05|decoded"]


def test_a_source_of_bare_strings(registered):
    assert [text for _, text in read(seqio_source("it_bare"))] == TEXTS


def test_a_mixture_is_its_tasks_once_each(registered):
    lines = []
    pairs = list(read_seqio(seqio_source("it_mixture"), lines.append))
    assert [text for _, text in pairs] == ["other", *TEXTS]
    assert len({name for name, _ in pairs}) == 5
    assert len(lines) == 1 and "rates are not applied" in lines[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "it_plian"}, "did you mean 'it_plain'?"),
        ({"imports": ("no_such_module_x",)}, "'no_such_module_x' cannot be imported"),
        ({"split": "validatoin"}, "did you mean 'validation'?"),
        ({"text_feature": "target"}, "did you mean 'targets'?"),
        ({"name": "it_numbers", "text_feature": "label"}, "neither text nor token ids"),
    ],
)
def test_seqio_mistakes(registered, changes, said):
    with pytest.raises(UserError) as error:
        read(seqio_source(**changes))
    assert said in one_line(error)


def test_prepare_from_seqio(registered, tmp_path):
    config = PrepareConfig(source=seqio_source(), tokenizer=TokenizerConfig(kind="byte"), heldout_fraction=0)
    result = prepare(config, tmp_path / "out", lambda line: None)
    store = TokenStore.open(result.train)
    assert [make_tokenizer(config.tokenizer).decode(store.document(i)) for i in range(4)] == TEXTS
    assert store.manifest.source == "seqio it_plain, split train"


# --- TFDS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        """Four texts."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
            features = {"text": text, "meta": {"title": text}, "n": number}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(TEXTS):
                yield i, {"text": text, "meta": {"title": f"title {i}"}, "n": i}

    builder = TinyTexts(data_dir=str(root))
    config = tfds.download.DownloadConfig(num_shards=4)  # several files, so that a shuffled reading would show
    builder.download_and_prepare(file_format="tfrecord", download_config=config)
    return root


def tfds_source(data_dir, **changes):
    return TfdsSource(**{"kind": "tfds", "name": "tiny_texts", "data_dir": str(data_dir), **changes})


@pytest.mark.parametrize("below", ["", "tiny_texts/1.0.0"])
def test_tfds_texts(tfds_dir, below):
    pairs = list(read_tfds(tfds_source(tfds_dir / below)))
    assert sorted(text for _, text in pairs) == sorted(TEXTS)
    assert all(pairs == list(read_tfds(tfds_source(tfds_dir / below))) for _ in range(3))
    assert pairs[0][0] == "tiny_texts/1.0.0/train/000000000"


def test_tfds_names_and_nested_features(tfds_dir):
    pairs = list(
        read_tfds(tfds_source(tfds_dir, name="tiny_texts:1.0.0", text_feature="meta/title", split="test[:50%]"))
    )
    assert len(pairs) == 2 and all(text.startswith("title ") for _, text in pairs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "tiny_text"}, "did you mean 'tiny_texts'?"),
        ({"split": "tarin"}, "did you mean 'train'?"),
        ({"text_feature": "texts"}, "did you mean 'text'?"),
        ({"text_feature": "meta/titel"}, "did you mean 'title'?"),
        ({"text_feature": "text/deeper"}, "does not exist"),
        ({"text_feature": "n"}, "is not text"),
        ({"data_dir": "/no/such/place"}, "is not a directory"),
    ],
)
def test_tfds_mistakes(tfds_dir, changes, said):
    with pytest.raises(UserError) as error:
        read_tfds(tfds_source(**{"data_dir": tfds_dir, **changes}))
    assert said in one_line(error)


def test_tfds_wrong_name_for_a_version_directory(tfds_dir):
    with pytest.raises(UserError, match="holds 'tiny_texts'"):
        read_tfds(tfds_source(tfds_dir / "tiny_texts" / "1.0.0", name="other"))


@pytest.mark.parametrize("missing", ["seqio", "tensorflow_datasets", "tensorflow"])
def test_a_missing_extra(monkeypatch, missing, tmp_path):
    for name in ("seqio", "tensorflow_datasets", "tensorflow") if missing == "tensorflow" else (missing,):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as error:
        if missing == "seqio":
            read(seqio_source())
        else:
            list(read_tfds(tfds_source(tmp_path)))
    assert "pip install 'intttrain[tf]'" in one_line(error)
