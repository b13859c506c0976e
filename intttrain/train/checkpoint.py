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

import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from intttrain.core.config import CheckpointConfig
from intttrain.core.errors import UserError
from intttrain.core.sharding import with_sharding
from intttrain.train.checksum import array_checksums

PyTree = Any
FORMAT = 1  # raised when an older program could misread what this one writes

_VERSIONED_PACKAGES = ("intttrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that shape a run."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself beside its arrays; everything is JSON.

    Attributes:
      step: completed optimizer steps.
      data_cursor: the next row of the data stream, in rows of the shortest stage.
      config: the flat configuration (``core.config.flatten``) of the run.
      fingerprint: of the prepared token store.
      tokenizer: enough to tell, and to open again, the tokenizer of that store.
      skipped: (step, data cursor) of every batch that was not learned from: it came after so many steps.
      versions: of the packages that wrote the checkpoint.
    """

    step: int
    data_cursor: int
    config: Mapping[str, Any]
    fingerprint: str
    tokenizer: Mapping[str, Any]
    skipped: Sequence[Sequence[int]] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=package_versions)


class Checkpoints:
    """The checkpoints of one run; a context manager. All processes make the same calls in the same order.

    Nothing is ever overwritten: a step that this run saved or restored is skipped when it is saved again, and saving
    into a directory that already holds a later step is refused. Arrays handed to ``save`` may be donated as soon as it
    returns.
    """

    def __init__(self, directory: Path | str, config: CheckpointConfig, *, read_only: bool = False) -> None:
        """Opens ``directory``; a writer creates it and removes unfinished saves of a killed run.

        Raises:
          UserError: the directory cannot be created or read.
        """
        _silence_orbax()
        path = epath.Path(directory)
        self._directory = path if path.is_absolute() else epath.Path(os.path.abspath(path))
        self._config = config
        self._in_flight: int | None = None
        self._own: set[int] = set()  # steps saved or restored through this object
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        try:
            # Kept from before the first save: processes that list the directory later could see different steps.
            self._found = frozenset(self.steps())
            self._manager = None if read_only else self._make_manager()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot open the checkpoint directory {self._directory}: {reason}") from error

    def _make_manager(self) -> ocp.CheckpointManager:
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(self._config.keep_last)]
        if self._config.keep_every_steps is not None:
            keep.append(policies.EveryNSteps(self._config.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            create=True,
            cleanup_tmp_directories=True,
            save_root_metadata=False,
            # Made in the background, a folder that cannot be made leaves threads waiting for it for many minutes,
            # which keep the process from ending.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
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
          UserError: this or the previous save could not be written, or the directory holds a later step.
        """
        if self._manager is None or info.step != step:
            raise ValueError(f"save({step}) on a read-only directory or with info.step={info.step}")
        if step in self._own or not (force or self.should_save(step)):
            return False
        self.require_newest(step - 1)
        self.wait()
        arrays = _named_leaves(state)
        document = _to_document(info, _describe(arrays))
        items: dict[str, ocp.args.CheckpointArgs] = {
            "params": ocp.args.StandardSave(state["params"]),
            "info": ocp.args.JsonSave(document),
        }
        if training := _without_params(arrays):
            items["training"] = ocp.args.StandardSave(training)
        with self._reporting_failed_save(step):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._in_flight = step
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

    def wait(self) -> None:
        """Blocks until the save in progress is on disk. Raises ``UserError`` if it failed."""
        if self._manager is None or self._in_flight is None:
            return
        step, self._in_flight = self._in_flight, None
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
            raise UserError(
                f"checkpoint step {step} could not be written to {self._directory}: {_reason(error)}; {kept}. "
                "Free space or fix the directory and start the same command again"
            ) from error

    def latest_step(self) -> int | None:
        """Returns the newest step on disk (unfinished saves do not count), or ``None``."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns the steps on disk, increasing; unfinished saves do not count."""
        return sorted(ocp.utils.checkpoint_steps(self._directory)) if self._directory.is_dir() else []

    def restore_latest(self, abstract_state: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], CheckpointInfo]:
        """Restores the newest step; see ``restore``. A damaged one is an error, never silently passed over."""
        self.wait()
        step = self.latest_step()
        if step is None:
            raise UserError(f"there is no checkpoint in {self._directory}; train first or correct --workdir")
        return self.restore(step, abstract_state)

    def restore(self, step: int, abstract_state: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], CheckpointInfo]:
        """Returns the state, bit for bit as saved, and the info of ``step``.

        Args:
          step: one that is on disk.
          abstract_state: the tree given to ``save`` as ``jax.ShapeDtypeStruct`` (or arrays). Each leaf is restored to
            the sharding that its abstract leaf carries, whatever it was saved with; without one, to one local device.

        Raises:
          UserError: no such step; damaged or incomplete files; an array that is missing, left over or of another shape
            or dtype.
        """
        info, table = self._read(step)
        state = self._load(step, abstract_state, table)
        self._own.add(step)
        return state, info

    def restore_params(self, step: int, abstract_params: PyTree) -> PyTree:
        """Returns only the parameters of ``step``; the optimizer state is not read. Errors as in ``restore``."""
        _, table = self._read(step)
        params_table = {name: entry for name, entry in table.items() if name.startswith("params.")}
        return self._load(step, {"params": abstract_params}, params_table)["params"]

    def read_info(self, step: int) -> CheckpointInfo:
        """Returns the info of ``step`` without reading arrays. Raises ``UserError`` as ``restore`` does."""
        return self._read(step)[0]

    def _read(self, step: int) -> tuple[CheckpointInfo, dict[str, dict[str, Any]]]:
        self.wait()
        steps = self.steps()
        if step not in steps:
            choices = f"choose from {', '.join(map(str, steps))}" if steps else "the directory holds none"
            raise UserError(f"there is no checkpoint step {step} in {self._directory}; {choices}")
        try:
            document = self._reader.restore(
                self._directory / str(step), args=ocp.args.Composite(info=ocp.args.JsonRestore())
            ).info
            return _from_document(document)
        except UserError:
            raise
        except Exception as error:
            raise self._damaged(step, f"info: {_reason(error)}") from error

    def _load(
        self, step: int, abstract_state: Mapping[str, PyTree], table: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, PyTree]:
        wanted = _named_leaves(abstract_state)
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
            with _without_stray_warnings():
                restored = self._reader.restore(self._directory / str(step), args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:
            raise  # the device's fault (out of memory), not the checkpoint's
        except Exception as error:
            raise self._damaged(step, _reason(error)) from error
        arrays = _named_leaves({"params": restored.params}) | (dict(restored.training) if training else {})
        for name, checksum in array_checksums(arrays).items():
            if checksum != table[name]["checksum"]:
                raise self._damaged(step, f"{name} does not have the values that were saved")
        return jax.tree.unflatten(jax.tree.structure(dict(abstract_state)), [arrays[name] for name in wanted])

    def _damaged(self, step: int, reason: str) -> UserError:
        folder = self._directory / str(step)
        earlier = [other for other in self.steps() if other < step and _looks_complete(self._directory / str(other))]
        if earlier:
            advice = f"step {earlier[-1]} is complete: use --step={earlier[-1]}, or delete {folder} to go on from there"
        else:
            advice = f"no complete step comes before it: bring back a copy, or delete {folder} to start again"
        return UserError(f"checkpoint step {step} in {self._directory} is damaged or incomplete ({reason}); {advice}")


# --- the JSON document -------------------------------------------------------------------------------------------


def _to_document(info: CheckpointInfo, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    document = {"format": FORMAT, "info": dataclasses.asdict(info), "arrays": table}
    plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return plain | {"digest": _digest(plain)}


def _from_document(document: Any) -> tuple[CheckpointInfo, dict[str, dict[str, Any]]]:
    """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for a damaged document, ``UserError`` for a newer one."""
    content = {key: value for key, value in document.items() if key != "digest"}
    if document["digest"] != _digest(content):
        raise ValueError("its contents do not match its digest")
    if document["format"] > FORMAT:
        raise UserError(
            f"the checkpoint has format {document['format']}, this version of intttrain reads up to {FORMAT}; "
            f"use intttrain {content['info']['versions'].get('intttrain', 'of the run that wrote it')}"
        )
    return CheckpointInfo(**document["info"]), document["arrays"]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _looks_complete(folder: epath.Path) -> bool:
    """Returns whether the info is intact and the parameters are there, from this process alone (no barriers)."""
    try:
        _from_document(json.loads((folder / "info" / "metadata").read_text()))
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return (folder / "params").exists()


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


# --- keeping errors readable -------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    """Returns one line of bounded length; TensorStore and Orbax put the actual cause last and innermost."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else "..." + line[-200:]


def _silence_orbax() -> None:
    """Keeps Orbax from printing stack traces of failures that this module raises as one line.

    It logs every failed operation up to four times with its trace, and the reads that were under way when the first
    one failed complain, from their own threads, that nobody waits for them any more.
    """
    for logger in (logging.getLogger("absl"), logging.getLogger("asyncio")):
        if _is_not_from_orbax not in logger.filters:
            logger.addFilter(_is_not_from_orbax)
    if not isinstance(sys.unraisablehook, _UnraisableFilter):
        sys.unraisablehook = _UnraisableFilter(sys.unraisablehook)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL or not (
        f"{os.sep}orbax{os.sep}" in record.pathname or "orbax" in record.getMessage()
    )


class _UnraisableFilter:
    """Passes on what Python cannot raise, except the aftermath of a failed Orbax read."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, unraisable: Any) -> None:
        abandoned_read = str(unraisable.exc_value) == "Event loop is closed"
        code = unraisable.object.cr_code if isinstance(unraisable.object, types.CoroutineType) else None
        if not abandoned_read and not (code and f"{os.sep}orbax{os.sep}" in code.co_filename):
            self._previous(unraisable)


@contextlib.contextmanager
def _without_stray_warnings() -> Iterator[None]:
    """A failed Orbax read leaves coroutines that were never awaited; they are collected here, unseen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        try:
            yield
        except Exception:
            gc.collect()
            raise
