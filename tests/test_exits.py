"""How commands end: codes, sentences, signals at any moment, pipes that nobody reads."""

import contextlib
import gc
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from input_pipeline import exits
from input_pipeline.errors import RequestError, RunFailed, Stopped
from input_pipeline.exits import deferring_signals, exit_code
from input_pipeline.terminal import console, printable


@pytest.fixture
def own_handlers():
    """Gives the tests' process its signal handlers back."""
    before = {number: signal.getsignal(number) for number in exits.ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RequestError("no such flag"), 2, "error: no such flag\n"),
        (RunFailed("it failed"), 1, "error: it failed\n"),
        (Stopped(15, "saved"), 143, "error: saved\n"),
        (PermissionError(13, "", "/x\x1b[31m"), 2, "the operating system refuses /x\\x1b[31m: Permission denied"),
        (BrokenPipeError(32, ""), 141, ""),
    ],
)
def test_codes_and_sentences(capfd, own_handlers, error, code, said):
    assert exit_code(raising(error)) == code
    assert said in capfd.readouterr().err


def test_what_main_returns_is_passed_on():
    assert [exit_code(lambda value=value: value) for value in (None, 0, 1, True)] == [0, 0, 1, 0]


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)


COMMAND = """
import sys, time, hashlib, gc
from input_pipeline.exits import exit_code, deferring_signals
def main():
    print("ready", flush=True)
    {body}
sys.exit(exit_code(main))
"""


@contextlib.contextmanager
def started(body: str, before: Sequence[str] = ()) -> Iterator[subprocess.Popen]:
    """A command that has begun to do the body; `before` is what starts it."""
    command = [*before, sys.executable, "-c", COMMAND.format(body=body)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", exits.ASKING)
def test_each_signal_ends_a_command_with_its_code(number):
    with started("time.sleep(600)") as process:
        process.send_signal(number)
        _, said = process.communicate()
        assert (process.returncode, said) == (128 + number, "error: interrupted\n")


def test_a_second_signal_ends_a_command_inside_compiled_code():
    """Python runs no handlers there, which lasts minutes in XLA's compiler."""
    compiling = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    with started(f"with deferring_signals(): print('deferring', flush=True); {compiling}") as process:
        assert process.stdout.readline() == "deferring\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith("asked to end: the step under way is finished")
        process.send_signal(signal.SIGHUP)
        assert process.stderr.read() == "error: ended at once, because it was asked a second time\n"
        assert process.wait() == 128 + signal.SIGHUP


def test_a_second_signal_ends_a_command_whose_terminal_is_not_read():
    """Standard error is a full pipe, as where a pager or a stopped terminal does not read."""
    with started("sys.stderr.write('x' * 10**6)") as process:
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_an_exception_that_a_callback_of_the_garbage_collector_loses_is_raised_again():
    lose = """
    def inside(phase, info):
        gc.callbacks.clear()
        import os
        os.kill(os.getpid(), 15)
        for _ in range(1000): pass
    gc.callbacks.append(inside)
    gc.collect()
    time.sleep(600)"""
    with started(lose.strip()) as process:
        _, said = process.communicate()
        assert (process.returncode, said) == (143, "error: interrupted\n")


def test_a_command_rarely_looks_for_cycles_of_objects(own_handlers):
    def main():
        before = gc.get_stats()[0]["collections"]
        kept = [[] for _ in range(50_000)]
        return gc.get_stats()[0]["collections"] - before + 0 * len(kept)

    assert exit_code(main) <= 6  # Python's own thresholds make it 65


def test_nohup_is_respected():
    with started("time.sleep(600)", before=["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143


def test_deferred_signals_only_show():
    asked = []

    def main():
        with deferring_signals():
            signal.raise_signal(signal.SIGUSR1)
            asked.append(exits.signal_asked())

    assert exit_code(main) == 0
    assert asked == [signal.SIGUSR1]
    assert exits.signal_asked() == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "signals" and thread.join(60)]


def test_output_that_is_no_longer_read_ends_a_command_quietly():
    with started("while True: print('line')") as process:
        process.stdout.close()
        assert process.wait() == 141
        assert process.stderr.read() == ""


def test_names_are_printed_without_what_a_terminal_would_obey():
    assert printable("caf\udce9 \x1b[31m\n é") == "caf\\xe9 \\x1b[31m\\n é"


def test_a_console_takes_names_as_they_are(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    console().print("runs/x[/red]y :smile: " + "w" * 300)
    assert out.getvalue() == "runs/x[/red]y :smile: " + "w" * 300 + "\n"
