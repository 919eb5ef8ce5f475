"""Local copies: the pieces of all hosts are the state, on any mesh; damaged, foreign and half ones are never used."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import last_step
from test_hosts import RUN, environment, said_by, started  # noqa: F401 (two are fixtures)
from two_hosts import DATA, SPLIT, TwoHosts, shape_of, state_on, the_same

from bit_jax import config
from bit_jax.accounts.timeline import Timeline
from bit_jax.checkpoints import local, pieces
from bit_jax.checkpoints.errors import CheckpointError
from bit_jax.checkpoints.local import MANIFEST, PIECES, LocalCopies
from bit_jax.checkpoints.saving import Saving
from bit_jax.checkpoints.shared import complete_steps
from bit_jax.launch import free_port
from bit_jax.scale import hosts, sharding
from bit_jax.training import resources
from bit_jax.training.asked import NOTHING, Asked
from bit_jax.training.loop import Loop
from bit_jax.training.steps import TrainState
from bit_jax.training.workdir import Workdir
from input_pipeline.errors import RequestError, RunFailed

ROOT = Path(__file__).parent.parent


class HostsWithDisks(TwoHosts):
    """Two hosts, each with its own disk."""

    def __init__(self, folder: Path):
        super().__init__()
        self.disks = [folder / "disk0", folder / "disk1"]
        self.shared = lambda: []  # there are no shared checkpoints

    def copies(self, host: int, attempt: str, run: str = "run") -> LocalCopies:
        copies = LocalCopies(self.disks[host], run, attempt, self.shared)
        copies._host = host
        return copies

    def save(self, *states: TrainState, attempt: str = "a", run: str = "run") -> None:
        def work(host: int) -> None:
            copies = self.copies(host, attempt, run)
            for state in states:
                copies.save(int(state.step), state)
            copies.close()

        self.both(work)

    def start(self, like: TrainState, after: int = 0, attempt: str = "f") -> tuple[int | None, list[Any]]:
        """The step that both agree on, and the state that each restores."""

        def work(host: int) -> tuple[int | None, Any]:
            copies = self.copies(host, attempt)
            step = copies.newest(shape_of(like), after)
            state = copies.restore(shape_of(like)) if step else None
            copies.close()
            return step, state

        (step, first), (other, second) = self.both(work)
        assert step == other
        return step, [first, second]

    def parts(self, host: int, what: str = PIECES) -> list[Path]:
        return sorted(self.disks[host].rglob(what))


@pytest.fixture
def two_hosts(tmp_path, monkeypatch):
    both = HostsWithDisks(tmp_path)
    both.install(monkeypatch)
    monkeypatch.setattr(local, "kept", lambda: 2)
    return both


@pytest.mark.parametrize("before", [SPLIT, DATA])
@pytest.mark.parametrize("after", [SPLIT, 4, DATA])
def test_the_pieces_of_all_hosts_are_the_state_on_any_mesh(two_hosts, before, after):
    two_hosts.save(state_on(before))
    sizes = [path.stat().st_size for host in range(2) for path in two_hosts.parts(host)]
    whole, halves = 4 + 3 * 4 + 2 * 6 * 16 * 4, 4 + 3 * 4 + 6 * 16 * 4
    assert sizes == ([halves, halves] if before == SPLIT else [whole, whole])  # each piece once
    step, restored = two_hosts.start(state_on(after))
    assert step == 3
    the_same(restored, state_on(after))


def test_a_host_without_copies_is_given_them(two_hosts):
    two_hosts.save(state_on(DATA))
    shutil.rmtree(two_hosts.disks[1])
    step, restored = two_hosts.start(state_on(SPLIT))
    assert step == 3
    the_same(restored, state_on(SPLIT))


def test_what_the_hosts_do_not_have_together_is_not_used(two_hosts, caplog):
    two_hosts.save(state_on(SPLIT, 3), state_on(SPLIT, 6))
    shutil.rmtree(two_hosts.parts(1)[-1].parent)
    step, restored = two_hosts.start(state_on(SPLIT, 3))
    assert step == 3
    the_same(restored, state_on(SPLIT, 3))
    assert "the local copies of step 6 lack parts of" in caplog.text
    assert not [path for host in range(2) for path in two_hosts.parts(host) if path.parent.name.startswith("6.")]
    shutil.rmtree(two_hosts.disks[1])
    assert two_hosts.start(state_on(SPLIT))[0] is None


def test_copies_of_two_attempts_are_not_put_together(two_hosts):
    two_hosts.save(state_on(SPLIT), attempt="a")
    shutil.rmtree(two_hosts.disks[1])
    two_hosts.save(state_on(SPLIT), attempt="b")
    shutil.rmtree(next(path.parent for path in two_hosts.parts(0) if ".b." in path.parent.name))
    assert {path.parent.name for host in range(2) for path in two_hosts.parts(host)} == {"3.a.0", "3.b.1"}
    assert two_hosts.start(state_on(SPLIT))[0] is None


def test_copies_that_are_not_newer_than_the_checkpoint_are_not_used(two_hosts):
    two_hosts.save(state_on(DATA, 3))
    assert two_hosts.start(state_on(DATA), after=3)[0] is None


def test_a_damaged_piece_is_missing(two_hosts, caplog):
    two_hosts.save(state_on(DATA))
    damage(two_hosts.parts(0)[0], 40)
    step, restored = two_hosts.start(state_on(DATA))
    assert step == 3
    the_same(restored, state_on(DATA))  # the other host has it
    assert "disk0/run/3.a.0 is damaged: 1 of 4 pieces are not as written, and not used" in caplog.text
    damage(two_hosts.parts(1)[0], 40)
    assert two_hosts.start(state_on(DATA))[0] is None


def damage(path: Path, place: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


# one host, as it is


@pytest.fixture
def copies(tmp_path):
    """(attempt, run) -> the local copies of a run on this host."""
    opened = []

    def of(attempt="a", run="run") -> LocalCopies:
        opened.append(LocalCopies(tmp_path / "disk", run, attempt, lambda: complete_steps(tmp_path / "checkpoints")))
        return opened[-1]

    yield of
    for one in opened:
        one.close()


def names(tmp_path, run="run") -> set[str]:
    return {path.name for path in (tmp_path / "disk" / run).glob("*")}


def test_every_piece_that_is_written_is_progress(tmp_path):
    written = []
    one = LocalCopies(tmp_path / "disk", "run", "a", lambda: [], lambda: written.append(True))
    one.save(3, state_on(DATA))
    one.close()
    manifest = json.loads((tmp_path / "disk" / "run" / "3.a.0" / MANIFEST).read_text())
    assert len(written) == len(manifest["pieces"]) > 2


def test_no_damage_goes_unseen(copies, tmp_path):
    """Wherever a bit flips: the copy is not used, or it is restored as it was, as where the name of a field changes."""
    wanted = state_on(DATA)
    saving = copies()
    saving.save(3, wanted)
    saving.wait()
    saved = tmp_path / "disk" / "run" / "3.a.0"
    rng, used = np.random.default_rng(0), 0
    for file in (saved / MANIFEST, saved / PIECES):
        original = file.read_bytes()
        for place in rng.integers(len(original), size=80):
            damage(file, int(place), int(rng.integers(8)))
            one = copies("b")
            kept = {path.name: path.read_bytes() for path in saved.glob("*")} | {file.name: original}
            if one.newest(shape_of(wanted), 0):
                used += 1
                the_same([one.restore(shape_of(wanted))], wanted)
            saved.mkdir(exist_ok=True)  # what cannot be used was removed
            for name, data in kept.items():
                (saved / name).write_bytes(data)
    assert used < 16  # a few where the manifest says what nobody asks for
    assert copies("c").newest(shape_of(wanted), 0) == 3


def test_another_runs_copies_are_neither_used_nor_deleted(copies, tmp_path):
    state = state_on(DATA)
    other = copies("a", "other")
    other.save(3, state)
    other.wait()
    (tmp_path / "disk" / "notes.txt").write_text("precious")
    (tmp_path / "disk" / "run").mkdir()
    (tmp_path / "disk" / "run" / "notes.txt").write_text("precious")
    own = copies("b")
    before = names(tmp_path, "other")
    assert own.newest(shape_of(state), 0) is None
    for step in range(4, 8):
        own.save(step, state.replace(step=jax.device_put(np.int32(step), state.step.sharding)))
    own.remove()
    assert names(tmp_path, "other") == before
    assert names(tmp_path) == {"notes.txt"}
    assert (tmp_path / "disk" / "notes.txt").exists()


def at(state: TrainState, step: int) -> TrainState:
    return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))


def test_the_newest_two_are_kept_until_a_checkpoint_is_newer(copies, tmp_path):
    own, state = copies(), state_on(DATA)
    for step in range(1, 5):
        own.save(step, at(state, step))
        own.wait()
        assert names(tmp_path) == {f"{kept}.a.0" for kept in (step - 1, step) if kept}
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)  # not complete yet
    own.save(10, at(state, 10))
    own.wait()
    assert names(tmp_path) == {"4.a.0", "10.a.0"}
    (tmp_path / "checkpoints" / "9" / "sha256.json").write_text("{}")
    own.save(11, at(state, 11))
    own.wait()
    assert names(tmp_path) == {"10.a.0", "11.a.0"}
    own.remove()
    assert not (tmp_path / "disk" / "run").exists()


def test_a_state_that_its_step_left_as_it_was_is_dropped(copies, tmp_path):
    own = copies()
    own.save(4, state_on(DATA, 3))  # the step failed: the state is still that of step 3
    own.wait()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("room", [True, False])
def test_the_copy_is_of_before_the_next_step_which_uses_the_state_up(copies, monkeypatch, room):
    """Both ways: copied on the devices, and where these have no room, on the host."""
    monkeypatch.setattr(pieces, "has_room", lambda memory, wanted: room)
    written = threading.Event()
    write = LocalCopies._write
    monkeypatch.setattr(LocalCopies, "_write", lambda *given: (written.wait(60), write(*given)))
    next_step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), state), donate_argnums=0)
    own, wanted, state = copies(), state_on(DATA), state_on(DATA)
    own.save(3, state)
    jax.block_until_ready(next_step(state))
    assert state.params["kernel"].is_deleted()
    written.set()
    own.wait()
    one = copies("b")
    assert one.newest(shape_of(wanted), 0) == 3
    the_same([one.restore(shape_of(wanted))], wanted)


def test_a_device_has_room_for_a_copy_beside_its_fullest_moment():
    assert pieces.has_room(None, 10**12)  # a CPU, whose memory is the host's
    assert pieces.has_room({"bytes_limit": 1000, "peak_bytes_in_use": 700}, 270)
    assert not pieces.has_room({"bytes_limit": 1000, "peak_bytes_in_use": 700}, 280)


def test_what_a_kill_leaves_is_not_used_and_cleared_away(copies, tmp_path, monkeypatch):
    """Killed after the pieces are written and before the manifest is."""
    own, state = copies(), state_on(DATA)
    own.save(2, at(state, 2))
    own.wait()
    with monkeypatch.context() as patch:
        patch.setattr(local, "write_json", lambda *_: sys.exit())  # ends the thread's work, and nothing is tidied up
        own.save(3, state)
        with pytest.raises(SystemExit):
            own.wait()
    assert {path.name for path in (tmp_path / "disk" / "run" / "3.a.0").glob("*")} == {PIECES}
    one = copies("b")
    assert one.newest(shape_of(state), 0) == 2
    assert names(tmp_path) == {"2.a.0"}
    the_same([one.restore(shape_of(state))], at(state, 2))


def test_a_full_disk_costs_a_copy_and_not_the_run(copies, tmp_path, caplog):
    own, state = copies(), state_on(DATA)
    own.save(1, at(state, 1))
    own.wait()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limit[1]))
    try:
        for step in (2, 3):
            own.save(step, at(state, step))
            own.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # once, and not every few steps
    assert "the local copy of step 2 is dropped: cannot write" in said[0]
    assert "File too large" in said[0]
    assert names(tmp_path) == {"1.a.0"}
    own.save(4, at(state, 4))
    own.wait()
    assert copies("b").newest(shape_of(state), 0) == 4


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_directory_that_cannot_be_written_is_said_at_the_start(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"--local-checkpoints .*file.* cannot be written"):
        LocalCopies(tmp_path / place, "run", "a", lambda: [])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"local_every": 5}, "--local-every 5 needs a directory"),
        ({"local_checkpoints": Path("/dev/shm/bit")}, "--local-checkpoints /dev/shm/bit needs to know how often"),
        ({"local_every": 0, "local_checkpoints": Path("d")}, "--local-every 0 must be greater than 0"),
        ({"checkpoint_minutes": 0.0}, "--checkpoint-minutes 0.0 must be greater than 0"),
    ],
)
def test_wrong_requests(tmp_path, flags, said):
    with pytest.raises(RequestError, match=said):
        dataclasses.replace(config.DIGITS, run=config.RunConfig(tmp_path, **flags))


def test_they_may_change_between_starts(tmp_path):
    flags = {"local_every": 5, "local_checkpoints": tmp_path, "checkpoint_minutes": 1.5}
    plain, with_copies = (
        dataclasses.replace(config.DIGITS, run=config.RunConfig(tmp_path, **more)) for more in ({}, flags)
    )
    assert config.identity(plain) == config.identity(with_copies)


def test_what_they_take_is_counted(tmp_path):
    workdir: Any = SimpleNamespace(known_run=None)
    plain = [resources.Need("other", 1, 2, ""), resources.Need(resources.HOST_MEMORY, 1, 2, "")]
    other, memory, space = resources.with_local_copies(plain, Path("/dev/shm/bit"), 2**30, workdir)
    assert (other.needed, memory.needed, space.needed) == (
        1,
        1 + 1 + 2,
        2,
    )  # two lie there
    assert space.name == "space under /dev/shm/bit, GiB"
    resources_of_disk = resources.with_local_copies(plain, ROOT, 2**30, workdir)
    assert resources_of_disk[1].needed == 1 + 1
    assert pieces.bytes_here(state_on(DATA)) == pieces.bytes_here(state_on(SPLIT)) == 4 + 12 + 768


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_an_array_of_another_host_arrives_bit_for_bit(monkeypatch, dtype, shape):
    def added_up(mine: np.ndarray, is_source: bool) -> np.ndarray:
        return np.stack([mine if is_source else np.zeros_like(mine), np.zeros_like(mine)]).sum(axis=0, dtype=mine.dtype)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", added_up)
    monkeypatch.setattr(hosts, "MOST_WORDS", 4)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    sent = np.frombuffer(np.random.default_rng(0).bytes(size), dtype).reshape(shape)
    assert hosts.given_by(0, sent).tobytes() == sent.tobytes()
    zero = np.full(shape, -0.0).astype(dtype)
    assert hosts.given_by(0, zero).tobytes() == zero.tobytes()


# when


def test_what_is_asked_for_travels_as_one_number():
    for asked in (NOTHING, Asked(0, True), Asked(15), Asked(15, True)):
        assert Asked.of(asked.row) == asked
    assert NOTHING.row == 0
    assert Asked.of(max(Asked(0, True).row, Asked(10).row)) == Asked(10)  # who ends saves, too


class Kept:
    """Checkpoints that remember their steps; the newest is of step 2."""

    newest = 2

    def __init__(self):
        self.steps: list[int] = []
        self.removed = False

    def save(self, *given: Any) -> None:
        self.steps.append(int(given[-1].step))

    def remove(self) -> None:
        self.removed = True

    def close(self) -> None:
        """Nothing is still being written."""


@pytest.mark.parametrize("watch_every", [None, 1, 5])
def test_a_checkpoint_is_due_after_minutes_too(tmp_path, monkeypatch, watch_every):
    """A step takes a minute by this clock. Host 0's wish is seen in the metrics of the step that it came with, when the
    next one has begun already, or is about to be watched; the state after that is saved, and the minutes count from
    then."""
    now, kept, copies = [0.0], Kept(), Kept()
    shared: Any = kept
    own: Any = copies
    saving = Saving(shared, own, every=10, minutes=2.5, local_every=2, clock=lambda: now[0])

    def step(state, batch):
        now[0] += 60
        signal = np.int32(batch["signal"].max())
        quiet = {"replaced": np.int32(0), "failed": np.bool_(False), "loss": np.float32(0)}
        return SimpleNamespace(step=state.step + 1), quiet | {"signal": signal}

    nothing: Any = None
    run: Any = SimpleNamespace(
        config=SimpleNamespace(run=config.RunConfig(tmp_path, watch_every=watch_every), model=config.ModelConfig()),
        recipe=SimpleNamespace(schedule=SimpleNamespace(steps=12)),
        workdir=SimpleNamespace(path=tmp_path, profile=tmp_path / "profile"),
        mesh=sharding.make_mesh(),
        global_batch=8,
    )
    program: Any = SimpleNamespace(train_step=step, watch_step=lambda state, batch: {})
    log: Any = SimpleNamespace(advance=lambda number: None, write=lambda step, shown: None)
    account: Any = SimpleNamespace(step=0)
    loop = Loop(run, program, nothing, saving, Timeline(), log, account)
    state: Any = SimpleNamespace(step=0)
    loop.train_from(state, 0, iter([(index, {}) for index in range(12)]), None)
    # the wish comes with the batch of step 4, at minute 3; step 5 has begun when it is seen
    assert kept.steps == [5, 10]
    assert copies.steps == [2, 4, 6, 8]
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    now[0] += 10_000
    assert not saving.wished  # host 0's clock counts


@pytest.mark.parametrize("full", [False, True])
def test_a_state_that_fails_the_check_is_not_kept_anywhere(monkeypatch, full):
    """Also where the checkpoint before it, which is still being written, fails meanwhile."""
    shared, own, disowned = Kept(), Kept(), []

    def close():
        if full:
            raise CheckpointError("no space left")

    monkeypatch.setattr(shared, "close", close, raising=False)
    checkpoints: Any = shared
    copies: Any = own
    saving = Saving(checkpoints, copies, every=2, local_every=1, disown=lambda: disowned.append(True))
    saving.save(2, SimpleNamespace(step=2))
    assert shared.steps == [2]

    def differing(state):
        raise RunFailed(f"the devices disagree after step {state.step}")

    saving.check = differing
    saving.save(3, SimpleNamespace(step=3))
    with pytest.raises(RunFailed, match="disagree after step 4"):
        saving.save(4, SimpleNamespace(step=4))
    assert (shared.steps, own.steps, own.removed, disowned) == ([2], [3], True, [True])


def test_a_run_has_a_text_of_its_own(tmp_path):
    workdir = Workdir(tmp_path, {})
    assert workdir.known_run is None
    run = workdir.run()
    assert workdir.run() == workdir.known_run == run
    assert Workdir(tmp_path / "other", {}).run() != run
    (tmp_path / "run.json").write_text('{"run": "../../precious"}')
    with pytest.raises(RequestError, match=r"run\.json is damaged"):
        workdir.run()
    workdir.forget_run()
    assert workdir.run() != run


# real runs


def resumed(workdir: Path) -> int:
    return json.loads((workdir / "result.json").read_text())["resumed_from_step"]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_copy_and_ends_the_same(runs, tmp_path):
    flags = ("--steps", 40, "--eval-every", 100, "--checkpoint-every", 100)
    alone = runs(*flags, "--workdir", tmp_path / "alone")
    alone.start()
    assert alone.finish() == 0
    copied = runs(*flags, "--workdir", tmp_path / "run", "--local-checkpoints", tmp_path / "disk", "--local-every", 3)
    process = copied.start()
    while last_step(tmp_path / "run") < 20:
        copied.until_progress(process, tmp_path / "run", last_step(tmp_path / "run"))
    os.kill(process, signal.SIGKILL)
    assert copied.finish() == -signal.SIGKILL
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    copied.start()
    assert copied.finish() == 0
    assert resumed(tmp_path / "run") >= 15
    assert (tmp_path / "run" / "final.npz").read_bytes() == (tmp_path / "alone" / "final.npz").read_bytes()
    assert list((tmp_path / "disk").glob("*")) == []


@pytest.mark.slow
def test_a_host_that_lost_its_copies_is_given_them(small_npz, environment, started, tmp_path):  # noqa: F811
    """Two hosts, all of whose processes die; one of them comes back with an empty disk."""
    workdir, disks = tmp_path / "run", [tmp_path / "disk0", tmp_path / "disk1"]
    flags = ("--model", small_npz, "--workdir", workdir, "--checkpoint-every", 100, "--local-every", 4, "--steps", 12)

    def start() -> list:
        address = f"127.0.0.1:{free_port()}"
        of_host = [
            ("--coordinator", address, "--hosts", 2, "--host", n, "--local-checkpoints", disks[n]) for n in (0, 1)
        ]
        return [started([sys.executable, *RUN, *flags, *more], environment) for more in of_host]

    def losses() -> dict[int, float]:
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def copied() -> int:
        """The newest step of which both have a whole copy."""
        steps = [{int(path.parent.name.split(".")[0]) for path in disk.rglob(MANIFEST)} for disk in disks]
        return max(steps[0] & steps[1], default=0)

    both = start()
    while not 0 < copied() < last_step(workdir):
        assert both[0].poll() is None, both[0].communicate()[0]
    for process in both:
        process.kill()
    for process in both:
        process.wait()
    before = losses()
    shutil.rmtree(disks[1])
    for code, said in map(said_by, start()):
        assert code == 0, said
    assert resumed(workdir) >= 4
    again = [step for step in before if step > resumed(workdir)]
    assert again  # steps that were lost, and taken again from the copy
    after = losses()
    np.testing.assert_allclose([after[step] for step in again], [before[step] for step in again], rtol=1e-10)
    assert [list(disk.glob("*")) for disk in disks] == [[], []]
