"""Samples of RULER: generated once for a tokenizer, kept in a folder and used again.

    FOLDER/4096/niah_single_1/
      settings.json    generator, tokenizer, number of samples, seed
      samples.jsonl    one RulerSample per line

A task's folder appears whole or not at all. Runs with the same tokenizer can share FOLDER.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from intttrain.config import TokenizerConfig
from intttrain.config.errors import UserError
from intttrain.config.evaluation import RulerConfig, RulerTask
from intttrain.data import Tokenizer, make_tokenizer
from intttrain.evals.ruler.generator import GENERATOR, NEEDED, PROGRAM, SENTENCES, Request
from intttrain.evals.ruler.tasks import RulerSample, RulerSet, is_question_answering
from intttrain.pod.agreement import on_first_process
from intttrain.storage.files import write_json, write_text
from intttrain.storage.partial import partial_folder, remove_leftovers
from intttrain.storage.publish import publish_directory

Report = Callable[[str], None]
_SETTINGS, _SAMPLES, _LOG = "settings.json", "samples.jsonl", "log"
_MAX_PROCESSES = 8  # each needs up to 1.2 GB
_POLL_SECONDS = 0.05


def prepare_ruler(
    ruler: RulerConfig, tokenizer: TokenizerConfig, folder: Path, *, max_length: int | None, report: Report
) -> list[RulerSet]:
    """Returns the samples of every length and task, after generating those that ``folder`` does not hold.

    Args:
      ruler: tasks, lengths, number of samples and seed.
      tokenizer: of the model; lengths are counted with it.
      folder: every process sees it; process 0 writes.
      max_length: tokens of the longest row that the model is good for; ``None`` takes any.
      report: receives progress lines.

    Raises:
      UserError: nothing is asked for, a length is too long for the model or too short for a task, the extra ``ruler``
        is not installed, the folder holds other samples, or generating failed.
    """
    wanted = [*itertools.product(dict.fromkeys(ruler.lengths), dict.fromkeys(ruler.tasks))]
    if not wanted:
        raise UserError("eval.ruler.tasks and eval.ruler.lengths are empty; name at least one task and one length")
    longest = max(ruler.lengths)
    if max_length is not None and longest > max_length:
        raise UserError(
            f"eval.ruler.lengths={list(ruler.lengths)}: {longest} tokens are more than the {max_length} that the "
            f"model takes; use lengths up to {max_length}"
        )
    reader = make_tokenizer(tokenizer)
    on_first_process(lambda: _generate_missing(wanted, ruler, tokenizer, reader, folder, report))
    return [_load(task, length, folder) for length, task in wanted]


def _place(folder: Path, length: int, task: RulerTask) -> Path:
    return folder / str(length) / task


def _generate_missing(
    wanted: list[tuple[int, RulerTask]], ruler: RulerConfig, config: TokenizerConfig, tokenizer: Tokenizer,
    folder: Path, report: Report,
) -> None:  # fmt: skip
    settings = {
        "tokenizer": tokenizer.fingerprint,
        "samples": ruler.samples,
        "seed": ruler.seed,
    }
    missing = [
        (length, task) for length, task in wanted if not _is_there(_place(folder, length, task), settings, tokenizer)
    ]
    if not missing:
        return
    settings["generator"] = _generator()
    report(f"generating RULER samples: {len(missing)} sets of {ruler.samples}, tokenizer {tokenizer.description}")
    with _scratch(folder, report) as scratch:
        requests = []
        for length, task in missing:
            output = scratch / f"{length}-{task}"
            output.mkdir()
            requests.append(Request(task, length, ruler.samples, ruler.seed, dataclasses.asdict(config), str(output)))
        for request in _run(requests):
            samples, place = _read(request, tokenizer), _place(folder, request.length, request.task)
            if _is_there(place, settings, tokenizer):
                continue  # another evaluation has made the same meanwhile
            remove_leftovers(place, report)
            with publish_directory(place) as fresh:
                lines = (json.dumps(dataclasses.asdict(sample)) for sample in samples)
                write_text(fresh / _SAMPLES, "".join(f"{line}\n" for line in lines))
                write_json(fresh / _SETTINGS, settings)
            report(f"generated {request.task} of {request.length} tokens: {len(samples)} samples")


def _is_there(place: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Tells whether ``place`` holds samples of these settings. Raises ``UserError`` if it holds others."""
    if not place.exists():
        return False
    try:
        found = json.loads((place / _SETTINGS).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{place} has no readable {_SETTINGS}, so it is no folder of RULER samples; remove it"
        ) from None
    for name, value in settings.items():
        if found.get(name) != value:
            here = f"this is {tokenizer.description}" if name == "tokenizer" else f"now eval.ruler.{name}={value}"
            raise UserError(
                f"the RULER samples in {place} were made with {name}={found.get(name)!r}, {here}; "
                "name another folder or remove that one"
            )
    return True


def _generator() -> str:
    """Returns the generator with its version. Raises ``UserError`` if it is not installed."""
    try:
        importlib.metadata.version(SENTENCES)
        return f"{GENERATOR} {importlib.metadata.version(GENERATOR)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"eval.ruler: {error.name} is not installed, and RULER samples are made with it; "
            "run: pip install 'intttrain[ruler]'"
        ) from None


@contextlib.contextmanager
def _scratch(folder: Path, report: Report) -> Iterator[Path]:
    """Yields a folder inside ``folder`` that is removed at the end."""
    with contextlib.ExitStack() as stack:
        try:
            remove_leftovers(folder / "scratch", report)
            scratch = stack.enter_context(partial_folder(folder / "scratch"))
        except OSError as error:
            raise UserError(
                f"RULER samples cannot be written to {folder} ({error.strerror}); choose another path"
            ) from None
        yield scratch


def _run(requests: list[Request]) -> Iterator[Request]:
    """Runs one process per request, some at a time, and yields those that are done."""
    at_once = min(os.cpu_count() or 1, _MAX_PROCESSES)
    waiting = collections.deque(requests)
    running: dict[subprocess.Popen[bytes], Request] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                request = waiting.popleft()
                running[_start(request)] = request
            done = [process for process in running if process.poll() is not None]
            for process in done:
                request = running.pop(process)
                _check_ended(process, request)
                yield request
            if not done:
                time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.kill()  # nothing less ends the generator
            process.wait()


def _start(request: Request) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(dataclasses.asdict(request))]
    with open(Path(request.output) / _LOG, "wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _check_ended(process: subprocess.Popen[bytes], request: Request) -> None:
    """Raises ``UserError`` if the length is too short or the generator failed."""
    what = f"{request.task} of {request.length} tokens"
    needed = Path(request.output) / NEEDED
    if needed.exists():
        smallest = json.loads(needed.read_text())["length"]
        raise UserError(
            f"eval.ruler.lengths={request.length} is too short for {request.task}, whose smallest samples need "
            f"{smallest} tokens of this tokenizer; use {smallest} or more, or leave the task out"
        )
    if process.returncode:
        last = (Path(request.output) / _LOG).read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"the RULER generator failed for {what} (status {process.returncode}): {' '.join(last)}")


def _read(request: Request, tokenizer: Tokenizer) -> list[RulerSample]:
    """Returns what the generator wrote, which ends with status 0 after some of its failures."""
    task, path = request.task, Path(request.output) / request.task / "validation.jsonl"
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n") if path.exists() else []
    samples = [_make_sample(request.task, json.loads(line), tokenizer) for line in lines]
    if len(samples) != request.samples:
        raise UserError(
            f"the RULER generator wrote {len(samples)} of {request.samples} samples for {task} of {request.length} "
            "tokens; use fewer eval.ruler.samples or another length"
        )
    lost = [sample for sample in samples if not all(answer in sample.prompt for answer in sample.answers)]
    if lost and not is_question_answering(task):
        raise UserError(
            f"the RULER generator left answers out of {len(lost)} samples for {task} of {request.length} tokens; "
            "use a larger length"
        )
    return samples


def _make_sample(task: RulerTask, line: dict[str, Any], tokenizer: Tokenizer) -> RulerSample:
    prompt, answers = line["input"], tuple(line["outputs"])
    texts = answers if is_question_answering(task) else [" ".join(answers)]
    return RulerSample(
        prompt, answers, len(tokenizer.encode(prompt)), min(len(tokenizer.encode(f" {text}")) for text in texts)
    )


def _load(task: RulerTask, length: int, folder: Path) -> RulerSet:
    path = _place(folder, length, task) / _SAMPLES
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        samples = tuple(RulerSample(**(line | {"answers": tuple(line["answers"])})) for line in lines)
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} cannot be read as RULER samples; remove its folder, and choose one that every process sees"
        ) from None
    return RulerSet(task, length, samples)
