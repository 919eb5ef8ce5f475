"""Checkpoints in an object store: the hosts' pieces are the state, on any mesh; damaged and half ones are not used."""

import contextlib
import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np
import pytest
from object_store import copied_to, text
from two_hosts import DATA, SPLIT, TwoHosts, shape_of, state_on, the_same

from bit_jax.checkpoints import objects, pieces, reading, stored
from bit_jax.checkpoints.errors import CheckpointError
from bit_jax.checkpoints.objects import DAMAGED, FOLDER, MANIFEST
from bit_jax.checkpoints.shared import Checkpoints
from bit_jax.checkpoints.stored import StoredCheckpoints
from bit_jax.stores.store import StoreError


def nothing() -> None:
    pass


@pytest.fixture
def opened(store, tmp_path):
    """(attempt) -> the checkpoints of a run that starts."""
    with contextlib.ExitStack() as closing:

        def of(attempt="a", keep=3, before=nothing) -> StoredCheckpoints:
            checkpoints = StoredCheckpoints(store, tmp_path, keep=keep, attempt=attempt, before=before)
            closing.callback(checkpoints.close)
            return checkpoints

        yield of


@pytest.fixture
def two_hosts(monkeypatch):
    both = TwoHosts()
    both.install(monkeypatch)
    return both


def saved(checkpoints, *states):
    for state in states:
        checkpoints.save(state)
    checkpoints.wait()


def kept(store) -> set[str]:
    """The checkpoints that have a manifest."""
    return {key.split("/")[1] for key in store.sizes(FOLDER) if key.endswith(MANIFEST)}


@pytest.mark.parametrize("before", [SPLIT, DATA])
@pytest.mark.parametrize("after", [SPLIT, 4, DATA])
def test_what_two_hosts_have_written_is_the_state_on_any_mesh(two_hosts, store, tmp_path, before, after):
    def save(host: int) -> None:
        checkpoints = StoredCheckpoints(store, tmp_path, keep=2, attempt="a", before=nothing)
        saved(checkpoints, state_on(before))
        checkpoints.close()

    def restore(host: int) -> tuple[int | None, Any]:
        checkpoints = StoredCheckpoints(store, tmp_path, keep=2, attempt="b", before=nothing)
        state = checkpoints.restore(3, shape_of(state_on(after)))
        checkpoints.close()
        return checkpoints.newest, state

    two_hosts.both(save)
    sizes = [store.sizes()[f"{FOLDER}/3.a/pieces.{host}"] for host in range(2)]
    assert sum(sizes) == 4 + 3 * 4 + 2 * 6 * 16 * 4  # each piece once
    assert max(sizes) <= 4 + 3 * 4 + 6 * 16 * 4  # by turns
    (step, first), (other, second) = two_hosts.both(restore)
    assert step == other == 3
    the_same([first, second], state_on(after))
    tree = objects.read(store, 3)
    assert tree["params"].keys() == {"kernel", "bias"}
    assert isinstance(tree["opt_state"], list)
    for key, leaf in pieces.keyed(state_on(after)).items():
        assert np.asarray(leaf).tobytes() == pieces.keyed(tree)[key].tobytes(), key


def test_the_newest_are_kept(opened, store):
    checkpoints = opened(keep=2)
    assert checkpoints.newest is None
    saved(checkpoints, *(state_on(DATA, step) for step in (3, 6, 9)))
    assert kept(store) == {"6.a", "9.a"}
    assert checkpoints.complete() == [9, 6]
    assert not [key for key in store.sizes() if "/3.a/" in key]
    again = opened("b", keep=2)
    assert again.newest == 9
    the_same([again.restore(9, shape_of(state_on(SPLIT)))], state_on(SPLIT, 9))
    saved(again, state_on(DATA, 12))
    assert kept(store) == {"9.a", "12.b"}


def test_the_state_may_be_donated_while_it_is_sent(opened):
    checkpoints, state = opened(), state_on(DATA)
    checkpoints.save(state)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    checkpoints.wait()
    the_same([opened("b").restore(3, shape_of(state_on(DATA)))], state_on(DATA))


def test_what_a_checkpoint_needs_besides_is_there_before_it_is_complete(opened, store):
    seen = []
    saved(opened(before=lambda: seen.append(kept(store))), state_on(DATA))
    assert seen == [set()]
    assert kept(store) == {"3.a"}


@pytest.mark.parametrize("name", [MANIFEST, "index.0.json", "pieces.0"])
def test_no_damage_goes_unseen(opened, store, caplog, name):
    """Wherever a bit flips, the one before is used, or it is restored as it was, as where a space changes."""
    saved(opened(), state_on(DATA, 3), state_on(DATA, 6))
    key = f"{FOLDER}/6.a/{name}"
    whole, rng, used = store.read(key), np.random.default_rng(0), 0
    for place in rng.integers(len(whole), size=4):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        store.write(key, bytes(damaged))
        caplog.clear()
        again = opened("b")
        used += again.newest == 6
        the_same([again.restore(again.newest, shape_of(state_on(DATA)))], state_on(DATA, again.newest))
        if again.newest == 3:
            assert f"{store.name}/{FOLDER}/6.a is damaged: " in caplog.text
            assert text(store, f"{FOLDER}/6.a/{DAMAGED}")
            assert opened("c").newest == 3  # and that is not looked at again
        store.write(key, whole)
        store.remove([f"{FOLDER}/6.a/{DAMAGED}"])
    assert used <= 2


@pytest.mark.parametrize("name", ["index.0.json", "pieces.0"])
def test_a_missing_object_is_damage(opened, store, name):
    saved(opened(), state_on(DATA, 3), state_on(DATA, 6))
    store.remove([f"{FOLDER}/6.a/{name}"])
    assert opened("b").newest == 3


def test_a_host_that_sees_damage_tells_the_others(two_hosts, store, tmp_path):
    def start(host: int, step: int | None = None) -> int | None:
        checkpoints = StoredCheckpoints(store, tmp_path, keep=3, attempt=f"{step or 0}", before=nothing)
        if step is not None:
            saved(checkpoints, state_on(SPLIT, step))
        checkpoints.close()
        return checkpoints.newest

    for step in (3, 6):
        two_hosts.both(lambda host, step=step: start(host, step))
    key = f"{FOLDER}/6.6/pieces.1"
    content = store.read(key)
    store.write(key, content[:-1] + bytes([content[-1] ^ 1]))
    assert two_hosts.both(start) == [3, 3]


def test_a_store_that_does_not_answer_is_no_damage(opened, store, monkeypatch):
    saved(opened(), state_on(DATA, 3))

    def away(parts):
        raise StoreError(f"{store.name} cannot be read: away; remedy")

    with monkeypatch.context() as patch:
        patch.setattr(store, "read_parts", away)
        with pytest.raises(CheckpointError, match="cannot be read: away; nothing was removed"):
            opened("b")
    assert opened("b").newest == 3


def test_what_is_complete_is_asked_for_now_and_then(opened, store, monkeypatch):
    """Local copies ask every few steps; if the store does not answer, they are not to end the run."""
    checkpoints = opened()
    saved(checkpoints, state_on(DATA, 3))
    assert checkpoints.complete() == [3]
    saved(checkpoints, state_on(DATA, 6))
    assert checkpoints.complete() == [3]
    now = time.monotonic() + stored.LISTED
    monkeypatch.setattr(stored.time, "monotonic", lambda: now)
    assert checkpoints.complete() == [6, 3]

    def away(folder=""):
        raise StoreError("away; remedy")

    with monkeypatch.context() as patch:
        patch.setattr(store, "sizes", away)
        patch.setattr(stored.time, "monotonic", lambda: now + 2 * stored.LISTED)
        assert checkpoints.complete() == [6, 3]


def test_what_a_killed_start_has_half_written_is_removed(opened, store, caplog):
    saved(opened(), state_on(DATA, 3))
    store.write(f"{FOLDER}/6.ab/pieces.0", b"half")
    store.write(f"{FOLDER}/notes/mine.txt", b"foreign")
    assert opened("b").newest == 3
    assert not [key for key in store.sizes() if "/6.ab/" in key]
    assert text(store, f"{FOLDER}/notes/mine.txt") == "foreign"
    assert "left alone, as not this run's: notes" in caplog.text


def test_a_checkpoint_that_cannot_be_sent_ends_the_run(opened, store, monkeypatch):
    checkpoints = opened()

    def send(path, key, progress):
        raise StoreError(f"{store.name}/{key} cannot be written: no more room; remedy")

    with monkeypatch.context() as patch:
        patch.setattr(store, "send", send)
        checkpoints.save(state_on(DATA))
        with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to s3://.*no more room; mend that, then"):
            checkpoints.wait()
    assert kept(store) == set()


def test_a_checkpoint_of_another_model_is_refused_and_stays(opened, store):
    saved(opened(), state_on(DATA))
    state = state_on(DATA)
    other = dataclasses.replace(state, params={"kernel": state.params["kernel"]})
    with pytest.raises(CheckpointError, match=r"3\.a does not fit this run; it is as it was written"):
        opened("b").restore(3, shape_of(other))
    assert kept(store) == {"3.a"}


def test_a_copy_in_the_other_form_is_refused_not_passed_over(opened, store, tmp_path):
    """Neither may a run begin anew beside its own checkpoints."""
    saved(opened(), state_on(DATA))
    copy = copied_to(store, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="was copied from an object store"):
        Checkpoints(copy / FOLDER, keep=2)
    assert reading.steps(copy) == [3]
    assert int(reading.read(copy, 3)["step"]) == 3
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 4"):
        reading.read(copy, 4)
    store.write(f"{FOLDER}/500/sha256.json", json.dumps({}).encode())
    with pytest.raises(CheckpointError, match="was copied from a directory"):
        opened("b")
