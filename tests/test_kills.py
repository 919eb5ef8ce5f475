"""A run that is killed at twenty random moments ends with the same weights, byte for byte, as one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import last_step

from bit_jax.checkpoint import MANIFEST

ROOT = Path(__file__).parent.parent
STEPS, KILLS = 120, 20
RUN = (
    f"digits --global-batch 16 --resize-to 36 --crop 32 --steps {STEPS} --warmup-steps 2 --decay-steps 60 "
    "--log-every 1 --eval-every 40"
).split()


class Runs:
    """The same run, started again and again."""

    def __init__(self, *flags: object, cache: Path):
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "tests/runs_in_forks.py", *RUN, *map(str, flags)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, **pipes)

    def start(self) -> int:
        """The process number of one more."""
        self._process.stdin.write("\n")
        return int(self._process.stdout.readline())

    def finish(self) -> int:
        """The exit code of the last one, once it ended."""
        while not (line := self._process.stdout.readline().strip()).lstrip("-").isdigit():
            assert self._process.poll() is None  # what a run prints goes the same way
        return int(line)

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture
def runs(small_npz, tmp_path):
    made = []

    def of(*flags):
        made.append(Runs("--model", small_npz, *flags, cache=tmp_path / "xla"))
        return made[-1]

    yield of
    for each in made:
        each.end()


def unfinished(workdir: Path) -> int:
    """Checkpoints that a killed run was writing."""
    return sum(not (path / MANIFEST).exists() for path in (workdir / "checkpoints").glob("*"))


def losses(workdir: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_killed_twenty_times_it_ends_the_same(runs, tmp_path):
    workdir = tmp_path / "killed"
    killed = runs("--workdir", workdir, "--checkpoint-every", 1)
    alone = runs("--workdir", tmp_path / "alone", "--checkpoint-every", STEPS)
    alone.start()
    assert alone.finish() == 0

    moments, saving = random.Random(0), 0
    for number in range(KILLS):
        process, before = killed.start(), last_step(workdir)
        if number % 4 == 0:  # while it starts, restores or compiles
            time.sleep(moments.uniform(0, 3))
        else:  # some time after it has made progress: most of that time, it is saving
            while last_step(workdir) == before:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.2))
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
