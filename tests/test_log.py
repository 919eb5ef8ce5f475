"""What a run says while it goes on: metrics.jsonl is a result; nothing else can end or block training."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bit_jax.process import reporter
from bit_jax.process.reporter import Reporter
from bit_jax.training import log as logs
from bit_jax.training.log import Log
from input_pipeline.errors import RequestError


@pytest.fixture
def terminal(monkeypatch):
    """What the log's terminal was sent."""
    reading, writing = os.pipe()
    monkeypatch.setattr(logs, "_own_stderr", lambda: os.fdopen(os.dup(writing), "w", 1))
    yield lambda: os.read(reading, 1 << 16).decode()
    os.close(writing)
    os.close(reading)


def log_of(workdir, **settings):
    return Log(workdir, **{"start": 0, "stop": 10, "global_batch": 2} | settings)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_terminal_that_nobody_reads_blocks_nothing(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(reporter, "PATIENCE", 0.05)
    with log_of(tmp_path) as log:
        for step in range(5000):  # 64 KiB fit into the pipe
            log.write(step, loss=1.0)
            log.advance(step)
    assert len(lines_of(tmp_path)) == 5000


def test_a_terminal_that_is_gone_ends_nothing(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(logs, "_own_stderr", lambda: os.fdopen(writing, "w", 1))
    with log_of(tmp_path) as log:
        for step in range(3):
            log.write(step, loss=1.0)
    assert len(lines_of(tmp_path)) == 3


def test_names_and_warnings_are_shown_as_they_are(tmp_path, terminal):
    with log_of(tmp_path) as log:
        log.note("continuing runs/x[/red]y\x1b[31m\udce9")
        logging.getLogger("input_pipeline.loader").warning("example %s is damaged", "a.png")
    assert terminal() == "continuing runs/x[/red]y\\x1b[31m\\xe9\nexample a.png is damaged\n"


def test_tensorboard_without_a_disk_is_said_once(tmp_path, terminal):
    (tmp_path / "tensorboard").symlink_to("/dev/full")  # no directory, and not writable
    with log_of(tmp_path) as log:
        log.write(1, loss=1.0)
    assert terminal().count("TensorBoard's events cannot be written") == 1
    assert len(lines_of(tmp_path)) == 1


def test_tensorboard_reads_what_was_written(tmp_path, terminal):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with log_of(tmp_path) as log:
        log.write(1, loss=1.5)
        log.write(2, loss=2.5)
    with log_of(tmp_path, start=1) as log:  # step 2 is trained again
        log.write(2, loss=3.5)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.5), (2, 3.5)]


def test_the_log_imports_no_framework_beside_jax():
    """TensorBoard's other writers import TensorFlow or PyTorch where they are installed."""
    look = "import sys, bit_jax.training.log; sys.exit(bool({'tensorflow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", look], cwd=Path(__file__).parent.parent).returncode == 0


def test_a_loss_that_is_not_finite_is_null(tmp_path, terminal):
    """A step that overflows in float16 has such a loss. Other programs than Python's refuse NaN and Infinity."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": Infinity}\n')  # as older versions wrote it
    with log_of(tmp_path, start=1) as log:
        log.write(2, loss=float("nan"), images_per_s=3.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "images_per_s": 3.0},
    ]
    assert "loss nan" in terminal()


def test_metrics_that_cannot_be_written_end_the_run_with_the_cause(tmp_path, terminal):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RequestError, match=r"cannot write .*metrics.jsonl \(No space left"), log_of(tmp_path) as log:
        log.write(1, loss=1.0)


def test_damaged_lines_are_dropped_and_said(tmp_path, terminal):
    good = [b'{"step": 1, "loss": 1.0}', b'{"step": 2, "val_acc1": 0.5}', b'{"step": 3, "loss": 1.0}']
    bad = [b'{"step": 1, "lo', b"\xff\xfe", b"[1]", b"{}", b'{"step": "x"}', b"[" * 100_000]
    lines = [good[0], *bad, *good[1:], b'{"step": 2']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with log_of(tmp_path, start=2) as log:
        assert log.evaluated(2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    assert f"{len(bad)} damaged line(s) dropped" in terminal()


def test_a_report_that_blocks_holds_up_nothing(monkeypatch):
    monkeypatch.setattr(reporter, "PATIENCE", 0.05)
    monkeypatch.setattr(reporter, "WAITING", 2)
    never, done = threading.Event(), []
    report = Reporter("test")
    report(never.wait)
    for number in range(100):
        report(lambda number=number: done.append(number))
    report.close()
    assert not done
    never.set()
