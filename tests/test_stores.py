"""Work directories in object stores: what a store has to promise, who owns it, and the local copy."""

import contextlib
import json
import os
import threading
import time

import pytest
from object_store import text

from bit_jax.stores import lease, mirror
from bit_jax.stores.mirror import Mirror
from bit_jax.stores.store import Store, StoreError
from input_pipeline import claims
from input_pipeline.claims import InUse
from input_pipeline.errors import RequestError
from input_pipeline.files import Url, place

# the store


def test_a_store_with_conditional_writes_keeps_the_promises(store):
    store.require()
    assert store.sizes() == {}  # nothing of the trial stays


def test_objects_by_their_keys(store, tmp_path):
    assert store.read("a/b") is None
    store.write("a/b", b"0123456789")
    store.write("a/b", b"abcdefghij")
    (tmp_path / "file").write_bytes(b"file")
    store.send(tmp_path / "file", "c")
    store.fetch("a/b", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == b"abcdefghij"
    assert store.sizes() == {"a/b": 10, "c": 4}
    assert store.sizes("a") == {"a/b": 10}
    assert store.read_parts([("a/b", 2, 5), ("c", 0, 4)]) == [b"cde", b"file"]
    assert not store.create("c", b"mine")
    assert store.create("d", b"mine")
    store.remove(["c", "d", "never there"])
    assert store.sizes() == {"a/b": 10}
    with pytest.raises(StoreError, match=r"^s3://.*/never cannot be read: .*; mend that and start again$"):
        store.read_parts([("never", 0, 1)])


def test_an_object_whose_creation_was_tried_twice_is_the_creators_own(store, monkeypatch):
    """A library of a store tries it again where the answer to its first attempt was lost."""
    write = store._files.pipe_file

    def twice(path, data, mode="overwrite"):
        write(path, data, mode=mode)
        write(path, data, mode=mode)

    monkeypatch.setattr(store._files, "pipe_file", twice)
    assert store.create("a", b"mine")
    assert not store.create("a", b"another's")


def test_an_object_that_is_removed_after_it_was_in_the_way_is_no_error(store, monkeypatch):
    """The process that owned a claim may end at this moment; the next attempt then finds the place free."""

    def in_the_way(path, data, mode="overwrite"):
        raise FileExistsError

    with monkeypatch.context() as patch:
        patch.setattr(store._files, "pipe_file", in_the_way)
        assert not store.create("a", b"mine")
    assert store.create("a", b"mine")


def forgets_conditions(store, monkeypatch):
    write = store._files.pipe_file
    monkeypatch.setattr(store._files, "pipe_file", lambda path, data, mode="overwrite": write(path, data))


def looks_first(store, monkeypatch):
    """Acts as a store for which fsspec has no better way."""
    write = store._files.pipe_file
    begun = threading.Barrier(8, timeout=5)

    def write_if_missing(path, data, mode="overwrite"):
        if mode == "create" and store._files.exists(path):
            raise FileExistsError
        with contextlib.suppress(threading.BrokenBarrierError):
            if mode == "create":
                begun.wait()
        write(path, data)

    monkeypatch.setattr(store._files, "pipe_file", write_if_missing)


def lists_late(store, monkeypatch):
    monkeypatch.setattr(store._files, "find", lambda *_, **__: {})


def reads_old_content(store, monkeypatch):
    first, read = {}, store._files.cat_file
    monkeypatch.setattr(store._files, "cat_file", lambda path: first.setdefault(path, read(path)))


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        (forgets_conditions, "several processes can create the same object"),
        (looks_first, "several processes can create the same object"),
        (lists_late, "is not read or listed at once"),
        (reads_old_content, "is not read or listed at once"),
    ],
)
def test_a_store_that_breaks_a_promise_is_refused_with_its_name(store, monkeypatch, fault, promise):
    fault(store, monkeypatch)
    with pytest.raises(RequestError, match=f"cannot be a work directory: .*{promise}"):
        store.require()


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("file://{folder}/run", "a file is seen there before it is whole"),
        ("memory://run", "is seen by one process alone"),
        ("gopher://host/run", "cannot be used: Protocol not known: gopher"),
        ("s3://no-such-bucket/run", "s3://no-such-bucket/run/.* cannot be written: .*bucket does not exist"),
        ("ftp://127.0.0.1:9/run", "ftp://127.0.0.1:9/run cannot be opened: .*refused"),
    ],
)
def test_what_cannot_be_a_store_is_refused(bucket, tmp_path, written, sentence):
    with pytest.raises(RequestError, match=sentence):
        Store(Url(written.format(folder=tmp_path))).require()
    assert list(tmp_path.iterdir()) == []


def test_a_place_is_a_path_or_a_url(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("s3://bucket/run/") == Url("s3://bucket/run")
    assert place("~/run") == tmp_path / "run"
    with pytest.raises(RequestError, match="s3:// names nothing; write the bucket"):
        place("s3://")


# the claim


def claim_of_another_machine(number=1, **more):
    content = json.loads(claims.text_of("other", 0)) | {"machine": "elsewhere", "host": "elsewhere", **more}
    return f"{lease.FOLDER}/{number:08d}.json", json.dumps(content).encode()


def test_a_store_has_one_owner(store):
    with lease.leased(store, "choose another --workdir"):
        refused = pytest.raises(
            InUse, match=rf"in use by process {os.getpid()} on .*; wait for its end, or choose another"
        )
        with refused, lease.leased(store, "choose another --workdir"):
            pass
        assert len(store.sizes(lease.FOLDER)) == 1
    assert store.sizes() == {}
    with lease.leased(store, "remedy"):
        pass


def test_a_dead_owner_is_followed(store):
    """One of this machine that has ended: at once. One of another that gives no sign of life: after a while."""
    store.write(*claim_of_another_machine(machine=claims._machine(), process=2**22 + 1, started="1"))
    with lease.leased(store, "remedy", patience=1000):
        assert sorted(store.sizes(lease.FOLDER)) == [f"{lease.FOLDER}/0000000{number}.json" for number in (1, 2)]
    assert store.sizes() == {}
    store.write(*claim_of_another_machine(7))
    with lease.leased(store, "remedy", patience=0.5):
        assert f"{lease.FOLDER}/00000008.json" in store.sizes()


def test_an_owner_on_another_machine_that_is_alive_is_not_followed(store, monkeypatch):
    store.write(*claim_of_another_machine())
    sizes = store.sizes

    def alive(folder=""):
        store.write(*claim_of_another_machine(beat=str(time.monotonic_ns())))
        return sizes(folder)

    monkeypatch.setattr(store, "sizes", alive)
    with pytest.raises(InUse, match="on elsewhere"), lease.leased(store, "remedy", patience=60):
        pass


def test_an_owner_that_was_taken_for_dead_is_told(store, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    told, heard = [], threading.Event()

    def lost(sentence):
        told.append(sentence)
        heard.set()

    with lease.leased(store, "remedy", lost=lost):
        store.write(*claim_of_another_machine(2))
        assert heard.wait(60)
        store.write(*claim_of_another_machine(2))
    assert told == [
        f"{store.name} was taken over by process {os.getpid()} on elsewhere; this process ends and writes no more"
    ]
    assert list(store.sizes()) == [f"{lease.FOLDER}/00000002.json"]  # the other's claim stays


def test_of_several_one_gets_the_claim(store):
    """Also where all of them have found a dead owner."""
    store.write(*claim_of_another_machine())
    ready, done = threading.Barrier(4), threading.Barrier(4)
    owners, refused = [], []

    def claim(number):
        ready.wait()
        try:
            with lease.leased(store, "remedy", patience=0.3):
                owners.append(number)
                done.wait(60)
        except InUse:
            refused.append(number)
            done.wait(60)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 3)


# the local copy


def test_what_changes_is_sent_and_what_is_there_is_fetched(url, store):
    mine = Mirror(url)
    (mine.path / "config.json").write_text("{}")
    (mine.path / "tensorboard").mkdir()
    (mine.path / "tensorboard" / "events").write_text("events")
    (mine.path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (mine.path / ".result.json.12345678.tmp").write_text("half")
    mine.push()
    assert set(store.sizes()) == {"config.json", "tensorboard/events", "metrics.jsonl"}
    assert text(store, "metrics.jsonl") == '{"step": 1}\n'  # no half lines
    store.write("checkpoints/1.ab/pieces.0", b"large")
    store.write("final.npz", b"large")

    other = Mirror(url)
    files = {str(path.relative_to(other.path)) for path in other.path.rglob("*") if path.is_file()}
    assert files == {"config.json", "metrics.jsonl"}  # nothing that a start does not need
    assert other.holds("final.npz")
    assert other.holds("checkpoints")
    assert not other.holds("result.json")
    (other.path / "config.json").unlink()
    other.push()
    assert "config.json" not in store.sizes()
    assert "metrics.jsonl" in store.sizes()
    mine.pull()
    assert not (mine.path / "config.json").exists()


def test_what_has_not_changed_is_not_sent_again(url, monkeypatch):
    mine = Mirror(url)
    (mine.path / "config.json").write_text("{}")
    mine.push()
    sent = []
    monkeypatch.setattr(mine.store, "send", lambda path, key: sent.append(key))
    mine.push()
    Mirror(url).push()
    assert sent == []
    (mine.path / "config.json").write_text("{ }")
    mine.push()
    assert sent == ["config.json"]


def test_the_result_is_sent_after_all_that_it_speaks_of(url, monkeypatch):
    mine = Mirror(url)
    for name in ("result.json", "final.npz", "config.json", "zoo.txt"):
        (mine.path / name).write_text(name)
    sent = []
    monkeypatch.setattr(mine.store, "send", lambda path, key: sent.append(key))
    mine.push()
    assert sent == ["config.json", "zoo.txt", "final.npz", "result.json"]


def test_a_store_that_is_away_for_a_while_does_not_end_the_run(url, store, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "EVERY", 0.02)
    mine = Mirror(url)
    write, away, tried = mine.store.send, [True], threading.Event()

    def send(path, key):
        tried.set()
        if away[0]:
            raise StoreError("away; remedy")
        write(path, key)

    monkeypatch.setattr(mine.store, "send", send)
    with mine.sending():
        (mine.path / "config.json").write_text("{}")
        assert tried.wait(60)
        away[0] = False
    assert store.sizes() == {"config.json": 2}
    assert caplog.text.count("is behind: away") <= 1


def test_what_cannot_be_sent_in_the_end_is_kept(url, monkeypatch):
    mine = Mirror(url)

    def send(path, key):
        raise StoreError("s3://x cannot be written: away; remedy")

    monkeypatch.setattr(mine.store, "send", send)
    with (
        pytest.raises(
            StoreError, match=r"^s3://x cannot be written: away; what could not be sent is in (.*)$"
        ) as error,
        mine.sending(),
    ):
        (mine.path / "final.npz").write_text("precious")
    kept = place(str(error.value).rpartition(" ")[2])
    assert (kept / "final.npz").read_text() == "precious"


def test_a_process_that_ends_abruptly_sends_what_it_can_in_the_time_it_has(url, store, monkeypatch):
    mine = Mirror(url)
    (mine.path / "starts.jsonl").write_text("why\n")
    mine.push_soon(60)
    assert text(store, "starts.jsonl") == "why\n"
    stuck = threading.Event()
    monkeypatch.setattr(mine.store, "write", lambda key, data: stuck.wait(60))
    (mine.path / "starts.jsonl").write_text("why\nand more\n")
    mine.push_soon(0.1)
    stuck.set()
