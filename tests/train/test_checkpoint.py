"""Checkpoints: exact, whole or absent, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from intttrain.core.config import CheckpointConfig, as_dict, default_config, flatten, resolve
from intttrain.core.errors import UserError
from intttrain.train.checkpoint import CheckpointInfo, Checkpoints, check_compatible, package_versions

KEEP_ALL = CheckpointConfig(every_steps=1, keep_last=100)
REPO = Path(__file__).resolve().parents[2]


def make_info(step: int) -> CheckpointInfo:
    return CheckpointInfo(
        step=step, data_cursor=8 * step, config={"model.d_model": 4, "model.ttt": None, "model.ttt.layers": [0, 2]},
        fingerprint="abc", tokenizer={"kind": "byte"},
    )  # fmt: skip


def make_state(seed: int, width: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    params = {
        "embed": {"weight": normal(7, width)},
        "layers": {"attention": {"q": normal(2, width, 3)}, "mlp_norm": {"scale": normal(2, width)}},
        "half": normal(5).astype(jnp.bfloat16),
    }
    opt_state = optax.chain(optax.scale_by_adam(), optax.scale(1.0)).init(params)
    return {
        "params": params,
        "opt_state": jax.tree.map(lambda leaf: normal(*leaf.shape).astype(leaf.dtype), opt_state),
        "step": jnp.int32(seed),
        "healthy": jnp.asarray(True),
        "rng": jax.random.key_data(jax.random.key(seed)),
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def save_steps(directory: Path, *steps: int, config: CheckpointConfig = KEEP_ALL) -> None:
    with Checkpoints(directory, config) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), make_info(step))


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_same_bits(ours: Any, expected: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(ours))[path]
        assert other.dtype == leaf.dtype and other.shape == leaf.shape, path
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


def run_python(script: str, *args: str | Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


# --- exact -------------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact_in_every_dtype(tmp_path):
    state = make_state(3)
    state["params"]["half"] = jnp.asarray([np.nan, -0.0, np.inf, 1e-40, 1.0], jnp.bfloat16)
    state["extra"] = {"u8": jnp.arange(5, dtype=jnp.uint8), "flags": jnp.asarray([True, False])}
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(3, state, make_info(3))
    with Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints:
        restored, info = checkpoints.restore_latest(abstract(state))
    assert_same_bits(restored, state)
    assert info == make_info(3) and info.versions["jax"] == jax.__version__


def test_arrays_may_be_donated_right_after_save(tmp_path):
    state = make_state(1) | {"big": jnp.arange(1 << 20, dtype=jnp.float32)}
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(1, state, make_info(1))
        jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(state["big"]))
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, abstract(expected))
    assert_same_bits(restored, jax.tree.map(jnp.asarray, expected))


def test_restored_optimizer_goes_on_exactly(tmp_path):
    optimizer = optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(0.1, mask=lambda p: {"w": True, "b": False})
    )
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    opt_state = optimizer.init(params)
    state = {"params": params, "opt_state": opt_state}
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(1, state, make_info(1))
        restored, _ = checkpoints.restore_latest(jax.eval_shape(lambda: state))
    with jax.numpy_dtype_promotion("standard"):
        before, after = (optimizer.update(params, s["opt_state"], params) for s in (state, restored))
    assert_same_bits(after, before)


def test_restore_reshards_to_the_abstract_sharding(tmp_path):
    result = run_python(
        """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from intttrain.core.config import CheckpointConfig
        from intttrain.train.checkpoint import CheckpointInfo, Checkpoints

        def named(shape, names, *spec):
            devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
            return NamedSharding(jax.sharding.Mesh(devices, names), P(*spec))

        values = np.arange(32, dtype=np.float32).reshape(8, 4)
        saved = {"params": {"w": jax.device_put(values, named((4,), ("fsdp",), "fsdp"))}, "step": jnp.int32(5)}
        info = CheckpointInfo(5, 0, {}, "f", {})
        with Checkpoints(sys.argv[1], CheckpointConfig()) as checkpoints:
            assert checkpoints.save(5, saved, info, force=True)
            checkpoints.wait()
            for sharding in (named((2, 2), ("fsdp", "tensor"), "tensor", "fsdp"), named((3,), ("fsdp",)), None):
                leaf = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)
                wanted = {"params": {"w": leaf}, "step": jax.ShapeDtypeStruct((), np.int32, sharding=sharding and
                          NamedSharding(sharding.mesh, P()))}
                restored, _ = checkpoints.restore(5, wanted)
                w = restored["params"]["w"]
                assert sharding is None or w.sharding == sharding, w.sharding
                assert sharding is not None or w.sharding.device_set == {jax.devices()[0]}
                assert (np.asarray(w) == values).all()
        print("resharded")
        """,
        tmp_path,
        devices=4,
    )
    assert result.stdout.strip() == "resharded" and result.stderr == "", result.stderr


def test_params_alone_do_not_touch_the_optimizer_state(tmp_path):
    save_steps(tmp_path, 2)
    shutil.rmtree(tmp_path / "2" / "training")
    state = make_state(2)
    with Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints:
        assert_same_bits(checkpoints.restore_params(2, abstract(state["params"])), state["params"])
        with pytest.raises(UserError, match="step 2 .* is damaged or incomplete"):
            checkpoints.restore(2, abstract(state))


def test_a_checkpoint_of_params_only(tmp_path):
    params = {"params": make_state(1)["params"]}
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(1, params, make_info(1))
        restored, _ = checkpoints.restore_latest(abstract(params))
        assert_same_bits(restored, params)
        with pytest.raises(UserError, match=r"healthy is missing in the checkpoint and .* in the model"):
            checkpoints.restore_latest(abstract(make_state(1)))


def test_read_info_needs_no_arrays(tmp_path):
    save_steps(tmp_path, 4)
    shutil.rmtree(tmp_path / "4" / "params")
    with Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints:
        assert checkpoints.read_info(4) == make_info(4)


# --- what is kept, and when --------------------------------------------------------------------------------------


def test_retention_keeps_the_last_and_multiples_forever(tmp_path):
    config = CheckpointConfig(every_steps=1, keep_last=2, keep_every_steps=3)
    save_steps(tmp_path, 1, 2, 3, 4, config=config)
    with Checkpoints(tmp_path, config) as checkpoints:  # a restart counts what is there
        for step in (5, 6, 7, 8):
            checkpoints.save(step, make_state(step), make_info(step))
    assert folders(tmp_path) == ["3", "6", "7", "8"]


def test_saves_on_multiples_or_when_forced_and_never_twice(tmp_path):
    config = CheckpointConfig(every_steps=4, keep_last=9)
    with Checkpoints(tmp_path, config) as checkpoints:
        saved = [step for step in range(1, 10) if checkpoints.save(step, make_state(step), make_info(step))]
        assert saved == [4, 8]
        assert checkpoints.save(9, make_state(9), make_info(9), force=True)
        assert not checkpoints.save(9, make_state(0), make_info(9), force=True)
        checkpoints.wait()
        assert checkpoints.latest_step() == 9
        restored, _ = checkpoints.restore(9, abstract(make_state(9)))
        assert int(restored["step"]) == 9


def test_a_restored_step_is_not_saved_again_but_a_strange_one_is_refused(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.restore(3, abstract(make_state(3)))
        assert not checkpoints.save(3, make_state(3), make_info(3), force=True)
        assert checkpoints.save(4, make_state(4), make_info(4))
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.restore(2, abstract(make_state(2)))
        with pytest.raises(UserError, match=r"already holds step 3, later than step 2; .*delete .*/3, .*/4 or use"):
            checkpoints.require_newest(2)
        with pytest.raises(UserError, match="already holds step 3"):
            checkpoints.save(3, make_state(9), make_info(3))
    assert folders(tmp_path) == ["1", "2", "3", "4"]


def test_reading_leaves_no_trace(tmp_path):
    with Checkpoints(tmp_path / "none", KEEP_ALL, read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(UserError, match="there is no checkpoint in .*none; train first"):
            checkpoints.restore_latest(abstract(make_state(1)))
        with pytest.raises(ValueError, match="read-only"):
            checkpoints.save(1, make_state(1), make_info(1))
    assert not (tmp_path / "none").exists()
    save_steps(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()  # another process may be writing it
    with Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 1
    assert folders(tmp_path) == ["1", "2.orbax-checkpoint-tmp"]


def test_relative_directories_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps(Path("run/checkpoints"), 1)
    assert folders(tmp_path / "run" / "checkpoints") == ["1"]


# --- what can go wrong -------------------------------------------------------------------------------------------


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


# --- resuming with another configuration ---------------------------------------------------------------------------


def flat_default() -> dict[str, Any]:
    tree = default_config()
    tree.data.train = ({"path": "/data/a", "weight": 1.0},)
    return flatten(as_dict(resolve(tree)))


def info_of(flat: dict[str, Any]) -> CheckpointInfo:
    return dataclasses.replace(make_info(300), config=json.loads(json.dumps(flat)))


@pytest.mark.parametrize(
    "change",
    [{"name": "other"}, {"train.log_every_steps": 1}, {"train.checkpoint.every_steps": 7}, {"train.microbatches": 2},
     {"eval.documents": 3}, {"prepare.seed": 5}, {"data.prefetch_rows": 1}, {"data.heldout": "/elsewhere"},
     {"model.remat": "none"}, {"model.attention": "dense"}, {"model.loss_chunk_tokens": 64},
     {"model.ttt.implementation": "reference"}, {"data.train": ({"path": "/moved", "weight": 1.0},)}],
)  # fmt: skip
def test_keys_that_may_change(change):
    flat = flat_default()
    assert set(change) <= set(flat)
    check_compatible(info_of(flat), flat | change, "abc")


@pytest.mark.parametrize(
    "change",
    [{"model.d_ff": 1}, {"model.ttt.eta": 0.5}, {"model.compute_dtype": "float32"}, {"data.seed": 1},
     {"data.seq_len": 2048}, {"data.train": ({"path": "/data/a", "weight": 2.0},)}, {"train.batch_rows": 16},
     {"train.num_steps": 5}, {"train.seed": 1}, {"train.optimizer.b2": 0.5}, {"train.schedule.kind": "wsd"}],
)  # fmt: skip
def test_keys_that_make_another_run(change):
    flat = flat_default()
    assert set(change) <= set(flat)
    with pytest.raises(UserError, match=next(iter(change)).replace(".", r"\.")):
        check_compatible(info_of(flat), flat | change, "abc")


def test_all_differences_are_listed_with_both_values():
    flat = flat_default()
    changed = {key: value for key, value in flat.items() if not key.startswith("model.ttt")}
    changed |= {"model.ttt": None, "train.seed": 9}
    with pytest.raises(UserError) as caught:
        check_compatible(info_of(flat), changed, "def")
    message = str(caught.value)
    for part in (
        "saved at step 300",
        "train.seed=0 in the checkpoint but 9 now",
        "model.ttt.eta=0.3 in the checkpoint but not set now",
        "model.ttt=not set in the checkpoint but null now",
        "fingerprint abc in the checkpoint but def now",
        "use another --workdir",
    ):
        assert part in message
    assert "\n" not in message


def test_package_versions_name_what_is_installed():
    versions = package_versions()
    assert versions["jax"] == jax.__version__ and versions["python"].count(".") == 2
    assert {"optax", "orbax-checkpoint", "numpy"} <= set(versions)
