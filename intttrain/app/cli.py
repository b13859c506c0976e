"""The command line: ``intttrain COMMAND --config=FILE.py[:variant] --config.a.b=value ...``.

Bad input ends with one line after ``error:`` and a non-zero status: 2 for anything the user can fix, 3 when
training met a non-finite step, 4 when another process of the run was lost or the run stood still, 128 + signal number
when a run was interrupted (and saved).
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from intttrain.app.arguments import check_given, define_number, split_overrides
from intttrain.app.examples import with_found_configs
from intttrain.config.errors import UserError, did_you_mean, explain_exit
from intttrain.config.literals import LARGEST, SEEDS
from intttrain.config.overrides import apply_overrides
from intttrain.config.registry import SHIPPED_TASKS
from intttrain.logs.streams import outlive_reader

Command = Callable[[flags.FlagValues], int]
Define = Callable[[flags.FlagValues], Any]  # adds flags

USAGE = """usage: intttrain COMMAND [--flag=value ...]

  init       copy example configurations and launchers, to edit them
  config     print the resolved configuration with derived values
  prepare    text -> token stores
  train      train, or continue the run in --workdir
  plan       compile the training step for a TPU topology; memory, time, what to change
  eval       held-out loss by position or context, gating study, RULER, HumanEval
  generate   continue a prompt
  export     checkpoint -> Hugging Face folder

intttrain COMMAND --help lists the flags of a command."""


def main() -> None:
    """Entry point of the ``intttrain`` program."""
    # As with `python -m`: a configuration may import its neighbours from the folder where the command runs.
    if not sys.flags.safe_path and sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    sys.stdout, sys.stderr = outlive_reader(sys.stdout), outlive_reader(sys.stderr)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    try:
        return _dispatch(arguments)
    except flags.Error as error:
        return _fail(" ".join(str(error).split()), 2)
    except BaseException as error:
        if (explained := explain_exit(error)) is None:
            raise
        return _fail(*explained)


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
    help_text, define, command = COMMANDS[name]
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_string("json", None, "also write the result to this file", flag_values=values)
    if any(argument in ("-h", "--help") for argument in rest):
        print(f"intttrain {name}: {help_text}\n{values.get_help()}")
        return 0
    _parse(values, ["intttrain", *with_found_configs(rest)])
    _check_places(values)
    if values.json:
        _check_json(Path(values.json))
    logging.getLogger("absl").setLevel(logging.WARNING)
    return command(values)


def _check_places(values: flags.FlagValues) -> None:
    for flag in LOCAL:
        if flag in values and "://" in (values[flag].value or ""):
            raise UserError(
                f"--{flag}={values[flag].value} is a URL, and only --workdir and --dense_workdir may be in a bucket; "
                "name a local folder, or mount the bucket"
            )


def _check_json(path: Path) -> None:
    """Refuses a place that cannot be written before hours of work, not after them."""
    if path.is_dir():
        raise UserError(f"--json={path} is a folder; name a file in it, for example {path / 'result.json'}")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"--json={path} cannot be written: {nearest} is not a folder that can be written into")


def _parse(values: flags.FlagValues, argv: list[str]) -> None:
    """Parses the flags; ``config_flags`` looks at ``sys.argv``, so it has to agree."""
    saved, sys.argv = sys.argv, argv
    try:
        overrides: list[tuple[str, str | None]] = []
        if "config" in values:
            argv[1:], overrides = split_overrides(values.read_flags_from_files(argv[1:], force_gnu=False))
        extra = values(argv)[1:]
        check_given(values)
        if "config" in values:  # a file that could not be read is reported only when it is used
            values["config"].value = apply_overrides(values.config.to_dict(), overrides)
    except UserError:
        raise
    except Exception as error:  # a configuration file is a program of the user's, anything can come out of it
        raise UserError(_explain(error, argv)) from None
    finally:
        sys.argv = saved
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; values are given as --flag=value")


# What absl and ml_collections say about the flags themselves, and what a user should read instead.
_REWORDED = (
    (
        r"No such file or directory: '([^']+)'",
        "--config: there is no file {0}; --config=tiny is an example, and 'intttrain init' copies it into configs/",
    ),
    (r"has no attribute 'get_config'", "--config: the file has no function get_config()"),
    (r"'(\w+)' object has no attribute 'to_dict'", "--config: get_config() returned {0}, not a ConfigDict"),
    (r"earlier failure to load: (.*)", "--config: {0}"),
)


def _explain(error: BaseException, argv: Sequence[str]) -> str:
    """Returns one line for whatever went wrong first while flags and configuration were read."""
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    chain = [link for link in chain if _message(link)] or [error]
    messages = [_message(link) for link in chain]
    where = _place_in_config(chain)
    for message in messages:
        if "Did you mean" in message and not message.startswith("Unknown command line flag"):
            plain = message.replace("\\n", "; ").replace("\\", "").replace("'", "").replace("Did", "did")
            return f"{where}unknown configuration key {plain}"
        if absent := re.findall(r"--(\w+)=None: Flag --\w+ must have a value", message):
            if absent == ["config"] and any(argument.startswith("--config=") for argument in argv):
                return "--config: get_config() returned None; it has to return the configuration"
            return "missing " + ", ".join(f"--{flag}=..." for flag in absent)
        for pattern, wording in _REWORDED:
            if not where and (match := re.search(pattern, message)):
                return wording.format(*match.groups())
    first = messages[-1]
    if isinstance(chain[-1], KeyError):
        return f"{where}unknown configuration key {first}; 'intttrain config --config=...' lists the keys there are"
    if where:
        return where + (first if isinstance(chain[-1], ValueError) else f"{type(chain[-1]).__name__}: {first}")
    flag = next((message for message in messages if message.startswith("flag --")), first)
    return f"--config: {first}" if "Traceback" in flag else flag


def _message(error: BaseException) -> str:
    # str(KeyError) quotes its message once more and str(SyntaxError) adds the place, so the argument itself is used.
    text = str(error.args[0] if error.args and not isinstance(error, OSError) else error)
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _place_in_config(chain: Sequence[BaseException]) -> str:
    """Returns ``--config: FILE:LINE: `` if it was a line of a configuration file that failed, else nothing."""
    for error in reversed(chain):
        if isinstance(error, SyntaxError) and error.filename != "<unknown>":  # which would be the value of a flag
            return f"--config: {error.filename}:{error.lineno}: " if error.filename else "--config: "
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name in ("get_config", "<module>")]
        if frames:
            return f"--config: {frames[-1].filename}:{frames[-1].lineno}: "
    return ""


# --- flags of each command -----------------------------------------------------------------------------------------


def _config_flag(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "configuration file, with an optional :variant", flag_values=values, lock_config=True
    )
    flags.mark_flag_as_required("config", flag_values=values)


def _string(name: str, help_text: str, *, default: str | None = None, required: bool = False) -> Define:
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string(name, default, help_text, flag_values=values)
        if required:
            flags.mark_flag_as_required(name, flag_values=values)

    return define


def _strings(name: str, help_text: str) -> Define:
    return lambda values: flags.DEFINE_multi_string(name, None, help_text, flag_values=values)


def _list(name: str, help_text: str) -> Define:
    return lambda values: flags.DEFINE_list(name, [], help_text, flag_values=values)


def _integer(name: str, default: int | None, help_text: str, *, largest: int | None = None) -> Define:
    return lambda values: flags.DEFINE_integer(
        name, default, help_text, flag_values=values, lower_bound=0, upper_bound=largest
    )


def _switch(name: str, help_text: str) -> Define:
    return lambda values: flags.DEFINE_boolean(name, False, help_text, flag_values=values)


def _float(name: str, default: float, help_text: str, *, largest: float = LARGEST) -> Define:
    return lambda values: define_number(name, default, help_text, values, upper=largest)


def _enum(name: str, default: str, choices: list[str], help_text: str) -> Define:
    return lambda values: flags.DEFINE_enum(name, default, choices, help_text, flag_values=values)


def _all(*definitions: Define) -> Define:
    def define(values: flags.FlagValues) -> None:
        for definition in definitions:
            definition(values)

    return define


def _command(name: str, module: str = "commands") -> Command:
    """Imports the command when it runs: ``--help`` and bad flags answer without loading JAX."""

    def call(values: flags.FlagValues) -> int:
        return getattr(importlib.import_module(f"intttrain.app.{module}"), name)(values)

    return call


LOCAL = ("output", "ruler_data", "hlo", "json")

_WORKDIR = _string("workdir", "folder of the run, local or gs://BUCKET/FOLDER", required=True)
_OUTPUT = _string("output", "folder to create", required=True)
_STEP = _integer("step", None, "checkpoint step (default: the newest)")

COMMANDS: dict[str, tuple[str, Define, Command]] = {
    "init": (
        "copy example configurations and launchers, to edit them",
        _string("output", "folder that receives configs/ and launch/", default="."),
        _command("copy_examples", "examples"),
    ),
    "config": ("print the resolved configuration", _config_flag, _command("show_config")),
    "prepare": ("text -> token stores", _all(_config_flag, _OUTPUT), _command("prepare_stores")),
    "train": (
        "train, or continue the run in --workdir",
        _all(_config_flag, _WORKDIR, _integer("stop_at_step", None, "save and stop there, as an interruption would")),
        _command("train_model"),
    ),
    "plan": (
        "compile the training step for a TPU topology that is not there and predict memory and time",
        _all(
            _config_flag,
            _string("topology", "one TPU slice, for example v5p:4x4x4 or v6e-256", required=True),
            _switch("compare", "also plan the configuration with model.ttt=None, and say what TTT costs"),
            _integer("stage", None, "which stage of train.stages to plan, from 1"),
            _string("sweep", "plan all combinations: 'model.remat=full,qkv train.microbatches=1,2'"),
            _string("hlo", "folder for the compiled text"),
        ),
        _command("plan_step"),
    ),
    "eval": (
        "held-out loss by position; more with --task",
        _all(
            _config_flag, _WORKDIR, _STEP,
            _switch("follow", "evaluate every checkpoint, also those still to come, until the run is finished"),
            _string("task", f"what to evaluate: {', '.join(SHIPPED_TASKS)}, or a plugin's", default="positions"),
            _string("dense_workdir", "a run of the same model trained without TTT, to compare with"),
            _string("ruler_data", "folder of RULER's samples, to share between runs (default: beside the results)"),
            _switch("execute_model_code", "let --task=code run programs that the model wrote, in a sandbox"),
        ),
        _command("evaluate_model", "evaluate"),
    ),
    "generate": (
        "continue a prompt",
        _all(
            _WORKDIR, _STEP, _strings("prompt", "text to continue; may be repeated; without it, the terminal is read"),
            _integer("max_new_tokens", 256, "length of the continuation"),
            _float("temperature", 0.8, "0 takes the most likely token"),
            _integer("top_k", 0, "draw from so many of the most likely tokens; 0 = all"),
            _float("top_p", 1.0, "draw from the most likely tokens that together have this probability", largest=1.0),
            _integer("seed", 0, "of the sampling", largest=SEEDS - 1),
            _enum("update", "on", ["on", "off"], "whether the model learns while it reads"),
            _string("gate", "gate rule: which chunks it learns from (docs/gating.md)", default="always"),
            _string("gate_signal", "gate signal: what the gate looks at", default="reconstruction"),
            _enum("gate_on", "high", ["high", "low"], "which signals make a chunk worth learning"),
            _float("gate_rate", 0.5, "wanted share of chunks", largest=1.0),
            _list("gate_thresholds", "of a rule that has some, as --gate=threshold, a TTT layer each: 0.9,0.95"),
        ),
        _command("generate_text", "generate"),
    ),
    "export": (
        "checkpoint -> Hugging Face folder",
        _all(_WORKDIR, _OUTPUT, _STEP, _enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the weights")),
        _command("export_checkpoint"),
    ),
}  # fmt: skip
