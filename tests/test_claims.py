"""Who owns a directory: a second writer is refused, a dead owner is nobody, on this machine and on another."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from input_pipeline import claims
from input_pipeline.claims import InUse, claimed
from input_pipeline.files import replacing


@pytest.fixture
def claim(tmp_path):
    return tmp_path / claims.CLAIM


def take(claim, **settings):
    return claimed(claim, claim.parent, "choose another", **settings)


def test_a_second_owner_is_refused_with_the_first_ones_name(claim):
    with take(claim), pytest.raises(InUse, match=rf"in use by process {os.getpid()} on .* choose another"), take(claim):
        pass
    assert not claim.exists()
    with take(claim):
        pass


def test_a_killed_owner_is_nobody_at_once(claim):
    hold = (
        f"import time\nfrom input_pipeline.claims import claimed\nfrom pathlib import Path\n"
        f"with claimed(Path({str(claim)!r}), 'it', 'wait'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=f"process {owner.pid} "), take(claim):
            pass
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and its parent has not heard of it
        with take(claim):
            assert json.loads(claim.read_text())["process"] == os.getpid()


def elsewhere(claim, beat: int) -> None:
    """A claim as a process of another machine makes it."""
    said = {"host": "node7", "machine": "node7 1", "process": 41, "since": "then", "command": "train.py"}
    with replacing(claim) as file:
        file.write(json.dumps(said | {"token": "41", "beat": f"{beat:012d}", "started": "1"}).encode())


def test_an_owner_elsewhere_is_alive_as_long_as_its_number_moves(claim, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    elsewhere(claim, 0)
    ended = threading.Event()

    def beat():
        count = 0
        while not ended.wait(0.01):
            elsewhere(claim, count := count + 1)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(InUse, match="process 41 on node7 since then"), take(claim, patience=60.0):
            pass
    finally:
        ended.set()
        beating.join()


def test_an_owner_elsewhere_that_stands_still_is_dead(claim, capsys):
    elsewhere(claim, 5)
    with take(claim, patience=0.05):
        assert json.loads(claim.read_text())["process"] == os.getpid()
    assert "claimed by process 41 on node7" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"token": 3}', "\x00\xff"])
def test_a_claim_that_says_nothing_blocks_nobody(claim, text):
    claim.write_bytes(text.encode("latin-1"))
    with take(claim, patience=0.05):
        pass


def test_of_many_at_a_time_one_gets_a_dead_owners_claim(claim):
    elsewhere(claim, 5)
    start, owners, together = threading.Barrier(8), [], threading.Lock()

    def contend():
        start.wait()
        with take(claim, wait=True, patience=0.05):
            assert together.acquire(blocking=False), "two owners"
            owners.append(threading.current_thread().name)
            time.sleep(0.01)
            together.release()

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 8


def test_an_owner_whose_claim_was_taken_hears_of_it(claim, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    heard, said = threading.Event(), []

    def lost(sentence):
        said.append(sentence)
        heard.set()

    with take(claim, lost=lost):
        elsewhere(claim, 1)
        assert heard.wait(60)
    assert "was taken over by process 41 on node7" in said[0]
    assert json.loads(claim.read_text())["process"] == 41  # the new owner's claim is left alone
