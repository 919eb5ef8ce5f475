"""A run that is killed at twenty random moments ends with the same weights, byte for byte, as one left alone."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import last_step

from bit_jax.accounts import goodput, starts
from bit_jax.checkpoints.shared import MANIFEST

STEPS, KILLS = 90, 20


def unfinished(workdir: Path) -> int:
    """Checkpoints that a killed run was writing."""
    return sum(not (path / MANIFEST).exists() for path in (workdir / "checkpoints").glob("*"))


def losses(workdir: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_killed_twenty_times_it_ends_the_same(runs, tmp_path):
    workdir = tmp_path / "killed"
    flags = ("--steps", STEPS, "--eval-every", 30)
    killed = runs(*flags, "--workdir", workdir, "--checkpoint-every", 1)
    alone = runs(*flags, "--workdir", tmp_path / "alone", "--checkpoint-every", STEPS)
    alone.start()
    assert alone.finish() == 0

    moments, saving, began = random.Random(0), 0, time.time()
    for number in range(KILLS):
        process, before = killed.start(), last_step(workdir)
        if number % 4 == 0:  # while it starts, restores or compiles
            time.sleep(moments.uniform(0, 3))
        else:  # some time after it has made progress: most of that time, it is saving
            killed.until_progress(process, workdir, before)
            time.sleep(moments.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        assert killed.finish() == -signal.SIGKILL
        saving += unfinished(workdir)
    assert saving > 0  # or the kills did not test what they are for
    assert 0 < last_step(workdir) < STEPS
    killed.start()
    assert killed.finish() == 0

    assert (workdir / "final.npz").read_bytes() == (tmp_path / "alone" / "final.npz").read_bytes()
    assert losses(workdir) == losses(tmp_path / "alone")
    assert len(losses(workdir)) == STEPS
    assert not (workdir / "damaged").exists()

    account = goodput.read(workdir / starts.NAME)  # and every second of it all is accounted for
    assert account is not None
    assert (account.starts[-1].step, account.starts[-1].ended) == (STEPS, "finished")
    assert KILLS // 2 < len(account.starts) <= KILLS + 1  # one that is killed before it has the directory says nothing
    assert account.seconds[goodput.LOST] > 0
    assert account.seconds[goodput.KEPT] > 0
    whole = account.starts[-1].began + account.starts[-1].elapsed - account.starts[0].began
    assert account.wall == pytest.approx(whole)
    assert whole < time.time() - began
