"""SeqIO tasks and TensorFlow Datasets as sources of raw text. The only module that imports TensorFlow.

SeqIO trims examples to ``sequence_length`` at the end of a task and packs them later, in its feature converters, so
long documents are lost in either. Text is therefore read before: from the raw source where that has the feature,
else from the task's output with ``sequence_length=None``, which trims nothing.

Nothing is downloaded: TFDS builders are reconstructed from the files that an earlier preparation left.

Letters: N tokens of a document.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from intttrain.config import SeqioSource, TfdsSource
from intttrain.config.errors import UserError, did_you_mean
from intttrain.config.registry import SOURCES


def read_seqio(source: SeqioSource, report: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every example of a task, or of each task of a mixture by name, once.

    ``text_feature`` is looked up in this order:
      1. a string feature of the task's raw source (its preprocessors are then not run; a raw source of bare strings
         counts as a feature called "text");
      2. a string feature of the task's output, or ``<text_feature>_pretokenized``, which SeqIO's tokenising
         preprocessor keeps beside the ids;
      3. token ids of the task's output, decoded with the task's vocabulary up to the first end id.
    So name the output feature (for example "targets") to keep the cleaning and filtering of the preprocessors.
    A mixture's rates are not applied: give each task a store and a weight in ``data.train`` for that.

    Raises:
      UserError: SeqIO is not installed, a module cannot be imported, or the name, split or feature is unknown.
    """
    try:
        import seqio
        import tensorflow
    except ImportError as error:
        raise _missing_extra(error) from None
    _hide_accelerators(tensorflow)
    for module in source.imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"prepare.source.imports: {module!r} cannot be imported ({error}); check the module path"
            ) from None
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if source.name not in known:
        raise UserError(
            f"prepare.source.name={source.name!r} is not a SeqIO task or mixture registered by "
            f"{list(source.imports)}{did_you_mean(source.name, known) if known else '; nothing is registered'}"
        )
    provider = seqio.get_mixture_or_task(source.name)
    tasks = list(provider.tasks) if isinstance(provider, seqio.Mixture) else [provider]  # SeqIO sorts them by name
    if len(tasks) > 1:
        report(f"mixture {source.name}: reading its {len(tasks)} tasks once each; its rates are not applied")
    for task in tasks:
        if source.split not in task.splits:
            raise UserError(
                f"prepare.source.split={source.split!r} does not exist in SeqIO task {task.name}"
                f"{did_you_mean(source.split, task.splits)}"
            )
    return (pair for task in tasks for pair in _read_task(seqio, task, source))


def read_tfds(source: TfdsSource) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every example of a dataset that is already prepared below ``data_dir``.

    ``data_dir`` is either the directory that holds ``name`` or the version directory with ``dataset_info.json``.
    ``text_feature`` may name a nested feature as ``outer/inner``.

    Raises:
      UserError: TFDS is not installed, nothing is prepared there, or the split or feature is unknown.
    """
    try:
        import tensorflow
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise _missing_extra(error) from None
    _hide_accelerators(tensorflow)
    builder = _open_builder(tfds, source)
    try:
        dataset = builder.as_dataset(split=source.split, shuffle_files=False)
    except (ValueError, KeyError, AssertionError):
        raise UserError(
            f"prepare.source.split={source.split!r} does not exist in {builder.info.full_name}"
            f"{did_you_mean(source.split, builder.info.splits)}"
        ) from None
    spec = dataset.element_spec
    path = source.text_feature.split("/")
    for part in path:
        if not isinstance(spec, dict) or part not in spec:
            names = spec if isinstance(spec, dict) else ()
            raise UserError(
                f"prepare.source.text_feature={source.text_feature!r} does not exist in {builder.info.full_name}"
                f"{did_you_mean(part, names)}"
            )
        spec = spec[part]
    if not _is_text(spec):
        raise UserError(
            f"prepare.source.text_feature={source.text_feature!r} of {builder.info.full_name} is not text but {spec}"
        )
    prefix = f"{builder.info.full_name}/{source.split}"
    return _strings(dataset, path, prefix)


SOURCES.add("seqio", lambda source, counts, report: read_seqio(source, report), SeqioSource)
SOURCES.add("tfds", lambda source, counts, report: read_tfds(source), TfdsSource)


def _missing_extra(error: ImportError) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"prepare.source needs packages that cannot be imported ({reason}); run: pip install 'intttrain[tf]'"
    )


def _hide_accelerators(tensorflow: Any) -> None:
    """Keeps TensorFlow from taking the memory of a GPU that JAX may use; a no-op once TensorFlow has started."""
    try:
        tensorflow.config.set_visible_devices([], "GPU")
    except RuntimeError:
        return


def _is_text(spec: Any) -> bool:
    return getattr(spec, "shape", None) == () and getattr(spec, "dtype", None) == "string"


def _strings(dataset: Any, path: list[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Yields numbered strings of the feature at ``path`` (an empty path: the elements themselves)."""

    def pick(example: Any) -> Any:
        for part in path:
            example = example[part]
        return example

    for index, value in enumerate(dataset.map(pick).as_numpy_iterator()):
        name = f"{prefix}/{index:09d}"
        try:
            yield name, value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"prepare.source: example {name} is not UTF-8 text") from None


def _read_task(seqio: Any, task: Any, source: SeqioSource) -> Iterator[tuple[str, str]]:
    feature = source.text_feature
    prefix = f"{task.name}/{source.split}"
    raw = task.source.get_dataset(split=source.split, shuffle=False)
    raw_spec = raw.element_spec
    if isinstance(raw_spec, dict) and _is_text(raw_spec.get(feature)):
        return _strings(raw, [feature], prefix)
    if feature == "text" and _is_text(raw_spec):
        return _strings(raw, [], prefix)
    output = task.get_dataset(sequence_length=None, split=source.split, shuffle=False)
    for name in (feature, f"{feature}_pretokenized"):
        if _is_text(output.element_spec.get(name)):
            return _strings(output, [name], prefix)
    tokens = output.element_spec.get(feature)
    if feature in task.output_features and tokens is not None and tokens.dtype.is_integer and len(tokens.shape) == 1:
        return _decoded(output, task.output_features[feature].vocabulary, feature, prefix)
    raw_names = raw_spec if isinstance(raw_spec, dict) else ("text",) if _is_text(raw_spec) else ()
    names = {*raw_names, *output.element_spec}
    raise UserError(
        f"prepare.source.text_feature={feature!r} is neither text nor token ids in SeqIO task {task.name}"
        f"{did_you_mean(feature, names - {feature})}"
    )


def _decoded(dataset: Any, vocabulary: Any, feature: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields text decoded from token ids; SeqIO's own ``decode`` would spell out the end id in some vocabularies."""
    end = vocabulary.eos_id
    for index, example in enumerate(dataset.as_numpy_iterator()):
        ids_N = np.asarray(example[feature])
        ends = np.flatnonzero(ids_N == end) if end is not None else ids_N[:0]
        kept_N = ids_N[: ends[0]] if len(ends) else ids_N
        yield f"{prefix}/{index:09d}", vocabulary.decode(kept_N.tolist())


def _open_builder(tfds: Any, source: TfdsSource) -> Any:
    directory = Path(source.data_dir)
    if not directory.is_dir():
        raise UserError(f"prepare.source.data_dir={source.data_dir!r} is not a directory")
    if (directory / "dataset_info.json").is_file():
        builder = tfds.builder_from_directory(str(directory))
        if builder.name != source.name.split("/")[0].split(":")[0]:
            raise UserError(
                f"prepare.source.name={source.name!r} but data_dir={source.data_dir!r} holds {builder.name!r}; "
                f"use name={builder.name!r} or another data_dir"
            )
        return builder
    try:
        return tfds.core.read_only_builder.builder_from_files(source.name, data_dir=str(directory))
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        found = sorted({info.relative_to(directory).parts[0] for info in directory.rglob("dataset_info.json")})
        hint = did_you_mean(source.name, found) if found else "; nothing is prepared there"
        raise UserError(
            f"prepare.source.name={source.name!r} is not prepared below data_dir={source.data_dir!r}{hint}"
        ) from None
