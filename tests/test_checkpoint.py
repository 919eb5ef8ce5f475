"""Checkpoints: bit-equal on any mesh, whole or not there, and no damage goes unseen."""

import jax
import numpy as np
import pytest

from bit_jax import checkpoint, mesh
from bit_jax.checkpoint import MANIFEST, CheckpointError, Checkpoints
from bit_jax.steps import TrainState


def state_on(devices, step=3) -> TrainState:
    rng = np.random.default_rng(0)
    state = TrainState(
        np.int32(step),
        {"kernel": rng.standard_normal((64, 32)).astype(np.float32)},
        ({"kernel": rng.standard_normal((64, 32)).astype(np.float32)}, ()),
    )
    return jax.device_put(state, mesh.param_sharding(mesh.make_mesh(devices), ()))


def shape_of(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (0, 1, 2):
        checkpoints.save(state_on(jax.devices(), step))
    checkpoints.close()
    return tmp_path / "checkpoints"


def restored(directory, step, wanted):
    checkpoints = Checkpoints(directory, keep=2)
    try:
        return checkpoints.restore(step, shape_of(wanted))
    finally:
        checkpoints.close()


def test_restored_onto_another_mesh(saved):
    wanted = state_on(jax.devices()[:1], 2)
    state = restored(saved, 2, wanted)
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert state.params["kernel"].sharding == wanted.params["kernel"].sharding


def test_only_the_newest_are_kept(saved):
    assert {path.name for path in saved.iterdir()} == {"1", "2"}


@pytest.mark.parametrize("left", ["3.orbax-checkpoint-tmp", "3"])
def test_what_a_killed_save_leaves_is_cleared_away(saved, left):
    (saved / left / "state").mkdir(parents=True)
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.newest == 2
    checkpoints.save(state_on(jax.devices(), 3))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored(saved, 3, state_on(jax.devices())), state_on(jax.devices()))


def flip_a_bit(data: bytes, rng) -> bytes:
    damaged = bytearray(data)
    damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def truncate(data: bytes, rng) -> bytes:
    return data[: rng.integers(len(data))]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_damage_is_noticed_wherever_it_strikes(saved, damage):
    rng = np.random.default_rng(0)
    paths = [path for path in (saved / "2").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(paths) > 5
    for path in paths:
        original = path.read_bytes()
        path.write_bytes(damage(original, rng))
        assert checkpoint._damage(saved / "2") is not None
        path.write_bytes(original)
    assert checkpoint._damage(saved / "2") is None


def test_the_one_before_takes_a_damaged_ones_place(saved, caplog):
    next(path for path in (saved / "2").rglob("*") if path.is_file() and path.name != MANIFEST).unlink()
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.newest == 1
    assert "2 is damaged: " in caplog.text
    assert "not as written" in caplog.text
    checkpoints.save(state_on(jax.devices(), 2))  # the run comes to that step again
    checkpoints.close()
    assert len(list((saved.parent / "damaged").glob("2-*"))) == 1
    jax.tree.map(
        np.testing.assert_array_equal, restored(saved, 2, state_on(jax.devices(), 2)), state_on(jax.devices(), 2)
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons its other reads
def test_another_models_checkpoint(saved):
    other = state_on(jax.devices()).replace(params={"other": np.zeros(3, np.float32)})
    other = jax.device_put(other, mesh.param_sharding(mesh.make_mesh(), ()))
    with pytest.raises(CheckpointError, match="does not fit"):
        restored(saved, 2, other)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)
