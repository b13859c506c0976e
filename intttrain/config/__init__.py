"""What can be set: the typed configuration, its rules, and the errors that teach them.

schema       sections and the rules that join them       Config, default_config, resolve, override
ttt          ``model.ttt``                               TTTConfig
training     the sections below ``train``                TrainConfig
evaluation   those below ``eval``                        EvalConfig
families     what differs between decoders                Family
literals     types of values, each with its range        PositiveInt, Fraction, Seed
run_stages   what changes in the course of a run         describe_stages
overrides    flags: ``--config.a.b=value``
dotted       nested dicts and their flat form            flatten, unflatten
registry     what is chosen by name, and plugins           Registry, OPTIMIZERS, GATE_RULES, import_plugins
problems     what pydantic found, in one line a problem  explain_problem
errors       what a user reads, and how a command ends   UserError, PassingError
"""

from intttrain.config.evaluation import EvalConfig
from intttrain.config.schema import (
    Config,
    DataConfig,
    Llama3Scaling,
    MeshConfig,
    MixtureItem,
    ModelConfig,
    PrepareConfig,
    RopeConfig,
    SeqioSource,
    TextSource,
    TfdsSource,
    TokenizerConfig,
    YarnScaling,
    as_dict,
    check_consistent,
    default_config,
    default_ttt,
    override,
    resolve,
    stage_configs,
)
from intttrain.config.ttt import TTTConfig

__all__ = [
    "Config",
    "DataConfig",
    "EvalConfig",
    "Llama3Scaling",
    "MeshConfig",
    "MixtureItem",
    "ModelConfig",
    "PrepareConfig",
    "RopeConfig",
    "SeqioSource",
    "TTTConfig",
    "TextSource",
    "TfdsSource",
    "TokenizerConfig",
    "YarnScaling",
    "as_dict",
    "check_consistent",
    "default_config",
    "default_ttt",
    "override",
    "resolve",
    "stage_configs",
]
