"""Checkpoints: exact, whole or absent, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from intttrain.config.errors import UserError
from intttrain.config.training import CheckpointConfig
from intttrain.train.checkpoint import Checkpoints
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

# --- exact -------------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact_in_every_dtype(tmp_path):
    state = make_state(3)
    state["params"]["half"] = jnp.asarray([np.nan, -0.0, np.inf, 1e-40, 1.0], jnp.bfloat16)
    state["extra"] = {"u8": jnp.arange(5, dtype=jnp.uint8), "flags": jnp.asarray([True, False])}
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(3, state, make_info(3))
    with Checkpoints(tmp_path, KEEP_ALL, read_only=True) as checkpoints:
        restored, info = restore_newest(checkpoints, abstract(state))
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
        restored, _ = restore_newest(checkpoints, jax.eval_shape(lambda: state))
    with jax.numpy_dtype_promotion("standard"):
        before, after = (optimizer.update(params, s["opt_state"], params) for s in (state, restored))
    assert_same_bits(after, before)


def test_restore_reshards_to_the_abstract_sharding(tmp_path):
    result = run_python(
        """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from intttrain.config.training import CheckpointConfig
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


def test_a_training_state_goes_from_one_mesh_to_another_and_back(tmp_path):
    result = run_python(
        """
        import sys
        import jax, numpy as np
        from intttrain.config import default_config, resolve
        from intttrain.config.training import CheckpointConfig
        from intttrain.train import CheckpointInfo, Checkpoints, make_program

        def abstract_state(**mesh):
            config = default_config()
            config.model.num_layers, config.model.d_model, config.model.d_ff, config.model.head_dim = 1, 32, 64, 8
            config.mesh.update(mesh)
            return make_program(resolve(config)).state

        def bits(leaf):
            return np.asarray(leaf).tobytes()

        rng = np.random.default_rng(0)
        meshes = {"fsdp": {"fsdp": 8}, "split": {"fsdp": 2, "context": 4}, "tensor": {"fsdp": 4, "tensor": 2}}
        states = {name: abstract_state(**mesh) for name, mesh in meshes.items()}
        state = jax.tree.map(
            lambda leaf: jax.device_put(np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), np.uint8).view(
                np.uint8 if leaf.dtype == bool else leaf.dtype).reshape(leaf.shape).astype(leaf.dtype), leaf.sharding),
            states["fsdp"],
        )
        expected = [bits(leaf) for leaf in jax.tree.leaves(state)]
        cut = set()
        with Checkpoints(sys.argv[1], CheckpointConfig(keep_last=9)) as checkpoints:
            for step, name in enumerate(("split", "tensor", "fsdp"), start=1):
                assert checkpoints.save(step, dict(state), CheckpointInfo(step, 0, {}, "f", {}), force=True)
                checkpoints.wait()
                state, _ = checkpoints.restore(step, dict(states[name]))
                for leaf, wanted, value in zip(
                    jax.tree.leaves(state), jax.tree.leaves(dict(states[name])), expected, strict=True
                ):
                    assert leaf.sharding == wanted.sharding and bits(leaf) == value
                cut.add(state["params"]["embed"]["weight"].sharding.shard_shape((320, 32)))
        assert len(cut) == 2, cut  # context cuts parameters as fsdp does
        print("the same")
        """,
        tmp_path,
        devices=8,
    )
    assert result.stdout.strip() == "the same" and result.stderr == "", result.stderr


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
        restored, _ = restore_newest(checkpoints, abstract(params))
        assert_same_bits(restored, params)
        with pytest.raises(UserError, match=r"healthy is missing in the checkpoint and .* in the model"):
            restore_newest(checkpoints, abstract(make_state(1)))


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


def test_retention_keeps_the_best_across_restarts(tmp_path):
    config = CheckpointConfig(every_steps=1, keep_last=1, keep_best=2)
    losses: dict[int, float | None] = {1: 3.0, 2: 1.5, 3: None, 4: 2.5, 5: 1.5, 6: 9.0, 7: None}
    left = {}
    for steps in ((1, 2, 3), (4, 5), (6, 7)):
        with Checkpoints(tmp_path, config) as checkpoints:
            for step in steps:
                info = dataclasses.replace(make_info(step), heldout_loss=losses[step])
                checkpoints.save(step, make_state(step), info)
        left[steps[-1]] = folders(tmp_path)
    assert left == {3: ["1", "2", "3"], 5: ["2", "5"], 7: ["2", "5", "7"]}


def test_a_damaged_step_is_not_among_the_best(tmp_path):
    config = CheckpointConfig(every_steps=1, keep_last=1, keep_best=1)
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, loss in ((1, 1.0), (2, 2.0)):
            checkpoints.save(step, make_state(step), dataclasses.replace(make_info(step), heldout_loss=loss))
    (tmp_path / "1" / "info" / "metadata").write_text("{")
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, make_state(3), dataclasses.replace(make_info(3), heldout_loss=3.0))
    assert folders(tmp_path) == ["2", "3"]


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
            restore_newest(checkpoints, abstract(make_state(1)))
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
