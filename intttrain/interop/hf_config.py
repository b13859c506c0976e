"""``ModelConfig`` <-> the dictionary in a Hugging Face ``config.json``.

Written so that transformers 4.57 and newer 5.x releases both read it: 4.x reads ``rope_theta`` and
``rope_scaling``, 5.x ``rope_parameters``; 4.x reads ``torch_dtype``, 5.x ``dtype``. Fields that only matter while
training (``eta_warmup_steps``, remat, dtypes, implementations) are not part of a checkpoint and come back as defaults.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from intttrain.config import Llama3Scaling, ModelConfig, RopeConfig, TTTConfig, YarnScaling
from intttrain.config.errors import UserError, did_you_mean
from intttrain.config.registry import FAMILIES, TARGETS, UPDATE_RULES
from intttrain.config.ttt import BOUNDS
from intttrain.interop.implemented import MODELING_FILE, check_implemented

DEFAULT_MAX_POSITION = 32768  # nothing is computed from it without RoPE scaling; some tools read it as a length limit

TTT_KEYS = ("ttt_mode", "ttt_layers", "ttt_proj", "ttt_lr", "ttt_chunk", "ttt_target")
# Ours, beside the release's; written only where they differ from off, and from the default rule.
_BOUND_KEYS = {f"intttrain_{field}": field for field in BOUNDS}
_UPDATE_KEY = "intttrain_update"

Json = dict[str, Any]


def needs_modeling_file(model: ModelConfig) -> bool:
    """Whether stock transformers alone cannot run ``model`` exactly."""
    return model.ttt is not None or (model.sliding_window is not None and FAMILIES[model.family].window == "none")


def make_hf_config(
    model: ModelConfig,
    *,
    dtype: Literal["float32", "bfloat16"],
    end_of_document: int | None,
    max_position_embeddings: int | None = None,
) -> Json:
    """Returns the contents of ``config.json``.

    Args:
      model: the architecture.
      dtype: of the tensors beside it.
      end_of_document: token id, or ``None`` when the vocabulary has none.
      max_position_embeddings: advertised context length in tokens; ``None`` derives it from the RoPE scaling.

    Raises:
      UserError: the stock configuration class of this family cannot hold the shape.
    """
    family = FAMILIES[model.family]
    if family.square_heads and model.d_model % model.num_heads:
        raise UserError(
            f"model.d_model={model.d_model} is not a multiple of model.num_heads={model.num_heads}, which "
            f"transformers requires of family {model.family!r}; export it as family 'qwen3' or choose "
            f"model.num_heads={math.gcd(model.d_model, model.num_heads)}"
        )
    config: Json = {
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
        **_window_keys(model),
        **_rope_keys(model.rope, max_position_embeddings),
    }
    stem = family.class_stem
    config["architectures"] = [f"{stem}ForCausalLM"]
    if needs_modeling_file(model):
        module = MODELING_FILE.removesuffix(".py")
        config["architectures"] = [f"InPlaceTTT{stem}ForCausalLM"]
        config["auto_map"] = {
            "AutoModel": f"{module}.InPlaceTTT{stem}Model",
            "AutoModelForCausalLM": f"{module}.InPlaceTTT{stem}ForCausalLM",
        }
        config |= {"ttt_mode": False} if model.ttt is None else _ttt_keys(model.ttt)
    return config


def read_hf_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Returns the architecture that ``config.json`` describes.

    Args:
      config: the parsed file; of a stock model, the release's, or our own export.
      where: shown in errors, usually the file's path.

    Raises:
      UserError: an unknown ``model_type``, a missing key, or an option that this project does not implement.
    """
    name = _need(config, "model_type", where)
    if name not in (known := FAMILIES.names()):
        raise UserError(f"{where}: model_type={name!r} is not supported{did_you_mean(str(name), known)}")
    _refuse_unsupported(config, where)
    try:
        return _model_config(name, config, where)
    except (TypeError, ValueError) as error:  # a value of the wrong type or out of range
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def _model_config(name: Any, config: Mapping[str, Any], where: str) -> ModelConfig:
    heads, width = int(_need(config, "num_attention_heads", where)), int(_need(config, "hidden_size", where))
    head_dim = _value(config, "head_dim", FAMILIES[name].default_head_dim or width // heads)
    return ModelConfig(
        family=name,
        vocab_size=int(_need(config, "vocab_size", where)),
        d_model=width,
        d_ff=int(_need(config, "intermediate_size", where)),
        num_layers=int(_need(config, "num_hidden_layers", where)),
        num_heads=heads,
        num_kv_heads=int(_value(config, "num_key_value_heads", heads)),
        head_dim=int(head_dim),
        rope=_read_rope(config, where),
        ttt=_read_ttt(config, where),
        tie_embeddings=bool(_value(config, "tie_word_embeddings", False)),
        norm_eps=float(_value(config, "rms_norm_eps", 1e-6)),
        initializer_range=float(_value(config, "initializer_range", 0.02)),
        sliding_window=_read_window(config, where),
    )


def _need(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"{where}: {key} is missing; a {'/'.join(FAMILIES.names())} config.json always has it")
    return config[key]


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns a key that transformers itself has a default for; ``null`` means that default."""
    return default if config.get(key) is None else config[key]


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    for key, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
                      ("partial_rotary_factor", 1.0)):  # fmt: skip
        if _value(config, key, only) != only:
            raise UserError(f"{where}: {key}={config[key]!r} is not supported; the only choice is {only!r}")
    known = (*_BOUND_KEYS, _UPDATE_KEY)
    unknown = sorted(key for key in config if key.startswith("intttrain_") and key not in known)
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]}{did_you_mean(unknown[0], known)}")


def _window_keys(model: ModelConfig) -> Json:
    window = model.sliding_window
    match FAMILIES[model.family].window:
        case "none":  # read by our modelling file; the stock class of such a family attends to everything
            return {} if window is None else {"sliding_window": window}
        case "number":  # None is written too: the stock class may have another default
            return {"sliding_window": window}
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": model.num_layers if window is None else 0,  # layers from this one on have the window
        "layer_types": [kind] * model.num_layers,
    }


def _read_window(config: Mapping[str, Any], where: str) -> int | None:
    if FAMILIES[config["model_type"]].window != "switch":
        return _value(config, "sliding_window", None)
    window = config.get("sliding_window") if _value(config, "use_sliding_window", False) else None
    if window is None:
        return None
    layers = int(_need(config, "num_hidden_layers", where))
    first = int(_value(config, "max_window_layers", 28))
    derived = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    kinds = sorted(set(_value(config, "layer_types", derived)))
    if kinds == ["full_attention"]:
        return None
    if kinds != ["sliding_attention"]:
        raise UserError(
            f"{where}: layer_types mixes {' and '.join(kinds)}; every layer must have the same attention "
            f"(set max_window_layers to 0 or {layers})"
        )
    return int(window)


def _rope_keys(rope: RopeConfig, max_position: int | None) -> Json:
    scaling = rope.scaling
    if scaling is None:
        return {
            "max_position_embeddings": max_position or DEFAULT_MAX_POSITION,
            "rope_theta": rope.theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        }
    extended = round(scaling.original_max_position * scaling.factor)
    parameters: Json = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
    if isinstance(scaling, YarnScaling):
        if max_position not in (None, extended):
            # transformers 4.x takes the factor from this quotient, 5.x from the key.
            raise UserError(
                f"max_position_embeddings={max_position} contradicts model.rope.scaling: original_max_position="
                f"{scaling.original_max_position} x factor={scaling.factor:g} is {extended}; use {extended}"
            )
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    else:
        parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return {
        "max_position_embeddings": max_position or extended,
        "rope_theta": rope.theta,
        "rope_scaling": parameters,
        "rope_parameters": {**parameters, "rope_theta": rope.theta},
    }


def _read_rope(config: Mapping[str, Any], where: str) -> RopeConfig:
    # The order of preference is that of transformers 5.x.
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = float(_value(parameters, "rope_theta", _value(config, "rope_theta", 10_000.0)))
    kind = _value(parameters, "rope_type", _value(parameters, "type", "default"))
    if _value(parameters, "partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={parameters['partial_rotary_factor']} is not supported; use 1")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ("llama3", "yarn"):
        raise UserError(
            f"{where}: rope_type={kind!r} is not supported{did_you_mean(kind, ('default', 'llama3', 'yarn'))}"
        )
    factor = float(_need(parameters, "factor", f"{where}: RoPE scaling"))
    original = _value(parameters, "original_max_position_embeddings", config.get("max_position_embeddings"))
    if original is None:
        raise UserError(f"{where}: RoPE scaling {kind!r} needs original_max_position_embeddings, which is missing")
    if kind == "llama3":
        scaling: Llama3Scaling | YarnScaling = Llama3Scaling(
            kind="llama3",
            factor=factor,
            low_freq_factor=float(_need(parameters, "low_freq_factor", where)),
            high_freq_factor=float(_need(parameters, "high_freq_factor", where)),
            original_max_position=int(original),
        )
    else:
        _refuse_yarn_options(parameters, factor, where)
        scaling = YarnScaling(
            kind="yarn",
            factor=factor,
            original_max_position=int(original),
            beta_fast=float(_value(parameters, "beta_fast", 32.0)),
            beta_slow=float(_value(parameters, "beta_slow", 1.0)),
        )
    return RopeConfig(theta=theta, scaling=scaling)


def _refuse_yarn_options(parameters: Mapping[str, Any], factor: float, where: str) -> None:
    """Refuses YaRN variants whose numbers would differ from ``YarnScaling``."""
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    given = _value(parameters, "attention_factor", usual)
    if abs(given - usual) > 1e-6:
        raise UserError(f"{where}: attention_factor={given} is not supported; the only choice is {usual:.6f}")
    for key, only in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if parameters.get(key, only) not in (only, None):
            raise UserError(f"{where}: YaRN option {key}={parameters[key]!r} is not supported; leave it out")


def _ttt_keys(ttt: TTTConfig) -> Json:
    check_implemented(ttt)
    keys: Json = {
        "ttt_mode": True,
        "ttt_layers": list(ttt.layers),
        "ttt_proj": True,
        "ttt_lr": ttt.eta,
        "ttt_chunk": ttt.chunk_tokens,
        "ttt_target": ttt.target,
    }
    values = dataclasses.asdict(ttt)
    if ttt.update != TTTConfig.update:  # its default
        keys[_UPDATE_KEY] = values["update"]
    return keys | {key: values[field] for key, field in _BOUND_KEYS.items() if values[field]}


def _read_ttt(config: Mapping[str, Any], where: str) -> TTTConfig | None:
    present = [key for key in TTT_KEYS if key in config]
    mode = config.get("ttt_mode")
    if not isinstance(mode, bool | None):
        raise UserError(f"{where}: ttt_mode={mode!r} must be true or false (no quotes)")
    if not present or mode is False:
        return None
    missing = [key for key in TTT_KEYS if config.get(key) is None]
    if missing:
        raise UserError(
            f"{where}: {', '.join(missing)} missing beside {', '.join(present)}; a TTT model needs all of "
            f"{', '.join(TTT_KEYS)}"
        )
    if config["ttt_proj"] is not True:
        raise UserError(f"{where}: ttt_proj={config['ttt_proj']!r} is not supported; the only choice is true")
    target = config["ttt_target"]
    if problem := TARGETS.problem(str(target)):
        raise UserError(f"{where}: ttt_target={target!r}: {problem}")
    layers, last = config["ttt_layers"], int(_need(config, "num_hidden_layers", where)) - 1
    whole = isinstance(layers, list) and all(type(i) is int and 0 <= i <= last for i in layers)
    if not whole or not layers or layers != sorted(set(layers)):
        raise UserError(f"{where}: ttt_layers={layers!r} must be increasing layer indices from 0 to {last}")
    chunk, eta = config["ttt_chunk"], config["ttt_lr"]
    if type(chunk) is not int or chunk < 1:
        raise UserError(f"{where}: ttt_chunk={chunk!r} must be a whole number of tokens, at least 1")
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta < math.inf:
        raise UserError(f"{where}: ttt_lr={eta!r} must be a finite number, at least 0")
    extra = {field: config[key] for key, field in _BOUND_KEYS.items() if config.get(key) is not None}
    if config.get(_UPDATE_KEY) is not None:
        extra["update"] = _known_update(config[_UPDATE_KEY], where)
    return TTTConfig(layers=tuple(layers), chunk_tokens=chunk, eta=float(eta), target=target, **extra)


def _known_update(update: Any, where: str) -> Any:
    """Returns the section of an update rule, which is validated with the rest, after a look at its kind."""
    kind = update.get("kind") if isinstance(update, Mapping) else None
    if problem := UPDATE_RULES.problem(str(kind)):
        raise UserError(f"{where}: {_UPDATE_KEY}={update!r} has kind {kind!r}; {problem}")
    return update
