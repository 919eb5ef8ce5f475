"""How a command ends: exit codes, signals, closed pipes.

Exit codes: 0 done; 1 a run or comparison failed, or another host did; 2 the request was wrong; 128 and the signal's
number where a signal ended it, as shells count (130 for Ctrl-C, 143 for SIGTERM, 141 for a closed pipe). A
`RequestError` ends in its one sentence and exit code 2; a defect keeps its traceback.

The first SIGINT, SIGTERM, SIGHUP (a closed terminal) or SIGUSR1 (what `sbatch --signal` is often told to send) asks the
command to end in good order. The second one ends it at once, whatever it is doing.
"""

import contextlib
import dataclasses
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from input_pipeline.errors import RequestError, RunFailed, Stopped
from input_pipeline.terminal import printable

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
RETRY = 0.05  # seconds until an exception that Python had to drop is raised again
SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it, and a process that ends at once cannot clean up


def exit_code(main: Callable[[], object]) -> int:
    """Runs a command's `main` and turns what it raises into a sentence on standard error and an exit code.

    Args:
        main: the command. The exit code that it returns, if it returns an int, is passed on.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test may have put something else in their place
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that the terminal cannot show
    try:
        with _handling_signals():
            try:
                code = main()
            except SystemExit:  # --help has been printed; at Python's end a closed pipe would be no longer quiet
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except RequestError as error:
        return _say(str(error), 2)
    except RunFailed as error:
        return _say(str(error), 1)
    except BrokenPipeError:
        return _closed_pipe()
    except OSError as error:
        if error.errno is None:
            raise
        where = f" {error.filename}" if error.filename else ""
        remedy = "raise ulimit -n" if error.errno in (errno.EMFILE, errno.ENFILE) else "mend that"
        return _say(f"the operating system refuses{where}: {os.strerror(error.errno)}; {remedy} and start again", 2)
    except Stopped as stopped:
        for number in ASKING:  # while Python ends, which may wait for threads, a second signal kills
            signal.signal(number, signal.SIG_DFL)
        return _say(str(stopped), 128 + stopped.number)
    return code if isinstance(code, int) and not isinstance(code, bool) else 0


def _closed_pipe() -> int:
    """What reads the output has gone, as `head` does: nothing is left to say, and nobody to say it to."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nowhere, sys.stdout.fileno())  # or Python would complain at its end that it cannot flush
    os.close(nowhere)
    return 128 + signal.SIGPIPE


@dataclasses.dataclass
class _Ending:
    abrupt: bool = False


_ending = _Ending()


def end_abruptly(abrupt: bool = True) -> None:
    """Whether an error, of `exit_code`'s or any other, ends the process without what Python does at its end."""
    _ending.abrupt = abrupt
    sys.excepthook = _show_and_end if abrupt else sys.__excepthook__


def _show_and_end(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    sys.__excepthook__(kind, error, traceback)
    sys.stderr.flush()
    os._exit(1)


@dataclasses.dataclass
class _Signals:
    asked: int = 0  # the signal that asked this process to end
    deferred: bool = False
    repeated: int = 0  # signals under way that this process sent itself


_signals = _Signals()


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """Within, the first signal only shows in `signal_asked`, so that libraries are not interrupted half-way through a
    step or a save, where some have been seen to swallow the exception. A second one ends the process at once."""
    _signals.deferred = True
    try:
        yield
    finally:
        _signals.deferred = False


def signal_asked() -> int:
    """The number of the signal that asked this process to end; 0 where none did."""
    return _signals.asked


@contextlib.contextmanager
def _handling_signals() -> Iterator[None]:
    """The first signal raises `Stopped` in the main thread, unless signals are deferred; the second ends the process.

    Python runs a signal's handler between two instructions of the main thread, which may be inside a compiler for
    minutes. The interpreter also writes each signal's number into a pipe as it arrives; a thread that reads the pipe
    ends the process. An exception that a handler raises within a garbage collector's callback or a finalizer is
    dropped by Python, which reports it to `sys.unraisablehook`; there it is asked for once more.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # nohup asks for SIGHUP to be ignored; that is its meaning
    asking = [number for number in ASKING if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
    before = {number: signal.signal(number, _asked) for number in asking}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    dropped, sys.unraisablehook = sys.unraisablehook, _not_dropped
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        sys.unraisablehook = dropped
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)  # which ends the thread
        _signals.asked = 0


def _asked(number: int, _: object) -> None:
    """The handler: it runs in the main thread."""
    _signals.asked = _signals.asked or number
    if not _signals.deferred:
        raise Stopped(number, "interrupted")


def _watch(reading: int) -> None:
    """The thread that counts signals as they arrive; it ends with the pipe."""
    count = 0
    with open(reading, "rb", buffering=0) as pipe:
        while byte := pipe.read(1):
            if byte[0] not in ASKING:
                continue
            if _signals.repeated:
                _signals.repeated -= 1
                continue
            count += 1
            if count > 1:
                _tell(b"error: ended at once, because it was asked a second time\n")
                os._exit(128 + byte[0])
            if _signals.deferred:
                _tell(b"asked to end: the step under way is finished and saved; ask again to end at once\n")


def _tell(line: bytes) -> None:
    """Writes to standard error without Python's buffers, whose locks another thread may hold."""
    with contextlib.suppress(OSError):
        blocking = os.get_blocking(2)
        os.set_blocking(2, False)  # a terminal that nobody reads must not keep the process from ending
        try:
            os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + line)
        finally:
            os.set_blocking(2, blocking)


def _not_dropped(unraisable: Any) -> None:
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)
        return

    def again() -> None:
        _signals.repeated += 1
        signal.pthread_kill(threading.main_thread().ident or 0, unraisable.exc_value.number)

    timer = threading.Timer(RETRY, again)
    timer.daemon = True
    timer.start()


def _say(sentence: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed
        print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    if _ending.abrupt:
        os._exit(code)
    return code
