"""Checkpoints that are damaged, absent, of another shape, or cut short by the disk or the process."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.config.errors import UserError
from intttrain.train.checkpoint import Checkpoints
from intttrain.train.checkpoint_errors import DamagedError, is_damage
from tests.app.small import contents, unchanged
from tests.train.checkpoint_cases import (
    KEEP_ALL,
    abstract,
    assert_same_bits,
    folders,
    make_info,
    make_state,
    restore_newest,
    run_python,
    save_steps,
)


def data_files(step_folder: Path) -> list[Path]:
    return sorted(path for path in step_folder.rglob("*") if path.is_file() and "ocdbt.process_0/d" in str(path))


def largest_file(folder: Path) -> Path:
    return max(data_files(folder), key=lambda path: path.stat().st_size)


def delete_largest(folder: Path) -> None:
    largest_file(folder / "params").unlink()


def truncate_largest(folder: Path) -> None:
    path = largest_file(folder / "training")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(folder: Path) -> None:
    path = largest_file(folder / "params")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def edit_info(folder: Path) -> None:
    path = folder / "info" / "metadata"
    path.write_text(path.read_text().replace('"data_cursor": 16', '"data_cursor": 17'))


def truncate_info(folder: Path) -> None:
    path = folder / "info" / "metadata"
    path.write_text(path.read_text()[:40])


def remove_everything(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = [delete_largest, truncate_largest, flip_one_bit, edit_info, truncate_info, remove_everything]


def save_wide(directory: Path, *steps: int) -> None:
    """Large and random enough that the bit flipped in the middle of a file belongs to an array."""
    with Checkpoints(directory, KEEP_ALL) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step, width=400), make_info(step))


def wide(step: int) -> dict[str, Any]:
    return abstract(make_state(step, width=400))


@pytest.mark.parametrize("damage", DAMAGE)
def test_training_goes_on_from_the_step_before_a_damaged_one(tmp_path, damage, capfd):
    save_wide(tmp_path, 1, 2)
    before = (tmp_path / "2" / "info" / "metadata").read_bytes()
    damage(tmp_path / "2")
    assert damage is not edit_info or (tmp_path / "2" / "info" / "metadata").read_bytes() != before
    left = contents(tmp_path / "2")
    lines: list[str] = []
    capfd.readouterr()
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.latest_step() == 2
        with pytest.raises(DamagedError) as caught:  # whoever asks for this very step gets no other
            checkpoints.restore(2, wide(2))
        restored, info = checkpoints.restore_latest(wide, lines.append)
        assert (checkpoints.steps(), info.step) == ([1], 1)
        assert checkpoints.save(2, make_state(2, width=400), make_info(2))
    assert_same_bits(restored, make_state(1, width=400))
    assert "checkpoint step 2 in" in str(caught.value) and "\n" not in str(caught.value)
    assert "step 1 is complete: use --step=1, or intttrain train goes on from there" in str(caught.value)
    (line,) = lines
    assert line.startswith("warning: checkpoint step 2 is damaged or incomplete (")
    assert line.endswith(") and was renamed to 2.damaged; going on from step 1")
    assert folders(tmp_path) == ["1", "2", "2.damaged"]
    assert contents(tmp_path / "2.damaged") == left
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert_same_bits(checkpoints.restore_latest(wide, lines.append)[0], make_state(2, width=400))
    assert len(lines) == 1
    assert "Traceback" not in "".join(capfd.readouterr())


def test_all_that_is_damaged_above_the_intact_step_is_moved_to_names_of_their_own(tmp_path):
    save_wide(tmp_path, 1, 2, 3)
    (tmp_path / "3.damaged").mkdir()
    flip_one_bit(tmp_path / "2")
    truncate_info(tmp_path / "3")
    lines: list[str] = []
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        _, info = checkpoints.restore_latest(wide, lines.append)
        checkpoints.require_newest(1)  # what was moved is no later step any more
    assert info.step == 1 and len(lines) == 2
    assert "step 3 is" in lines[0] and "renamed to 3.damaged-2;" in lines[0]
    assert "step 2 is" in lines[1] and "renamed to 2.damaged;" in lines[1]
    assert folders(tmp_path) == ["1", "2.damaged", "3.damaged", "3.damaged-2"]


def test_nothing_is_moved_when_every_step_is_damaged(tmp_path):
    save_wide(tmp_path, 1, 2)
    truncate_info(tmp_path / "1")
    flip_one_bit(tmp_path / "2")
    with (
        unchanged(tmp_path),
        Checkpoints(tmp_path, KEEP_ALL) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint in .* is intact \(step 2: .*; step 1: info: .*\), and nothing"),
    ):
        checkpoints.restore_latest(wide, pytest.fail)


def endless_link(path: Path) -> None:
    """Cannot be opened, by root neither, for a reason that says nothing about what was written."""
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("part", ["info", "params"])
def test_a_step_that_cannot_be_opened_is_not_taken_for_damaged(tmp_path, part):
    save_wide(tmp_path, 1, 2)
    endless_link(tmp_path / "2" / "info" / "metadata" if part == "info" else largest_file(tmp_path / "2" / "params"))
    with (
        Checkpoints(tmp_path, KEEP_ALL) as checkpoints,
        pytest.raises(UserError, match="step 2 in .* cannot be read: .*symbolic links.*was left as it is") as caught,
    ):
        checkpoints.restore_latest(wide, pytest.fail)
    assert not isinstance(caught.value, DamagedError)
    assert folders(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (ValueError("NOT_FOUND: Error opening"), True),
        (ValueError("DATA_LOSS: checksum"), True),
        (ValueError("PERMISSION_DENIED: Error opening"), False),
        (ValueError("UNAVAILABLE: connection reset"), False),
        (ValueError("Expecting value: line 1"), True),
        (KeyError("params"), True),
        (FileNotFoundError(2, "No such file"), True),
        (PermissionError(13, "Permission denied"), False),
        (OSError(5, "Input/output error"), False),
        (TimeoutError("timed out"), False),
        (MemoryError(), False),
    ],
)
def test_what_counts_as_damage(error, damage):
    try:
        raise RuntimeError("Orbax says something general") from error
    except RuntimeError as outer:
        assert is_damage(outer) == is_damage(error) == damage


def test_errors_of_the_device_and_of_the_configuration_move_nothing(tmp_path, monkeypatch):
    save_wide(tmp_path, 1, 2)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints, unchanged(tmp_path):
        with pytest.raises(UserError, match="does not fit this configuration"):
            checkpoints.restore_latest(lambda step: abstract(make_state(step)), pytest.fail)

        def out_of_memory(*_: Any, **__: Any) -> None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(checkpoints._reader, "restore", out_of_memory)
        with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
            checkpoints.restore_latest(wide, pytest.fail)


def test_damage_without_an_earlier_complete_step(tmp_path):
    save_steps(tmp_path, 1, 2)
    truncate_info(tmp_path / "1")
    truncate_info(tmp_path / "2")
    with (
        Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints,
        pytest.raises(UserError, match="no complete step comes before it: bring back a copy, or train again"),
    ):
        checkpoints.read_info(2)


def test_an_absent_step_lists_those_present(tmp_path):
    save_steps(tmp_path, 1, 3)
    with (
        Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints,
        pytest.raises(UserError, match="no checkpoint step 2 in .*; choose from 1, 3"),
    ):
        checkpoints.restore(2, abstract(make_state(2)))


def test_a_newer_format_names_the_version_to_use(tmp_path, monkeypatch):
    monkeypatch.setattr("intttrain.train.checkpoint_info.FORMAT", 7)
    save_steps(tmp_path, 1)
    monkeypatch.undo()
    with (
        Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints,
        pytest.raises(UserError, match=r"has format 7, this version of intttrain reads up to 2"),
    ):
        checkpoints.read_info(1)


def test_mismatches_name_the_first_array_and_both_shapes(tmp_path):
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints:
        wider = abstract(make_state(1, width=6))
        with pytest.raises(
            UserError, match=r"params\.embed\.weight is \(7, 4\) float32 in the checkpoint and \(7, 6\)"
        ):
            checkpoints.restore_params(1, wider["params"])
        more = abstract(make_state(1))
        more["params"]["ttt"] = {"conv": jax.ShapeDtypeStruct((1, 5, 4), np.float32)}
        with pytest.raises(UserError, match=r"params\.ttt\.conv is missing in the checkpoint and \(1, 5, 4\) float32"):
            restore_newest(checkpoints, more)
        fewer = abstract(make_state(1))
        del fewer["params"]["half"]
        with pytest.raises(UserError, match=r"params\.half is \(5,\) bfloat16 in the checkpoint and missing in the"):
            checkpoints.restore_params(1, fewer["params"])
        other = abstract(make_state(1))
        other["params"]["half"] = jax.ShapeDtypeStruct((5,), np.float32)
        with pytest.raises(UserError, match=r"params\.half is \(5,\) bfloat16 .* \(5,\) float32"):
            checkpoints.restore_params(1, other["params"])


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("occupied")
    with pytest.raises(UserError, match="cannot open the checkpoint directory .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints", KEEP_ALL)


def test_a_failing_close_does_not_hide_the_error_before_it(tmp_path, monkeypatch):
    def fail(self: Checkpoints) -> None:
        raise UserError("checkpoint step 1 could not be written")

    monkeypatch.setattr(Checkpoints, "close", fail)
    with pytest.raises(RuntimeError, match="the loop failed") as caught, Checkpoints(tmp_path, KEEP_ALL):
        raise RuntimeError("the loop failed")
    assert caught.value.__notes__ == ["checkpoint step 1 could not be written"]
    with pytest.raises(UserError, match="could not be written"), Checkpoints(tmp_path, KEEP_ALL):
        pass


FULL_DISK = """
    import resource, signal, sys
    import jax, jax.numpy as jnp, numpy as np
    from intttrain.config.training import CheckpointConfig
    from intttrain.config.errors import UserError
    from intttrain.train.checkpoint import CheckpointInfo, Checkpoints

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    values = jnp.asarray(np.random.default_rng(0).normal(size=100_000).astype(np.float32))

    def state(step):
        return {"params": {"w": values + np.float32(step)}, "step": jnp.int32(step)}

    def save(checkpoints, step):
        return checkpoints.save(step, state(step), CheckpointInfo(step, 0, {}, "f", {}))

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    with Checkpoints(sys.argv[1], CheckpointConfig(every_steps=1, keep_last=1)) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        limit(50_000)
        for step, surface in ((2, checkpoints.wait), (3, lambda: save(checkpoints, 9)), (4, checkpoints.close)):
            save(checkpoints, step)
            try:
                surface()
            except UserError as error:
                print(error)
            assert checkpoints.latest_step() == 1
            restored, _ = checkpoints.restore_latest(lambda step: jax.eval_shape(lambda: state(step)), print)
            assert (np.asarray(restored["params"]["w"]) == np.asarray(values) + np.float32(1)).all()
    limit(resource.RLIM_INFINITY)
    with Checkpoints(sys.argv[1], CheckpointConfig(every_steps=1, keep_last=1)) as checkpoints:
        checkpoints.restore_latest(lambda step: jax.eval_shape(lambda: state(step)), print)
        save(checkpoints, 2)
    print("recovered", checkpoints.latest_step())
"""


def test_a_full_disk_surfaces_and_the_previous_step_stays(tmp_path):
    result = run_python(FULL_DISK, tmp_path / "checkpoints")
    assert result.returncode == 0, result.stderr
    *messages, last = result.stdout.splitlines()
    assert len(messages) == 3 and last == "recovered 2"
    for step, message in zip((2, 3, 4), messages, strict=True):
        assert f"checkpoint step {step} could not be written to {tmp_path / 'checkpoints'}: " in message
        assert "File too large" in message and "step 1 is complete and can be restored" in message
    assert result.stderr == ""
    assert folders(tmp_path / "checkpoints") == ["2"]


READ_ONLY = """
    import ctypes, pathlib, sys
    # Without capabilities root has to obey modes, too. Threads that start later inherit this.
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, nothing) == 0

    import jax.numpy as jnp
    from intttrain.config.training import CheckpointConfig
    from intttrain.config.errors import UserError
    from intttrain.train.checkpoint import CheckpointInfo, Checkpoints

    directory = pathlib.Path(sys.argv[1])

    def save(checkpoints, step):
        checkpoints.save(step, {"params": {"w": jnp.ones(9)}}, CheckpointInfo(step, 0, {}, "f", {}))
        checkpoints.wait()

    with Checkpoints(directory, CheckpointConfig(every_steps=1)) as checkpoints:
        save(checkpoints, 1)
        directory.chmod(0o555)
        try:
            save(checkpoints, 2)
        except UserError as error:
            print(error)
    try:
        Checkpoints(directory / "below", CheckpointConfig())
    except UserError as error:
        print(error)
    directory.chmod(0o755)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_read_only_directory_is_one_line(tmp_path):
    result = run_python(READ_ONLY, tmp_path / "checkpoints")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    saving, opening = result.stdout.splitlines()
    assert "checkpoint step 2 could not be written to" in saving and "Permission denied" in saving
    assert "step 1 is complete and can be restored" in saving
    assert "cannot open the checkpoint directory" in opening and "Permission denied" in opening


class SlowDisk:
    """Finishes no checkpoint until it is told how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.error = threading.Event(), None
        self._rename = os.rename
        monkeypatch.setattr(os, "rename", self.rename)
        monkeypatch.setattr(os, "replace", self.rename)

    def rename(self, *args: Any, **kwargs: Any) -> None:
        assert self.go_on.wait(60)
        if self.error is not None:
            raise self.error
        self._rename(*args, **kwargs)


def test_training_goes_on_while_a_slow_disk_takes_a_checkpoint(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(1, make_state(1), make_info(1))
        for step in range(2, 9):
            checkpoints.raise_failed_save(step)  # blocks for nothing
        assert checkpoints.steps() == []
        release = threading.Timer(0.2, disk.go_on.set)
        release.start()
        checkpoints.save(9, make_state(9), make_info(9))  # has to wait
        assert disk.go_on.is_set() and 1 in checkpoints.steps()
        release.join()
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.steps() == [1, 9]
        for step in (1, 9):
            assert_same_bits(checkpoints.restore(step, abstract(make_state(step)))[0], make_state(step))


def test_a_failed_save_is_noticed_at_the_next_step(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(1, make_state(1), make_info(1))
        disk.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        checkpoints.raise_failed_save(2)
        disk.go_on.set()
        with pytest.raises(UserError, match="step 1 could not be written .*No space left on device.*no step is on"):
            for step in range(3, 6000):
                checkpoints.raise_failed_save(step)
                time.sleep(0.01)
        assert step < 5000, "it was close() that said it"


GONE = """
    import pathlib, shutil, sys
    import jax.numpy as jnp
    from intttrain.config.training import CheckpointConfig
    from intttrain.config.errors import UserError
    from intttrain.train.checkpoint import CheckpointInfo, Checkpoints

    directory = pathlib.Path(sys.argv[1])

    def save(step):
        checkpoints.save(step, {"params": {"w": jnp.ones(9)}}, CheckpointInfo(step, 0, {}, "f", {}))
        checkpoints.wait()

    checkpoints = Checkpoints(directory, CheckpointConfig(every_steps=1))
    save(1)
    shutil.rmtree(directory)
    directory.write_text("no folder can be made below a file")
    try:
        save(2)
    except UserError as error:
        print(error)
    checkpoints.close()
"""


def test_a_process_whose_folder_cannot_be_made_says_so_and_ends(tmp_path):
    result = run_python(GONE, tmp_path / "checkpoints")  # a background thread that waits for the folder would hang here
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "step 2 could not be written" in result.stdout and "Not a directory" in result.stdout
    assert "no step is on disk yet" in result.stdout


KILLED = """
    import os, signal, sys
    import jax.numpy as jnp
    from intttrain.config.training import CheckpointConfig
    from intttrain.train.checkpoint import CheckpointInfo, Checkpoints

    def save(checkpoints, step):
        params = {"w": jnp.full((1000,), step, jnp.float32)}
        checkpoints.save(step, {"params": params}, CheckpointInfo(step, 0, {}, "f", {}))

    checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(every_steps=1))
    save(checkpoints, 1)
    checkpoints.wait()
    # Everything of step 2 is written but the folder has not its final name yet: the latest moment to be killed.
    rename = os.rename

    def kill_before(source, target, **options):
        if os.path.basename(target) == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, **options)

    os.rename = os.replace = kill_before
    save(checkpoints, 2)
    checkpoints.wait()
"""


def test_a_run_killed_while_saving_resumes_from_the_step_before(tmp_path):
    result = run_python(KILLED, tmp_path)
    assert result.returncode == -9, result.stderr
    assert folders(tmp_path) == ["1", "2.orbax-checkpoint-tmp"]
    expected = {"params": {"w": jnp.full((1000,), 1, jnp.float32)}}
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored, _ = restore_newest(checkpoints, abstract(expected))
        assert_same_bits(restored, expected)
        assert checkpoints.save(2, expected, make_info(2))
    assert folders(tmp_path) == ["1", "2"]


def test_parameters_alone_are_compared_with_their_checksums(tmp_path):
    """A bit that is flipped below what Orbax notices: what an evaluation or an export reads."""
    save_wide(tmp_path, 1)
    with Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints:
        params = wide(1)["params"]
        assert_same_bits(checkpoints.restore_params(1, params), make_state(1, width=400)["params"])
        flip_one_bit(tmp_path / "1")
        with pytest.raises(DamagedError, match="checkpoint step 1 in"):
            checkpoints.restore_params(1, params)
