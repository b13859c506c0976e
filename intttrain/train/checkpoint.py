"""Checkpoints: saved in the background, whole or not at all, checked when they are read.

    DIRECTORY/
      300/              one folder per step, renamed into place when everything in it is on disk
        params/         Orbax arrays of the `params` tree; readable alone (evaluation, export, generation)
        training/       Orbax arrays of everything else (optimizer moments, step, random key), flat by dotted name
        info/           JSON: CheckpointInfo, and for each array its shape, dtype and checksum

Orbax itself notices a missing or shortened file but not changed bytes, which it would hand over as parameters. So
every array is summed up on the device when it is saved and when it is restored, and the JSON has its own digest.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from intttrain.config.errors import PassingError, UserError, passes, user_error
from intttrain.config.training import CheckpointConfig
from intttrain.layout.sharding import with_sharding
from intttrain.pod.agreement import decided_by_first, first_message, largest, on_first_process, raise_together
from intttrain.pod.coordination import FailingBarrier
from intttrain.pod.distributed import process_count, process_index
from intttrain.train.checkpoint_errors import (
    DamagedError,
    is_damage,
    one_line,
    silence_orbax,
    without_stray_warnings,
)
from intttrain.train.checkpoint_info import CheckpointInfo, from_document, to_document
from intttrain.train.checksum import array_checksums
from intttrain.train.retention import make_policy

PyTree = Any
AGREE_EVERY_STEPS = 10  # how often processes ask each other whether the save in the background goes well


class Checkpoints:
    """The checkpoints of one run; a context manager. All processes make the same calls in the same order.

    Nothing is ever overwritten: a step that this run saved or restored is skipped when it is saved again, and saving
    into a directory that already holds a later step is refused. Arrays handed to ``save`` may be donated as soon as it
    returns.
    """

    def __init__(self, directory: Path | str, config: CheckpointConfig, *, read_only: bool = False) -> None:
        """Opens ``directory`` (local or gs://); a writer creates it and removes unfinished saves of a killed run.

        Raises:
          UserError: the directory cannot be created or read.
        """
        silence_orbax()
        path = epath.Path(directory)
        self._directory = path if path.is_absolute() else epath.Path(os.path.abspath(path))
        self._config = config
        self._in_flight: tuple[int, concurrent.futures.Future[None]] | None = None  # a step, and whether it is on disk
        self._own: set[int] = set()  # steps saved or restored through this object
        self._losses: dict[int, float | None] = {}  # held-out losses of steps, where known
        self._waiting = concurrent.futures.ThreadPoolExecutor(1, "wait_for_save")
        self._reader = _make_reader()
        try:
            # Kept from before the first save: processes that list the directory later could see different steps.
            self._found = set(self.steps())
            self._manager = None if read_only else self._make_manager()
        except OSError as error:
            message = f"cannot open the checkpoint directory {self._directory}: {error.strerror or error}"
            raise user_error(message, error) from error

    def _make_manager(self) -> ocp.CheckpointManager:
        if self._config.keep_best is not None:
            infos = {step: _info_of(self._directory / str(step)) for step in self._found}
            self._losses.update((step, info.heldout_loss) for step, info in infos.items() if info is not None)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=make_policy(self._config, self._losses),
            create=True,
            cleanup_tmp_directories=True,
            save_root_metadata=False,
            # Made in the background, a folder that cannot be made leaves threads waiting for it for many minutes,
            # which keep the process from ending.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False, barrier_sync_fn=FailingBarrier()),
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except UserError as error:
            if exc is None:
                raise
            exc.add_note(str(error))  # the failure that ended the block is the one to report

    def should_save(self, step: int) -> bool:
        """Returns whether ``step`` is a multiple of ``every_steps``."""
        return step % self._config.every_steps == 0

    def save(self, step: int, state: Mapping[str, PyTree], info: CheckpointInfo, *, force: bool = False) -> bool:
        """Starts saving in the background and returns whether it did.

        Args:
          step: completed optimizer steps.
          state: pytree of JAX arrays below a dict with the entry ``params`` (nested dict), for example
            ``{"params": ..., "opt_state": ..., "step": ..., "rng": ...}``; random keys as ``jax.random.key_data``.
            Arrays without elements cannot be saved.
          info: stored beside the arrays.
          force: save although ``should_save(step)`` is false (the last step, an interruption).

        Raises:
          UserError: this or the previous save could not be written (``PassingError`` if the reason passes), or the
            directory holds a later step.
        """
        if self._manager is None or info.step != step:
            raise ValueError(f"save({step}) on a read-only directory or with info.step={info.step}")
        if step in self._own or not (force or self.should_save(step)):
            return False
        self.require_newest(step - 1)
        self.wait()
        arrays = _named_leaves(state)
        document = to_document(info, _describe(arrays))
        items: dict[str, ocp.args.CheckpointArgs] = {
            "params": ocp.args.StandardSave(state["params"]),
            "info": ocp.args.JsonSave(document),
        }
        if training := _without_params(arrays):
            items["training"] = ocp.args.StandardSave(training)
        self._losses[step] = info.heldout_loss
        with self._reporting_failed_save(step):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._in_flight = step, self._waiting.submit(self._manager.wait_until_finished)
        self._own.add(step)
        return True

    def require_newest(self, step: int) -> None:
        """Raises ``UserError`` if the directory held a later step when it was opened.

        A run that goes on from ``step`` would end up among the checkpoints of another one.
        """
        later = sorted(found for found in self._found - self._own if found > step)
        if later:
            raise UserError(
                f"{self._directory} already holds step {later[0]}, later than step {step}; to go on from there "
                f"delete {', '.join(str(self._directory / str(found)) for found in later)} or use another --workdir"
            )

    def raise_failed_save(self, step: int) -> None:
        """Raises as ``wait`` does once the save in the background has failed; waits for nothing else.

        Several processes have to look together, and do so at multiples of ``AGREE_EVERY_STEPS`` only.
        """
        if self._in_flight is None or (process_count() > 1 and step % AGREE_EVERY_STEPS):
            return
        saving, on_disk = self._in_flight
        error = on_disk.exception() if on_disk.done() else None
        here = int(not on_disk.done()) if error is None else 2 if passes(error) else 3
        worst = largest(here)
        if worst != 1:
            self.wait()
        if worst >= 2:
            kind = PassingError if worst == 2 else UserError
            raise kind(f"checkpoint step {saving} could not be written by another process; see its output")

    def wait(self) -> None:
        """Blocks until the save in progress is on disk. Raises ``UserError`` if it failed."""
        if self._manager is None or self._in_flight is None:
            return
        (step, _), self._in_flight = self._in_flight, None
        with self._reporting_failed_save(step):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases everything; harmless when repeated. Raises ``UserError`` if the last save failed."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                # What went wrong has been reported by wait(); closing repeats it.
                with contextlib.suppress(Exception):
                    self._manager.close()
                self._manager = None
            self._waiting.shutdown(wait=False)

    @contextlib.contextmanager
    def _reporting_failed_save(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._own.discard(step)
            with contextlib.suppress(OSError):  # what broke the save may break this too
                if self._manager is not None:
                    self._manager.reload()  # it has already counted the step that failed
            last = self.latest_step()
            kept = "no step is on disk yet" if last is None else f"step {last} is complete and can be restored"
            advice = "Start" if passes(error) else "Free space or fix the directory and start"
            raise user_error(
                f"checkpoint step {step} could not be written to {self._directory}: {one_line(error)}; {kept}. "
                f"{advice} the same command again",
                error,
            ) from error

    def latest_step(self) -> int | None:
        """Returns the newest step on disk (unfinished saves do not count), or ``None``."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns the steps on disk, increasing; unfinished saves do not count."""
        return sorted(ocp.utils.checkpoint_steps(self._directory)) if self._directory.is_dir() else []

    def restore_latest(
        self, abstract_state: Callable[[int], Mapping[str, PyTree]], report: Callable[[str], None]
    ) -> tuple[dict[str, PyTree], CheckpointInfo]:
        """Restores the newest intact step; see ``restore``.

        Newer ones that are damaged are moved aside, each with a line, once that one is read: what fails with every
        step is more likely to lie elsewhere.

        Args:
          abstract_state: of a step.
          report: receives a line for each damaged step.

        Raises:
          UserError: no step, no intact step, or whatever else ``restore`` raises but for damage.
        """
        self.wait()
        damaged: dict[int, str] = {}
        while (step := self._next_older(min(damaged, default=None))) is not None:
            try:
                state, info = self.restore(step, abstract_state(step))
            except DamagedError as error:
                damaged[step] = error.reason
                continue
            self._move_aside(damaged, step, report)
            return state, info
        if not damaged:
            raise UserError(f"there is no checkpoint in {self._directory}; train first or correct --workdir")
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise UserError(
            f"no checkpoint in {self._directory} is intact ({reasons}), and nothing was moved or deleted; "
            "bring back a copy of one, or start again in another --workdir"
        )

    def _next_older(self, than: int | None) -> int | None:
        """Returns the newest step before ``than``, as process 0 sees it."""
        step = max((step for step in self.steps() if than is None or step < than), default=-1)
        step = int(decided_by_first(np.array(step, np.int32)))
        return None if step < 0 else step

    def _move_aside(self, damaged: Mapping[int, str], used: int, report: Callable[[str], None]) -> None:
        """Renames the folders of damaged steps, which may then be saved again."""
        if not damaged:
            return
        moved = {step: _name_aside(self._directory / str(step)) for step in damaged}

        def move() -> None:
            for step, target in moved.items():
                try:
                    (self._directory / str(step)).rename(target)
                except OSError as error:
                    raise user_error(
                        f"checkpoint step {step} in {self._directory} is damaged ({damaged[step]}) and cannot be "
                        f"renamed to {target.name}: {one_line(error)}; step {used} is intact: delete "
                        f"{self._directory / str(step)} and start the same command again",
                        error,
                    ) from error

        on_first_process(move)
        self._found -= damaged.keys()
        if self._manager is not None:
            self._manager.reload()
        for step, reason in damaged.items():
            report(
                f"warning: checkpoint step {step} is damaged or incomplete ({reason}) and was renamed to "
                f"{moved[step].name}; going on from step {used}"
            )

    def restore(self, step: int, abstract_state: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], CheckpointInfo]:
        """Returns the state, bit for bit as saved, and the info of ``step``.

        Args:
          step: one that is on disk.
          abstract_state: the tree given to ``save`` as ``jax.ShapeDtypeStruct`` (or arrays). Each leaf is restored to
            the sharding that its abstract leaf carries, whatever it was saved with; without one, to one local device.

        Raises:
          DamagedError: files are missing, shortened or changed; on every process if on one.
          UserError: no such step; no access; an array that is missing, left over or of another shape or dtype.
        """
        result = self._restore(step, abstract_state, params_only=False)
        self._own.add(step)
        return result

    def restore_params(self, step: int, abstract_params: PyTree) -> PyTree:
        """Returns only the parameters of ``step``; the optimizer state is not read. Errors as in ``restore``."""
        return self._restore(step, {"params": abstract_params}, params_only=True)[0]["params"]

    def read_info(self, step: int) -> CheckpointInfo:
        """Returns the info of ``step`` without reading arrays. Raises ``UserError`` as ``restore`` does."""
        self.wait()
        return self._read(step)[0]

    def _restore(
        self, step: int, abstract_state: Mapping[str, PyTree], *, params_only: bool
    ) -> tuple[dict[str, PyTree], CheckpointInfo]:
        """Every process reads its part by itself; then all agree, because summing up the arrays needs all of them."""
        self.wait()
        wanted = _named_leaves(abstract_state)
        failure: Exception | None = None
        try:
            info, table = self._read(step)
            if params_only:
                table = {name: entry for name, entry in table.items() if name.startswith("params.")}
            arrays = self._load(step, abstract_state, wanted, table)
        except Exception as error:  # of whatever kind: the others must not wait for this process
            failure = error
        self._agree(step, failure)
        checksums = array_checksums(arrays)
        changed = [name for name in wanted if checksums[name] != table[name]["checksum"]]
        reason = f"{changed[0]} does not have the values that were saved" if changed else ""
        self._agree(step, self._damaged(step, reason) if changed else None)
        return jax.tree.unflatten(jax.tree.structure(dict(abstract_state)), [arrays[name] for name in wanted]), info

    def _agree(self, step: int, failure: Exception | None) -> None:
        """Raises on every process what went wrong on one of them; damage only if nothing else did."""
        damage = failure.reason if isinstance(failure, DamagedError) else ""
        raise_together(None if damage else failure)
        if reason := first_message(damage):
            raise self._damaged(step, reason) from failure

    def _read(self, step: int) -> tuple[CheckpointInfo, dict[str, dict[str, Any]]]:
        """Reads the document of a step; this process alone, as in ``_load``."""
        steps = self.steps()
        if step not in steps:
            choices = f"choose from {', '.join(map(str, steps))}" if steps else "the directory holds none"
            raise UserError(f"there is no checkpoint step {step} in {self._directory}; {choices}")
        try:
            return _read_document(self._directory / str(step))
        except UserError:
            raise
        except Exception as error:
            raise self._unreadable(step, error, "info: ") from error

    def _load(
        self, step: int, abstract_state: Mapping[str, PyTree], wanted: Mapping[str, Any],
        table: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, jax.Array]:  # fmt: skip
        """Returns the arrays of a step by dotted name, not yet checked against their checksums."""
        if difference := _first_difference(wanted, table):
            raise UserError(
                f"checkpoint step {step} in {self._directory} does not fit this configuration: {difference}; "
                "use the configuration that it was trained with, or another --workdir"
            )
        targets = {name: _restore_target(leaf) for name, leaf in wanted.items()}
        params = jax.tree.unflatten(
            jax.tree.structure(abstract_state["params"]), [t for n, t in targets.items() if n.startswith("params.")]
        )
        items = {"params": ocp.args.StandardRestore(params)}
        if training := _without_params(targets):
            items["training"] = ocp.args.StandardRestore(training)
        try:
            with without_stray_warnings():
                restored = self._reader.restore(self._directory / str(step), args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:
            raise  # the device's fault (out of memory), not the checkpoint's
        except Exception as error:
            raise self._unreadable(step, error) from error
        return _named_leaves({"params": restored.params}) | (dict(restored.training) if training else {})

    def _unreadable(self, step: int, error: Exception, part: str = "") -> UserError:
        """Returns what to raise for an error while reading: damage, or something that may pass."""
        if is_damage(error):
            where = f", seen by process {process_index()}" if process_count() > 1 else ""
            return self._damaged(step, f"{part}{one_line(error)}{where}")
        advice = "Start" if passes(error) else "Mend the access to it and start"
        return user_error(
            f"checkpoint step {step} in {self._directory} cannot be read: {part}{one_line(error)}; it may be "
            f"intact and was left as it is. {advice} the same command again",
            error,
        )

    def _looks_complete(self, step: int) -> bool:
        folder = self._directory / str(step)
        return _info_of(folder) is not None and (folder / "params").exists()

    def _damaged(self, step: int, reason: str) -> DamagedError:
        earlier = [other for other in self.steps() if other < step and self._looks_complete(other)]
        if earlier:
            advice = f"step {earlier[-1]} is complete: use --step={earlier[-1]}, or intttrain train goes on from there"
        else:
            advice = "no complete step comes before it: bring back a copy, or train again in another --workdir"
        where = f"checkpoint step {step} in {self._directory}"
        return DamagedError(f"{where} is damaged or incomplete ({reason}); {advice}", reason)


def _make_reader() -> ocp.Checkpointer:
    """Returns a reader that waits for no other process: one that fails would leave the others waiting."""
    alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={process_index()})
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _name_aside(folder: epath.Path) -> epath.Path:
    """Returns a free name beside ``folder`` that is nobody's name of a step."""
    names = itertools.chain([f"{folder.name}.damaged"], (f"{folder.name}.damaged-{n}" for n in itertools.count(2)))
    return next(path for name in names if not (path := folder.parent / name).exists())


def _read_document(folder: epath.Path) -> tuple[CheckpointInfo, dict[str, dict[str, Any]]]:
    return from_document(json.loads((folder / "info" / "metadata").read_text()))


def _info_of(folder: epath.Path) -> CheckpointInfo | None:
    """Returns the info of a step if it is intact."""
    try:
        return _read_document(folder)[0]
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError):
        return None


# --- arrays ------------------------------------------------------------------------------------------------------


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns ``{"params.layers.attention.q": leaf}`` in tree order; tuples and dataclasses give ``.0`` and ``.mu``."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(tree))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same dotted name; a key must not contain a dot")
    return named


def _without_params(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in named.items() if not name.startswith("params.")}


def _restore_target(leaf: Any) -> jax.ShapeDtypeStruct:
    return with_sharding(leaf, leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


def _first_difference(wanted: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the first array that differs, parameters before the rest, or ``""``."""
    names = [*wanted, *(name for name in table if name not in wanted)]
    for name in sorted(names, key=lambda name: not name.startswith("params.")):
        saved = f"{tuple(table[name]['shape'])} {table[name]['dtype']}" if name in table else "missing"
        model = f"{tuple(wanted[name].shape)} {wanted[name].dtype}" if name in wanted else "missing"
        if saved != model:
            return f"{name} is {saved} in the checkpoint and {model} in the model"
    return ""


def _describe(arrays: Mapping[str, jax.Array]) -> dict[str, dict[str, Any]]:
    checksums = array_checksums(arrays)
    return {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": checksums[name]}
        for name, array in arrays.items()
    }
