"""Checkpoints: bit-equal on any mesh, whole or not there, and no damage goes unseen."""

import errno
import os
import shutil
import threading

import jax
import numpy as np
import pytest

from bit_jax.checkpoints import shared
from bit_jax.checkpoints.shared import MANIFEST, CheckpointError, Checkpoints
from bit_jax.scale import sharding
from bit_jax.training.steps import TrainState


def state_on(devices, step=3) -> TrainState:
    rng = np.random.default_rng(0)
    state = TrainState(
        np.int32(step),
        {"kernel": rng.standard_normal((64, 32)).astype(np.float32)},
        ({"kernel": rng.standard_normal((64, 32)).astype(np.float32)}, ()),
    )
    return jax.device_put(state, sharding.param_sharding(sharding.make_mesh(devices), ()))


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


def test_a_checkpoint_that_grows_is_progress_and_one_that_does_not_is_none(tmp_path, monkeypatch):
    """Wherever Orbax has got to, and also while the sums are taken."""
    monkeypatch.setattr(shared, "LOOK", 0.01)
    parts, still, progress = tmp_path / "7.orbax-checkpoint-tmp-1" / "state", threading.Event(), threading.Semaphore(0)
    checkpoints = Checkpoints(tmp_path, keep=2, progress=progress.release)

    class Response:
        def result(self):
            parts.mkdir(parents=True)
            for part in range(3):
                (parts / "data").write_bytes(bytes(part + 1))
                assert progress.acquire(timeout=600)
            while progress.acquire(timeout=0.3):  # what was under way
                pass
            still.set()
            parts.parent.rename(tmp_path / "7")

    checkpoints._finish(7, Response())
    assert still.is_set()
    assert progress.acquire(timeout=600)  # for the sum of its only file
    checkpoints.close()


@pytest.mark.parametrize("left", ["3.orbax-checkpoint-tmp", "3"])
def test_what_a_killed_save_leaves_is_cleared_away(saved, left):
    (saved / left / "state").mkdir(parents=True)
    (saved / left / f".{MANIFEST}.0123abcd.tmp").write_text("{")  # killed while it wrote the manifest
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
        assert shared._damage(saved / "2") is not None
        path.write_bytes(original)
    assert shared._damage(saved / "2") is None


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
    other = jax.device_put(other, sharding.param_sharding(sharding.make_mesh(), ()))
    with pytest.raises(CheckpointError, match="does not fit"):
        restored(saved, 2, other)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot use"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


@pytest.fixture
def as_nobody():
    """The rights of an ordinary user, for one test."""
    if os.geteuid() != 0:
        pytest.skip("only root can give up rights")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_read_is_not_damaged(saved, request):
    """A permission that is missing, a disk that does not answer: the run ends, and everything stays where it is."""
    request.getfixturevalue("as_nobody")
    with pytest.raises(CheckpointError, match=r"cannot use .*Permission denied.*nothing was moved"):
        Checkpoints(saved, keep=2)
    os.seteuid(0)
    assert {path.name for path in saved.iterdir()} == {"1", "2"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_an_error_of_the_disk_is_not_damage(saved, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shared.hashlib, "file_digest", fails)
    with pytest.raises(CheckpointError, match=os.strerror(number)):
        Checkpoints(saved, keep=2)
    assert {path.name for path in saved.iterdir()} == {"1", "2"}


@pytest.mark.parametrize("manifest", [b"[]", b"\xff", b"[" * 100_000, b"{}"])
def test_a_manifest_that_is_none_is_damage(saved, caplog, manifest):
    (saved / "2" / MANIFEST).write_bytes(manifest)
    assert Checkpoints(saved, keep=2).newest == 1
    assert "2 is damaged" in caplog.text


def test_only_the_programs_own_is_ever_deleted(saved, caplog):
    """What a user keeps beside the checkpoints is named, survives, and is never taken for one."""
    (saved / "best").mkdir()
    (saved / "best" / "notes.txt").write_text("precious")
    (saved / "notes.txt").write_text("precious")
    shutil.copytree(saved / "2", saved / "2_backup")
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.newest == 2
    for step in (3, 4, 5):
        checkpoints.save(state_on(jax.devices(), step))
    checkpoints.close()
    assert {path.name for path in saved.iterdir()} == {"4", "5", "best", "notes.txt", "2_backup"}
    assert (saved / "best" / "notes.txt").read_text() == "precious"
    assert "left alone, as not this run's: 2_backup, best, notes.txt" in caplog.text


def test_a_name_that_a_checkpoint_needs_is_not_taken_from_somebody_else(saved):
    (saved / "7").mkdir()
    (saved / "7" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="7 is no checkpoint of this program"):
        Checkpoints(saved, keep=2)
    assert (saved / "7" / "mine").read_text() == "precious"


def test_a_copy_under_another_steps_name_is_refused(saved):
    shutil.copytree(saved / "2", saved / "9")
    with pytest.raises(CheckpointError, match="9 is of step 2"):
        restored(saved, 9, state_on(jax.devices(), 2))


def test_a_checkpoint_that_was_being_deleted_is_cleared_away(saved):
    shutil.copytree(saved / "1", saved / "0.removing")
    assert Checkpoints(saved, keep=2).newest == 2
    assert {path.name for path in saved.iterdir()} == {"1", "2"}
