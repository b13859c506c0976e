"""The typed configuration: every field, its unit and its rule, in one place.

A configuration file (``configs/*.py``) returns an ``ml_collections.ConfigDict`` that starts from
``default_config()``; the command line changes single values with ``--config.a.b=v``; ``resolve()`` turns the
result into the frozen dataclasses below and refuses anything incomplete, misspelt or inconsistent with a
``UserError``. Code receives only these dataclasses, so no reader needs a default of its own.

An optional feature is an optional section (``model.ttt = None`` is a plain Qwen3 or Llama).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Protocol, get_args

import ml_collections
import pydantic
from ml_collections import config_dict
from pydantic import Field
from pydantic.dataclasses import dataclass

from intttrain.config.dotted import flatten, unflatten
from intttrain.config.errors import UserError, did_you_mean, nearest_divisors
from intttrain.config.evaluation import EvalConfig
from intttrain.config.families import FamilyName
from intttrain.config.literals import (
    STRICT,
    AboveOne,
    Fraction,
    PositiveFloat,
    PositiveInt,
    ScalingFactor,
    Seed,
    Switch,
)
from intttrain.config.problems import explain_problem
from intttrain.config.registry import (
    EVAL_TASKS,
    OPTIMIZERS,
    SCHEDULES,
    SOURCES,
    UPDATE_RULES,
    Registry,
    SectionOf,
    hints_of,
    import_plugins,
)
from intttrain.config.training import STAGE_VALUES, AdamWConfig, CheckpointConfig, ScheduleConfig, TrainConfig
from intttrain.config.ttt import TTTConfig


@dataclass(frozen=True, config=STRICT)
class Llama3Scaling:
    """RoPE scaling of Llama 3.1 (long wavelengths divided by ``factor``, smooth in between)."""

    kind: Literal["llama3"]
    factor: ScalingFactor
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position: PositiveInt


@dataclass(frozen=True, config=STRICT)
class YarnScaling:
    """YaRN (arXiv 2309.00071): per-frequency interpolation and an attention temperature."""

    kind: Literal["yarn"]
    factor: ScalingFactor
    original_max_position: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0


@dataclass(frozen=True, config=STRICT)
class RopeConfig:
    """Rotary position embedding, rotating halves as Hugging Face does."""

    theta: AboveOne
    scaling: Annotated[Llama3Scaling | YarnScaling, Field(discriminator="kind")] | None = None


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """A decoder of one of the families in ``config/families.py``, which says what it has and how it is exported."""

    family: FamilyName
    vocab_size: PositiveInt
    d_model: PositiveInt
    d_ff: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    rope: RopeConfig
    ttt: TTTConfig | None
    tie_embeddings: Switch = True
    norm_eps: PositiveFloat = 1e-6
    initializer_range: PositiveFloat = 0.02
    sliding_window: PositiveInt | None = None  # a query sees this many tokens, itself included; None = all
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weight_gradient_dtype: Literal["float32", "bfloat16"] = "float32"  # in which they are summed over devices
    attention: Literal["auto", "dense", "banded", "splash"] = "auto"
    context_attention: Literal["auto", "all_to_all", "all_gather", "halo"] = "auto"  # over mesh.context
    remat: Literal["none", "full", "attention", "qkv", "dots", "offload"] = "full"
    loss_chunk_tokens: PositiveInt = 512  # positions whose logits exist at the same time


@dataclass(frozen=True, config=STRICT)
class TokenizerConfig:
    """How text becomes ids. ``byte`` needs no file: ids 0-255 are bytes, 256 ends a document."""

    kind: Literal["byte", "huggingface", "sentencepiece"]
    path: str | None = None  # tokenizer.json or *.model
    end_of_document: str | None = None  # the piece appended to every document (not for ``byte``)

    @property
    def loss_unit(self) -> str:
        """What a loss divided by ln 2 is, for reports."""
        return "bits per byte" if self.kind == "byte" else "bits per token"


class Source(Protocol):
    """What the section of every data source has, beside its own."""

    @property
    def kind(self) -> str:
        """The name under which it is registered."""

    def describe(self) -> str:
        """Returns what the manifest of a store calls it."""


@dataclass(frozen=True, config=STRICT)
class TextSource:
    """Files, or directories searched recursively for the patterns; one file is one document."""

    kind: Literal["text"]
    paths: tuple[str, ...]
    patterns: tuple[str, ...] = ("*.txt",)
    exclude: tuple[str, ...] = ()  # patterns matched against the path below its directory
    max_bytes: PositiveInt | None = None  # stop after this much text (documents in sorted order)

    def describe(self) -> str:
        """Returns what the manifest of a store calls it."""
        return f"text {', '.join(self.paths)}"


@dataclass(frozen=True, config=STRICT)
class SeqioSource:
    """A registered SeqIO task or mixture; its own vocabulary is replaced by ``prepare.tokenizer``."""

    kind: Literal["seqio"]
    name: str
    imports: tuple[str, ...]  # modules that register it
    split: str = "train"
    text_feature: str = "text"

    def describe(self) -> str:
        """Returns what the manifest of a store calls it."""
        return f"seqio {self.name}, split {self.split}"


@dataclass(frozen=True, config=STRICT)
class TfdsSource:
    """A TensorFlow Datasets builder already prepared below ``data_dir``."""

    kind: Literal["tfds"]
    name: str
    data_dir: str
    split: str = "train"
    text_feature: str = "text"

    def describe(self) -> str:
        """Returns what the manifest of a store calls it."""
        return f"tfds {self.name}, split {self.split}"


@dataclass(frozen=True, config=STRICT)
class PrepareConfig:
    """What ``intttrain prepare`` reads: text -> OUTPUT/train and OUTPUT/heldout token stores."""

    source: Annotated[Source, SectionOf(SOURCES)]
    tokenizer: TokenizerConfig
    heldout_fraction: Fraction = 0.05  # documents set apart, chosen by a hash of their name
    seed: Seed = 0


@dataclass(frozen=True, config=STRICT)
class MixtureItem:
    """One token store of the training mixture."""

    path: str
    weight: PositiveFloat = 1.0


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Rows for training and held-out evaluation."""

    train: tuple[MixtureItem, ...]
    heldout: str | None
    seq_len: PositiveInt  # T, tokens per row
    align_documents: PositiveInt = 1  # documents start at multiples of this (1 = packed without padding)
    seed: Seed = 0
    prefetch_rows: PositiveInt = 16  # rows read ahead on the host


@dataclass(frozen=True, config=STRICT)
class MeshConfig:
    """How devices are arranged: the product of all axes is their number (``layout/axes.py``, ``docs/sharding.md``)."""

    data: PositiveInt = 1  # whole copies of the parameters; the slices of a multi-slice job lie along it
    fsdp: PositiveInt | None = None  # pieces that parameters and optimizer are cut into; None = all devices left over
    context: PositiveInt | None = 1  # pieces of every row; None = all devices left over, beside a given fsdp
    tensor: PositiveInt = 1  # pieces of heads, feed-forward width and vocabulary
    slices: PositiveInt = 1  # TPU slices, joined by the data-center network; divides data


# The keys that a stage may set.
STAGE_KEYS = (
    *STAGE_VALUES,
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig) if field.name != "slices"),
)


@dataclass(frozen=True, config=STRICT)
class Config:
    """Everything a command may need; sections that a command does not use are still checked."""

    name: str
    model: ModelConfig
    data: DataConfig
    prepare: PrepareConfig
    train: TrainConfig
    eval: EvalConfig
    mesh: MeshConfig = MeshConfig()
    plugins: tuple[str, ...] = ()  # modules to import first, which register what is chosen by name (docs/plugins.md)


def default_config() -> ml_collections.ConfigDict:
    """Returns a complete, editable configuration that experiment files start from.

    Sections that every experiment has to choose (model shape, data paths) carry a small byte-level model.
    """
    small = Config(
        name="default",
        model=ModelConfig(
            family="qwen3", vocab_size=320, d_model=128, d_ff=384, num_layers=4, num_heads=4, num_kv_heads=2,
            head_dim=32, rope=RopeConfig(theta=1e4), ttt=TTTConfig(layers=(0,), chunk_tokens=128, eta=0.3),
        ),
        data=DataConfig(train=(), heldout=None, seq_len=1024),
        prepare=PrepareConfig(source=TextSource(kind="text", paths=()), tokenizer=TokenizerConfig(kind="byte")),
        train=TrainConfig(
            num_steps=1000, batch_rows=8,
            schedule=ScheduleConfig(kind="cosine", peak_learning_rate=3e-3, warmup_steps=50),
            optimizer=AdamWConfig(), checkpoint=CheckpointConfig(),
        ),
        eval=EvalConfig(seq_len=1024, documents=64, min_document_tokens=1024, position_edges=(256, 512, 1024)),
    )  # fmt: skip
    return _editable(small)


def _editable(section: Any) -> ml_collections.ConfigDict:
    """Returns a section as a ConfigDict in which optional scalars that are unset can still be overridden."""
    hints = hints_of(type(section))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            value = _editable(value)
        elif value is None:
            scalar = [kind for kind in (int, float, str) if kind in get_args(hints[field.name])]
            value = config_dict.placeholder(scalar[0]) if scalar else None
        values[field.name] = value
    return ml_collections.ConfigDict(values)


def default_ttt() -> ml_collections.ConfigDict:
    """Returns an editable ``model.ttt`` section for files that start from a dense model."""
    return default_config().model.ttt


def as_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested plain containers (JSON-safe: tuples become lists)."""
    return pydantic.TypeAdapter(Config).dump_python(config, mode="json")


def resolve(tree: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Returns the frozen, complete and consistent configuration.

    Raises:
      UserError: a key that does not exist or is missing, a value of the wrong type or out of range, or values
        that contradict each other. All single-field problems are reported in one line each, joined by " | ".
    """
    plain = tree.to_dict() if isinstance(tree, ml_collections.ConfigDict) else dict(tree)
    import_plugins(plain.get("plugins", ()))
    try:
        config = pydantic.TypeAdapter(Config).validate_python(plain)
    except pydantic.ValidationError as error:
        problems = [explain_problem(problem, Config) for problem in error.errors()]
        raise UserError(" | ".join(problems)) from None
    check_consistent(config)
    return config


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns the configuration with dotted keys changed. Raises ``UserError`` if it is no longer consistent."""
    flat = flatten(as_dict(config))
    for key in changes:
        if absent := [section for section in flat if key.startswith(f"{section}.")]:
            raise UserError(f"{key} cannot be set: {absent[0]} is {flat[absent[0]]}")
        flat = {name: value for name, value in flat.items() if not name.startswith(f"{key}.")}
    return resolve(unflatten(flat | dict(changes)))


def stage_configs(config: Config) -> tuple[Config, ...]:
    """Returns the configuration of every stage, in order; that of the run itself where there are no stages.

    Raises:
      UserError: a key that a stage cannot set, or a value that does not fit the others; names the stage.
    """
    configs = []
    for index, stage in enumerate(config.train.stages):
        where = f"train.stages[{index}]"
        for key in stage.overrides:
            if key not in STAGE_KEYS:
                raise UserError(f"{where}: a stage cannot set {key}{did_you_mean(key, STAGE_KEYS)}")
        try:
            configs.append(override(config, stage.overrides | {"train.stages": ()}))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return tuple(configs) or (config,)


def check_consistent(config: Config) -> None:
    """Checks the rules that involve more than one field. Raises ``UserError`` at the first one broken."""
    _check_model(config.model)
    if config.model.ttt is not None:
        _check_ttt(config, config.model.ttt)
    elif config.train.gate_rate < 1.0:
        raise UserError(
            f"train.gate_rate={config.train.gate_rate} needs model.ttt, which is None: no update can be left out; "
            "use 1.0"
        )
    _check_train(config)
    if config.train.stages:
        _check_stages(config)
    edges = config.eval.position_edges
    if list(edges) != sorted(set(edges)) or not edges or edges[-1] != config.eval.seq_len:
        raise UserError(
            f"eval.position_edges={list(edges)} must increase and end at eval.seq_len={config.eval.seq_len}; "
            f"use for example {[config.eval.seq_len // 2, config.eval.seq_len]}"
        )
    if config.eval.min_document_tokens < 2:
        raise UserError("eval.min_document_tokens=1 leaves no token to predict; use 2 or more")
    if config.eval.every_steps is not None and config.data.heldout is None:
        raise UserError(
            f"eval.every_steps={config.eval.every_steps} needs data.heldout, which is None; name the held-out token "
            "store, or set eval.every_steps to None"
        )
    if config.train.checkpoint.keep_best is not None and config.eval.every_steps is None:
        raise UserError(
            f"train.checkpoint.keep_best={config.train.checkpoint.keep_best} needs eval.every_steps, which is None: "
            f"nothing says which is best; use eval.every_steps={config.train.checkpoint.every_steps}, "
            "or set train.checkpoint.keep_best to None"
        )


def _check_model(model: ModelConfig) -> None:
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"use one of {nearest_divisors(model.num_heads, model.num_kv_heads)}"
        )
    if model.head_dim % 2:
        raise UserError(f"model.head_dim={model.head_dim} must be even for RoPE; use {model.head_dim + 1}")
    if model.attention == "banded" and model.sliding_window is None:
        raise UserError('model.attention="banded" needs model.sliding_window; set a window or use "auto"')
    _check_scaling(model.rope.scaling)


def _check_scaling(scaling: Llama3Scaling | YarnScaling | None) -> None:
    """Checks that slow and fast channels do not cross: the formulas would divide by 0 or swap them."""
    match scaling:
        case Llama3Scaling(low_freq_factor=low, high_freq_factor=high) if low >= high:
            raise UserError(
                f"model.rope.scaling.low_freq_factor={low} must be below high_freq_factor={high}; Llama 3.1 has 1.0 "
                "and 4.0"
            )
        case YarnScaling(beta_fast=fast, beta_slow=slow) if slow >= fast:
            raise UserError(
                f"model.rope.scaling.beta_slow={slow} must be below beta_fast={fast}; YaRN has 1.0 and 32.0"
            )
        case YarnScaling(beta_slow=slow, original_max_position=tokens) if tokens <= 2 * math.pi * slow:
            raise UserError(
                f"model.rope.scaling.original_max_position={tokens}: no channel turns beta_slow={slow} times in so few "
                f"tokens; use the context before scaling, {math.floor(2 * math.pi * slow) + 1} or more"
            )


def _check_ttt(config: Config, ttt: TTTConfig) -> None:
    last = config.model.num_layers - 1
    outside = [i for i in ttt.layers if i > last]
    if outside:
        raise UserError(
            f"model.ttt.layers={list(ttt.layers)}: layer {outside[0]} is outside the model "
            f"(model.num_layers={config.model.num_layers}); use indices 0 to {last}"
        )
    if not ttt.layers or list(ttt.layers) != sorted(set(ttt.layers)):
        raise UserError(
            f"model.ttt.layers={list(ttt.layers)} must be a non-empty increasing list without repeats; "
            "for a model without TTT set model.ttt to None"
        )
    common = math.gcd(config.data.seq_len, config.eval.seq_len)
    for name, rows in (("data.seq_len", config.data.seq_len), ("eval.seq_len", config.eval.seq_len)):
        if rows % ttt.chunk_tokens:
            choices = ", ".join(map(str, nearest_divisors(common, ttt.chunk_tokens)))
            raise UserError(f"model.ttt.chunk_tokens={ttt.chunk_tokens} does not divide {name}={rows}; use {choices}")


def _check_train(config: Config) -> None:
    train, data = config.train, config.data
    if train.batch_rows % train.microbatches:
        raise UserError(
            f"train.microbatches={train.microbatches} does not divide train.batch_rows={train.batch_rows}; "
            f"use one of {nearest_divisors(train.batch_rows, train.microbatches)}"
        )
    if data.seq_len % data.align_documents:
        raise UserError(
            f"data.align_documents={data.align_documents} does not divide data.seq_len={data.seq_len}; "
            f"use one of {nearest_divisors(data.seq_len, data.align_documents)}"
        )
    if config.mesh.fsdp is None and config.mesh.context is None:
        raise UserError(
            "mesh.fsdp=None and mesh.context=None both ask for all devices left over; give one of them a size, "
            "for example mesh.context=1"
        )
    if config.mesh.data % config.mesh.slices:
        raise UserError(
            f"mesh.slices={config.mesh.slices} does not divide mesh.data={config.mesh.data}, along which slices lie; "
            f"use mesh.data={config.mesh.slices * -(-config.mesh.data // config.mesh.slices)}"
        )
    if train.profile_steps and (len(train.profile_steps) != 2 or train.profile_steps[0] > train.profile_steps[1]):
        raise UserError(
            f"train.profile_steps={train.profile_steps} is not (FIRST, LAST); use for example "
            f"({train.profile_steps[0]}, {train.profile_steps[0] + 2}), or () for no trace"
        )
    schedule = train.schedule
    for registry, section in _registered(config):
        registry.check(section, config)
    if schedule.warmup_steps + schedule.decay_steps > train.num_steps:
        room = train.num_steps - schedule.decay_steps
        way_out = f"use warm-up {min(room, train.num_steps // 10)} or train longer" if room >= 0 else "train longer"
        raise UserError(
            f"train.schedule.warmup_steps={schedule.warmup_steps} + decay_steps={schedule.decay_steps} exceed "
            f"train.num_steps={train.num_steps}; {way_out}"
        )


def _registered(config: Config) -> Iterator[tuple[Registry[Any], Any]]:
    """Yields the sections that belong to registered choices, which may have rules of their own."""
    yield OPTIMIZERS, config.train.optimizer
    yield SCHEDULES, config.train.schedule
    yield SOURCES, config.prepare.source
    if config.model.ttt is not None:
        yield UPDATE_RULES, config.model.ttt.update
    yield EVAL_TASKS, config.eval.own


def _check_stages(config: Config) -> None:
    """Checks that stages follow each other to the end, and that rows of one length can be cut into shorter ones."""
    ends, num_steps = [stage.until_step for stage in config.train.stages], config.train.num_steps
    if ends != sorted(set(ends)) or ends[-1] != num_steps:
        raise UserError(
            f"train.stages have until_step={ends}, which must increase and end at train.num_steps={num_steps}; "
            f"use for example {[num_steps * stage // len(ends) for stage in range(1, len(ends) + 1)]}"
        )
    lengths = sorted({stage.data.seq_len for stage in stage_configs(config)})
    for short, long in itertools.pairwise(lengths):
        if long % short:
            raise UserError(
                f"train.stages have data.seq_len={short} and {long}: a longer row must hold whole rows of every "
                f"shorter length; use {long // short * short} or {-(-long // short) * short} instead of {long}"
            )
