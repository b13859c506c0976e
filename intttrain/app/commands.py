"""What each command does: resolve the configuration, call the library, print a readable result."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from intttrain.app.hosts import check_hosts
from intttrain.app.loop import train
from intttrain.app.runs import load_trained, parameter_counts
from intttrain.config import Config, as_dict, resolve
from intttrain.config.dotted import flatten
from intttrain.config.errors import UserError
from intttrain.config.run_stages import make_stages
from intttrain.data import prepare
from intttrain.interop import export_model
from intttrain.logs.progress import human_count
from intttrain.logs.streams import finish_streams, print_line, say
from intttrain.logs.workdir import make_place
from intttrain.pod.coordination import open_key_value_store
from intttrain.pod.devices import open_single
from intttrain.pod.distributed import check_single, process_index, start_distributed
from intttrain.pod.watchdog import Watchdog
from intttrain.storage.files import write_json
from intttrain.storage.partial import remove_leftovers


def report(line: str) -> None:
    """Prints progress to standard error, if it can be written; standard output is for results."""
    say(line)


def _finish(values: flags.FlagValues, result: dict[str, Any]) -> int:
    if values.json:
        write_json(Path(values.json), result)
    return 0


def show_config(values: flags.FlagValues) -> int:
    """Prints every value under its dotted name, then what follows from them."""
    config = resolve(values.config)
    flat, derived = flatten(as_dict(config)), derived_values(config)
    width = max(map(len, [*flat, *derived]))
    for name, value in flat.items():
        print(f"{name:{width}}  {value}")
    print("\nderived")
    for name, value in derived.items():
        print(f"{name:{width}}  {value}")
    return _finish(values, {"config": flat, "derived": derived})


def derived_values(config: Config) -> dict[str, Any]:
    """Returns the numbers that people would otherwise work out by hand."""
    derived: dict[str, Any] = parameter_counts(config)
    tokens_in_all = 0
    for stage in make_stages(config):
        prefix = f"stage_{stage.number}." if stage.count > 1 else ""
        if prefix:
            derived[f"{prefix}steps"] = f"{stage.first_step + 1} to {stage.until_step}"
        derived[f"{prefix}tokens_per_step"] = stage.tokens_per_step
        tokens_in_all += stage.tokens_per_step * (stage.until_step - stage.first_step)
        if stage.config.model.ttt is not None:
            derived[f"{prefix}chunks_per_row"] = stage.config.data.seq_len // stage.config.model.ttt.chunk_tokens
    derived["tokens_in_all"] = tokens_in_all
    if config.model.ttt is not None:
        derived["fast_weight_state_bytes_per_layer_and_row"] = 4 * config.model.d_model * config.model.d_ff
    return derived


def prepare_stores(values: flags.FlagValues) -> int:
    """Writes OUTPUT/train and OUTPUT/heldout."""
    config = resolve(values.config)
    check_single("intttrain prepare", None)
    result = prepare(config.prepare, Path(values.output), report)
    print(f"training   {result.train}: {result.train_documents} documents, {human_count(result.train_tokens)} tokens")
    if result.heldout is not None:
        held = f"{result.heldout_documents} documents, {human_count(result.heldout_tokens)} tokens"
        print(f"held out   {result.heldout}: {held}")
    left_out = {"duplicates": result.duplicates, "empty": result.empty, "not text": result.binary}
    print("left out   " + ", ".join(f"{count} {what}" for what, count in left_out.items()))
    if result.stopped_at_max_bytes:
        print("reading stopped at prepare.source.max_bytes")
    return _finish(values, {name: _plain(value) for name, value in dataclasses.asdict(result).items()})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def train_model(values: flags.FlagValues) -> int:
    """Trains; the status tells whether the run was interrupted."""
    config = resolve(values.config)
    place = make_place(values.workdir)
    start_distributed()
    with Watchdog(config.train.watchdog_seconds, open_key_value_store()) as watchdog:
        check_hosts(config, place)
        tell = report if process_index() == 0 else lambda _: None
        result = train(
            config, place, stop_at_step=values.stop_at_step, watchdog=watchdog, report=tell, report_own=report
        )
    status = 0 if result.signal_number is None else 128 + result.signal_number
    if process_index() != 0:
        return status
    loss = f", loss {result.metrics['loss']:.4f}" if "loss" in result.metrics else ""
    if result.finished:
        end = f"finished at step {result.step}{loss}; checkpoint in {place / 'checkpoints'}"
    else:
        end = f"stopped at step {result.step} of {config.train.num_steps}{loss}; saved: run the same command to go on"
    with contextlib.suppress(OSError, ValueError):  # a run that is saved does not fail because nobody listens
        print_line(end, sys.stdout)
    finish_streams()
    _finish(values, {"step": result.step, "finished": result.finished, "metrics": result.metrics})
    return status


def plan_step(values: flags.FlagValues) -> int:
    """Prints what the training step needs and costs on a topology; the status is 1 if it does not fit."""
    from intttrain import planner  # reads and compiles only here

    config = _planned_stage(resolve(values.config), values.stage)
    hlo = None if values.hlo is None else Path(values.hlo)
    if values.compare and (values.sweep or config.model.ttt is None):
        raise UserError("--compare needs a configuration with TTT, and does not go with --sweep")
    if values.sweep:
        points = planner.parse_sweep(values.sweep, config)
        plans = planner.make_plans(config, values.topology, points, hlo=hlo, report=report)
        print(planner.describe_plans(plans))
        table = {"plans": [{"label": label, **plan.to_json()} for label, plan in plans]}
        return _finish(values, table) or int(not any(plan.verdict.fits for _, plan in plans))
    report(f"{config.name}: compiling for {values.topology}; minutes for a model of billions of parameters")
    plan = planner.make_plan(config, values.topology, hlo=hlo)
    print(planner.describe_plan(plan))
    content: dict[str, Any] = plan.to_json()
    if values.compare:
        report("the same with model.ttt=None")
        model = dataclasses.replace(config.model, ttt=None)
        dense = planner.make_plan(
            dataclasses.replace(config, name=f"{config.name}-without-ttt", model=model), values.topology, hlo=hlo
        )
        print("\n" + planner.describe_ttt_share(plan, dense))
        content = {"plan": content, "without_ttt": dense.to_json()}
    return _finish(values, content) or int(not plan.verdict.fits)


def _planned_stage(config: Config, number: int | None) -> Config:
    """Returns the configuration of the stage to plan: each compiles a program of its own, so one has to be named."""
    stages = make_stages(config)
    if len(stages) == 1 and number in (None, 1):
        return stages[0].config
    if number is None or not 1 <= number <= len(stages):
        given = "--stage is not set" if number is None else f"--stage={number} does not exist"
        names = "; ".join(map(str, stages))
        raise UserError(f"{given}: {config.name} has {len(stages)} ({names}); use --stage=1 to --stage={len(stages)}")
    return dataclasses.replace(stages[number - 1].config, name=f"{config.name}-stage-{number}")


def export_checkpoint(values: flags.FlagValues) -> int:
    """Writes a Hugging Face folder."""
    open_single("intttrain export")
    trained = load_trained(make_place(values.workdir), values.step)
    remove_leftovers(Path(values.output), report)
    result = export_model(
        jax.device_get(trained.params), trained.config.model, Path(values.output), dtype=values.dtype,
        tokenizer_files=trained.tokenizer.files(), end_of_document=trained.tokenizer.end_of_document,
    )  # fmt: skip
    print(f"step {trained.step} -> {result.output}: {human_count(result.parameters)} parameters in {values.dtype}")
    for name in result.files:
        print(f"  {name}")
    for note in result.notes:
        print(f"note: {note}")
    return _finish(values, {"step": trained.step, "output": str(result.output), "files": list(result.files)})
