"""A run that is asked to end twice, at any moment, ends at once."""

import os
import random
import signal
import time

import pytest
from conftest import last_step

from input_pipeline.exits import ASKING

DOUBLES = 20
WITHIN = 10.0  # seconds; on a quiet machine the longest took less than one


@pytest.mark.slow
def test_twenty_double_signals_at_random_moments(runs, tmp_path):
    """While it starts, traces, compiles, trains, saves and evaluates."""
    moments, workdir = random.Random(0), tmp_path / "run"
    fresh = runs("--workdir", workdir, "--checkpoint-every", 1, "--eval-every", 3, "--steps", 100000)
    seconds, start = [], 0.0
    for number in range(DOUBLES):
        process, before = fresh.start(), last_step(workdir)
        if number % 2:  # from its first moment on: imports are done, all else lies ahead
            time.sleep(moments.uniform(0, 1.5 * start))
        else:  # in the midst of steps, evaluations and saving
            began = time.monotonic()
            fresh.until_progress(process, workdir, before)
            start = time.monotonic() - began
            time.sleep(moments.uniform(0, 1))
        first, second = moments.choice(ASKING), moments.choice(ASKING)
        os.kill(process, first)
        time.sleep(moments.uniform(0.002, 0.3))
        sent = time.monotonic()
        with_second = True
        try:
            os.kill(process, second)
        except ProcessLookupError:
            with_second = False
        code = fresh.finish()
        took = time.monotonic() - sent
        assert code in {128 + first, 128 + second, -second}, code  # the last where Python was ending already
        if with_second:
            seconds.append(took)
    print(f"{len(seconds)} of {DOUBLES} lived to see the second; the longest then took {max(seconds):.2f} s")
    assert max(seconds) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_one_signal_is_enough_whatever_the_run_does(runs, tmp_path, number):
    """Also where Python loses the exception: in a finalizer, or in a callback of the garbage collector."""
    moments, workdir = random.Random(1), tmp_path / "run"
    asked = runs("--workdir", workdir, "--checkpoint-every", 1, "--eval-every", 3, "--steps", 100000)
    start = 0.0
    for run in range(6):
        process, before, began = asked.start(), last_step(workdir), time.monotonic()
        if run < 2:  # the first compiles, the second takes what it compiled, as all others do
            asked.until_progress(process, workdir, before)
            start = time.monotonic() - began
        time.sleep(moments.uniform(0, 1.5 * start))
        os.kill(process, number)
        assert asked.finish() == 128 + number
