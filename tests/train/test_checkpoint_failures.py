"""Checkpoints that are damaged, absent, of another shape, or cut short by the disk or the process."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intttrain.core.errors import UserError
from intttrain.train.checkpoint import Checkpoints
from tests.train.checkpoint_cases import (
    KEEP_ALL,
    abstract,
    assert_same_bits,
    folders,
    make_info,
    make_state,
    run_python,
    save_steps,
)


def data_files(step_folder: Path) -> list[Path]:
    return sorted(path for path in step_folder.rglob("*") if path.is_file() and "ocdbt.process_0/d" in str(path))


def delete_largest(folder: Path) -> None:
    max(data_files(folder / "params"), key=lambda path: path.stat().st_size).unlink()


def truncate_largest(folder: Path) -> None:
    path = max(data_files(folder / "training"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(folder: Path) -> None:
    path = max(data_files(folder / "params"), key=lambda path: path.stat().st_size)
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


@pytest.mark.parametrize(
    "damage", [delete_largest, truncate_largest, flip_one_bit, edit_info, truncate_info, remove_everything]
)
def test_a_damaged_newest_step_is_one_clear_line(tmp_path, damage, capfd):
    # Large and random enough that the bit flipped in the middle of the file belongs to an array.
    for step in (1, 2):
        save_wide(tmp_path, step)
    before = (tmp_path / "2" / "info" / "metadata").read_bytes()
    damage(tmp_path / "2")
    assert damage is not edit_info or (tmp_path / "2" / "info" / "metadata").read_bytes() != before
    capfd.readouterr()
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.latest_step() == 2
        with pytest.raises(UserError) as caught:
            checkpoints.restore_latest(abstract(make_state(2, width=400)))
        message = str(caught.value)
        assert "checkpoint step 2 in" in message and "damaged or incomplete" in message
        assert f"use --step=1, or delete {tmp_path / '2'} to go on from there" in message
        assert "\n" not in message
        print(message)
        restored, _ = checkpoints.restore(1, abstract(make_state(1, width=400)))
    assert_same_bits(restored, make_state(1, width=400))
    assert "Traceback" not in "".join(capfd.readouterr())


def save_wide(directory: Path, step: int) -> None:
    with Checkpoints(directory, KEEP_ALL) as checkpoints:
        checkpoints.save(step, make_state(step, width=400), make_info(step))


def test_damage_without_an_earlier_complete_step(tmp_path):
    save_steps(tmp_path, 1, 2)
    truncate_info(tmp_path / "1")
    truncate_info(tmp_path / "2")
    with (
        Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints,
        pytest.raises(UserError, match="no complete step comes before it: bring back a copy, or delete .*/2 to start"),
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
    monkeypatch.setattr("intttrain.train.checkpoint.FORMAT", 7)
    save_steps(tmp_path, 1)
    monkeypatch.undo()
    with (
        Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints,
        pytest.raises(UserError, match=r"has format 7, this version of intttrain reads up to 1"),
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
            checkpoints.restore_latest(more)
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
    from intttrain.core.config import CheckpointConfig
    from intttrain.core.errors import UserError
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
            restored, _ = checkpoints.restore_latest(jax.eval_shape(lambda: state(1)))
            assert (np.asarray(restored["params"]["w"]) == np.asarray(values) + np.float32(1)).all()
    limit(resource.RLIM_INFINITY)
    with Checkpoints(sys.argv[1], CheckpointConfig(every_steps=1, keep_last=1)) as checkpoints:
        checkpoints.restore_latest(jax.eval_shape(lambda: state(1)))
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


GONE = """
    import pathlib, shutil, sys
    import jax.numpy as jnp
    from intttrain.core.config import CheckpointConfig
    from intttrain.core.errors import UserError
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
    from intttrain.core.config import CheckpointConfig
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
        restored, _ = checkpoints.restore_latest(abstract(expected))
        assert_same_bits(restored, expected)
        assert checkpoints.save(2, expected, make_info(2))
    assert folders(tmp_path) == ["1", "2"]
