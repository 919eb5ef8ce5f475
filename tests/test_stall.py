"""A run that hangs ends by itself, says where it stood and records it; one that is slow, or was stopped, goes on."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import HARDLY_OPTIMIZES, ROOT, SMALL_DIGITS, last_step

from bit_jax import load
from bit_jax.accounts import starts
from bit_jax.accounts.starts import Start
from bit_jax.accounts.timeline import Timeline
from bit_jax.process.stillness import BEAT, Stillness
from bit_jax.scale import hosts
from bit_jax.training import finetuning
from bit_jax.training.loop import Loop
from bit_jax.training.stall import FIRST, Watchdog
from bit_jax.training.steps import TrainState
from input_pipeline import exits

LIMIT = 30.0


class Run:
    """A run that a test drives, with its watchdog's clock."""

    def __init__(self, limit: float = LIMIT):
        self.now = 1000.0
        self.timeline = Timeline()
        self.watchdog = Watchdog(limit, self.timeline, lambda: self.now)

    def step(self, step: int) -> None:
        if self.watchdog.account is None:
            self.watchdog.account = Start(None, self.timeline, hosts=1, devices=1, global_batch=1)
            self.watchdog.account.continues_from(0)
        self.watchdog.account.step = step

    def hangs(self, seconds: float) -> tuple[float, str] | None:
        """What the watchdog says, and after how many seconds, if nothing happens for so long."""
        began = self.now
        while self.now < began + seconds:
            self.now += BEAT
            if sentence := self.watchdog.look():
                return self.now - began, sentence
        return None


def test_what_hangs_is_said_with_its_place():
    run = Run()
    run.step(41)
    with run.timeline("evaluation"):
        run.hangs(2)
        seconds, sentence = run.hangs(2 * LIMIT) or (0, "")
    assert LIMIT - 2 <= seconds <= LIMIT + 2
    assert sentence.startswith(f"the run has made no progress for {LIMIT + BEAT:.0f} s, since ")
    assert sentence.endswith(", after step 41 (evaluation)")


def test_before_the_first_step_there_is_more_time():
    run = Run()
    with run.timeline("compilation"):
        seconds, sentence = run.hangs(2 * FIRST) or (0, "")
    assert FIRST <= seconds <= FIRST + 2
    assert sentence.endswith("before the first step (compilation)")
    run = Run()
    run.step(0)  # the account is there, and nothing trained yet
    with run.timeline("reading"):
        assert run.hangs(FIRST - 2) is None
    run = Run(3 * FIRST)
    assert run.hangs(3 * FIRST - 2) is None
    assert run.hangs(4) is not None


@pytest.mark.parametrize("what", ["begins", "ends", "goes on", "another host"])
def test_progress_of_any_kind_counts(what, monkeypatch):
    run, others = Run(), [7, 7]
    monkeypatch.setattr(hosts, "progress", lambda: tuple(others))
    run.step(1)
    with run.timeline("whole"):
        for _ in range(3):
            if what == "begins":
                run.timeline("reading").__enter__()
                assert run.hangs(LIMIT - 1) is None
            elif what == "ends":
                with run.timeline("reading"):
                    assert run.hangs(LIMIT - 1) is None
                assert run.hangs(LIMIT - 1) is None
            elif what == "goes on":
                run.timeline.goes_on()
                assert run.hangs(LIMIT - 1) is None
            else:
                others[1] += 1
                assert run.hangs(LIMIT - 1) is None
        assert run.hangs(LIMIT) is not None


def test_what_was_stopped_for_an_hour_goes_on():
    run = Run()
    run.step(1)
    assert run.hangs(LIMIT - 5) is None
    run.now += 3600
    assert run.hangs(2) is None
    run.timeline.goes_on()
    assert run.hangs(LIMIT - 1) is None


def test_stillness_counts_two_beats_between_two_looks_at_most():
    now = [0.0]
    still = Stillness(lambda: now[0])
    assert still("a") == 0
    now[0] += BEAT / 2
    assert still("a") == BEAT / 2
    now[0] += 100 * BEAT
    assert still("a") == 2.5 * BEAT
    assert still("b") == 0


def test_an_evaluation_goes_on_with_every_batch():
    """The loop tells the timeline, and each batch only once it is finished."""

    class Sums(dict):
        def __getitem__(self, name):
            turns.append(timeline.turns)  # whoever wants a value waits for the batch
            return super().__getitem__(name)

    turns: list[int] = []
    timeline, values = Timeline(), {name: np.int32(0) for name in ("loss", "correct1", "correct5", "signal")}
    nothing: Any = None
    log: Any = SimpleNamespace(write=lambda *_, **__: None)
    program: Any = SimpleNamespace(
        for_evaluation=lambda params: params, eval_step=lambda params, batch: Sums(values | {"seen": np.int32(1)})
    )
    run: Any = SimpleNamespace(validation=range(4))
    validation: Any = SimpleNamespace(evaluation=lambda: ((number, {}) for number in range(4)))
    loop = Loop(run, program, validation, nothing, timeline, log, nothing)
    loop.__dict__["asking"] = lambda batch: batch
    loop.evaluate(TrainState(np.int32(1), {}, ({}, ())), 1)
    assert sorted(set(turns)) == [1, 2, 3, 4, 5]  # the activity began, and four batches


def test_final_weights_that_are_written_go_on_with_every_array(small_npz, tmp_path):
    params, written = load(small_npz)[1], []
    workdir: Any = SimpleNamespace(final=tmp_path / "final.npz")
    finetuning.save_final(workdir, params, progress=lambda: written.append(True))
    assert len(written) == len(np.load(workdir.final)) > 10


HANGS = """
import os, sys, threading, time
from bit_jax.accounts.starts import Start
from bit_jax.accounts.timeline import Timeline
from bit_jax.process import reporter
from bit_jax.training import stall
from pathlib import Path

stall.BEAT, stall.FIRST, reporter.PATIENCE = 0.1, 0.1, 0.3

def waits_in_vain():
    threading.Event().wait()

threading.Thread(target=waits_in_vain, name="input_7", daemon=True).start()
timeline = Timeline()
with stall.Watchdog(0.1, timeline) as watchdog, timeline("reading"):
    with Start(Path(sys.argv[1]), timeline, hosts=1, devices=1, global_batch=1) as watchdog.account:
        watchdog.account.continues_from(3)
        if len(sys.argv) > 2:
            sys.stderr.write("x" * 2**20)  # the pipe is full, and the main thread waits with the stream's lock
        waits_in_vain()
"""


def hanging(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HANGS, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE)


def test_a_process_that_hangs_ends_with_a_sentence_and_its_threads(tmp_path):
    process = hanging(tmp_path / starts.NAME)
    said = process.communicate(timeout=600)[1].decode()
    assert process.returncode == 1
    first, *threads = said.splitlines()
    assert first.startswith("error: the run has made no progress for ")
    assert " after step 3 (reading); the same command continues from the last checkpoint; " in first
    (of_input,) = [index for index, line in enumerate(threads) if "[input_7]" in line]
    assert any("in waits_in_vain" in line for line in threads[of_input + 1 : of_input + 5])
    assert any("in <module>" in line for line in threads)  # the main thread's
    ((*_, last),) = starts.read(tmp_path / starts.NAME)
    assert (last.ended, last.activity, last.step) == ("stalled", "reading", 3)
    assert f"error: {last.why}; " in first


def test_nothing_that_is_stuck_keeps_it_from_ending(tmp_path):
    os.mkfifo(tmp_path / starts.NAME)  # a disk that never answers, and a terminal that nobody reads
    process = hanging(tmp_path / starts.NAME, "a full pipe")
    assert process.wait(60) == 1
    process.communicate()


LEAVES = """
import threading
from concurrent.futures import ThreadPoolExecutor
from input_pipeline import exits
exits.LEAVING = 0.2
ThreadPoolExecutor(1).submit(threading.Event().wait)
exits.leave(3)
"""


def test_a_thread_that_never_ends_does_not_keep_a_process_from_ending():
    done = subprocess.run([sys.executable, "-c", LEAVES], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (
        3,
        "error: a thread has not ended in 0.2 s, and this process ends without it\n",
    )
    assert exits.LEAVING > 5  # what is being written is finished first


TRAIN = f"{SMALL_DIGITS} --warmup-steps 2 --decay-steps 6 --log-every 1 --checkpoint-every 4 --global-batch 8".split()


@pytest.fixture(scope="module")
def environment(compilation_cache):
    return os.environ | compilation_cache | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": HARDLY_OPTIMIZES}


@pytest.fixture
def launched(environment, tmp_path):
    """(arguments of the launcher) -> it, started; it writes to said.txt."""
    running = []

    def start(*arguments):
        command = [sys.executable, "-m", "bit_jax.launch", "--devices", "1", "--back-off", "0.5", *map(str, arguments)]
        with open(tmp_path / "said.txt", "wb") as said:
            output = {"stdout": subprocess.DEVNULL, "stderr": said}
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **output))
        return running[-1]

    yield start
    for started in running:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(started.pid).children(recursive=True):
                child.kill()
        started.kill()
        started.wait()


def until(condition, launcher, said) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + 300
    while not condition():
        assert launcher.poll() is None, said.read_text()
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.02)


# reading hangs as long as there is a file `hangs`
HANGS_WHILE_IT_READS = """
import threading
from pathlib import Path
from bit_jax import train
from input_pipeline.exits import exit_code, leave
from input_pipeline.loader import Loader

def never_answers(self, *arguments):
    if Path(__file__).with_name("hangs").exists():
        threading.Event().wait()
    return fill_row(self, *arguments)

fill_row, Loader._fill_row = Loader._fill_row, never_answers
leave(exit_code(train.main))
"""


@pytest.mark.slow
def test_a_run_goes_on_after_its_input_hung_and_after_it_was_stopped(launched, small_npz, tmp_path):
    """On one host, which nobody else watches."""
    workdir, said, hangs = tmp_path / "run", tmp_path / "said.txt", tmp_path / "hangs"
    (tmp_path / "train.py").write_text(HANGS_WHILE_IT_READS)
    own = ["--hosts", 1, "--restarts", 2, "--silence", 15, "--", tmp_path / "train.py", "digits"]
    run = [*TRAIN, "--model", small_npz, "--workdir", workdir, "--steps", 90, "--eval-every", 100]
    launcher = launched(*own, *run, "--stall-timeout", 15)
    until(lambda: last_step(workdir) >= 3, launcher, said)
    hangs.touch()
    until(lambda: "restart 1 of 2 is in 0.5 s" in said.read_text(), launcher, said)
    hangs.unlink()
    stalled_at = last_step(workdir)
    until(lambda: "start 2 is on 1 host" in said.read_text(), launcher, said)
    until(lambda: last_step(workdir) >= stalled_at + 3, launcher, said)
    host = next(child for child in psutil.Process(launcher.pid).children(recursive=True) if "--host" in child.cmdline())
    host.suspend()
    assert launcher.wait(300) == 0, said.read_text()

    lines = said.read_text().splitlines()
    (sentence,) = [line for line in lines if "error: host 0 of 1: the run has made no progress for " in line]
    assert f", after step {stalled_at} (reading); " in sentence
    assert [line for line in lines if "[input_" in line]
    assert [line for line in lines if "in never_answers" in line]
    first, second = [line for line in lines if line.startswith("launch: start ") and " ended" in line]
    assert first.startswith(f"launch: start 1 ended after step {stalled_at}: the run has made no progress for 1")
    assert "host 0 gave no sign of life any more, and was killed; restart 2 of 2" in second
    ended = [start[-1].ended for start in starts.read(workdir / starts.NAME)]
    assert ended == ["stalled", None, "finished"]
    assert json.loads((workdir / "result.json").read_text())["over_all_starts"]["seconds"]["standing still"] > 10


# host 1 stops itself in the activities of stops.txt, one in each start
STOPS_ITSELF = """
import contextlib, os, signal, sys, time
from pathlib import Path
from bit_jax import train
from bit_jax.accounts.timeline import Timeline
from input_pipeline.exits import exit_code, leave

stops = Path(__file__).with_name("stops.txt")

class Stopping(Timeline):
    @contextlib.contextmanager
    def __call__(self, activity):
        with super().__call__(activity):
            if sys.argv[-1] == "1" and activity == stops.read_text().split(" ")[0]:
                time.sleep(2.5)  # it still says where it is
                stops.write_text(stops.read_text().partition(" ")[2])
                os.kill(os.getpid(), signal.SIGSTOP)
            yield

train.Timeline = Stopping
leave(exit_code(train.main))
"""


@pytest.mark.slow
def test_a_host_that_freezes_is_named_with_its_activity_wherever_it_is(launched, small_npz, tmp_path):
    activities = ["compilation", "saving", "evaluation"]
    (tmp_path / "train.py").write_text(STOPS_ITSELF)
    (tmp_path / "stops.txt").write_text(" ".join(activities))
    workdir, said = tmp_path / "run", tmp_path / "said.txt"
    run = ["digits", *TRAIN, "--model", small_npz, "--workdir", workdir, "--steps", 8, "--eval-every", 4]
    own = ["--hosts", 2, "--restarts", 3, "--grace", 60, "--silence", 20]
    launcher = launched(*own, "--", tmp_path / "train.py", *run, "--host-timeout", 15)
    assert launcher.wait(1200) == 0, said.read_text()
    lines = said.read_text().splitlines()
    lost = [line for line in lines if line.startswith("error: host 0 of 2: host 1 is not heard")]
    assert [re.search(r"\((\w+)\)", line)[1] for line in lost] == activities, lost
    assert json.loads((workdir / "result.json").read_text())["hosts"] == 2
