"""The end of a command: exit codes, signals and closed pipes.

Exit codes: 0 done; 1 a run or comparison failed, or another host did; 2 the request was wrong; 128 plus the signal's
number if a signal ended the command, as in shells (130 for Ctrl-C, 143 for SIGTERM, 141 for a closed pipe). A
`RequestError` ends in its one sentence and exit code 2; a defect keeps its traceback.

The first SIGINT, SIGTERM, SIGHUP (a closed terminal) or SIGUSR1 (which `sbatch --signal` often sends) asks the command
to end in good order. The second one ends it at once, whatever it is doing.
"""

import contextlib
import dataclasses
import errno
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from input_pipeline.errors import RequestError, RunFailed, Stopped
from input_pipeline.terminal import printable

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
RETRY = 0.05  # seconds until an exception that Python had to drop is raised again
LEAVING = 60.0  # seconds for threads to end in, which finish what they read or write
SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it, and a process that ends at once cannot clean up


def collect_less() -> None:
    """Has Python look for cycles of objects more rarely, which is what its collector does besides counting references.

    While a short run of `train.py` starts, traces and compiles, Python by itself looks 850 times, some of them among
    all objects there are, which takes a tenth of that time.
    """
    gc.set_threshold(10_000, 10, 10)  # Python's own first number is 700


def exit_code(main: Callable[[], object]) -> int:
    """Runs a command's `main` and turns what it raises into a sentence on standard error and an exit code.

    Args:
        main: the command. The exit code that it returns, if it returns an int, is passed on.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test may have put something else in their place
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that the terminal cannot show
    collect_less()
    try:
        with _handling_signals():
            try:
                code = main()
            except SystemExit:  # after --help: flush now, because a closed pipe would raise a warning at Python's end
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
        for number in ASKING:  # Python's end may wait for threads; meanwhile a second signal kills the process
            signal.signal(number, signal.SIG_DFL)
        return _say(str(stopped), 128 + stopped.number)
    return code if isinstance(code, int) and not isinstance(code, bool) else 0


def leave(code: int) -> NoReturn:
    """Ends this process, within `LEAVING` seconds even if one of its threads never returns, as from a file system that
    does not answer: Python's end would wait for it."""

    def end() -> None:
        tell(f"error: a thread has not ended in {LEAVING:g} s, and this process ends without it\n".encode())
        os._exit(code)

    timer = threading.Timer(LEAVING, end)
    timer.daemon = True
    timer.start()
    sys.exit(code)


def _closed_pipe() -> int:
    """Ends silently, because the reader of the output, such as `head`, has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nowhere, sys.stdout.fileno())  # otherwise Python complains at its end that it cannot flush
    os.close(nowhere)
    return 128 + signal.SIGPIPE


@dataclasses.dataclass
class _Ending:
    abrupt: bool = False


_ending = _Ending()


def end_abruptly(abrupt: bool = True) -> None:
    """Sets whether any error ends the process at once, without Python's clean-up, which may wait for threads."""
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
    decisive: str = ""  # the sentence with which the first signal ends this process
    repeated: int = 0  # signals that this process sent to itself and that have not arrived yet


_signals = _Signals()


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """Makes the first signal show only in `signal_asked` while the `with` block runs, so that it does not interrupt a
    step or a save, where some libraries swallow the exception. A second signal ends the process at once."""
    _signals.deferred = True
    try:
        yield
    finally:
        _signals.deferred = False


@contextlib.contextmanager
def ended_by_first_signal(sentence: str) -> Iterator[None]:
    """Makes the first signal end the process at once, with the sentence, while the `with` block runs: for a call of a
    library that does not come back for minutes, in which Python cannot run the signal's handler."""
    _signals.decisive = sentence
    try:
        yield
    finally:
        _signals.decisive = ""


def signal_asked() -> int:
    """Returns the number of the signal that asked this process to end, or 0 if none did."""
    return _signals.asked


@contextlib.contextmanager
def _handling_signals() -> Iterator[None]:
    """Makes the first signal raise `Stopped` in the main thread, unless signals are deferred, and the second one end
    the process.

    Python runs a signal's handler between two instructions of the main thread, which may be inside a compiler for
    minutes. The interpreter also writes each signal's number into a pipe as it arrives, and a thread that reads the
    pipe ends the process. Python drops an exception that a handler raises within a garbage collector's callback or a
    finalizer, and reports it to `sys.unraisablehook`; that hook sends the signal once more.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # nohup starts a process with SIGHUP ignored, and it stays ignored
    asking = [number for number in ASKING if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
    handlers = {number: signal.signal(number, _asked) for number in asking}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    dropped, sys.unraisablehook = sys.unraisablehook, _not_dropped
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        sys.unraisablehook = dropped
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writing)  # this ends the thread
        _signals.asked = 0


def _asked(number: int, _: object) -> None:
    """Handles a signal; Python calls it in the main thread."""
    _signals.asked = _signals.asked or number
    if not _signals.deferred:
        raise Stopped(number, "interrupted")


def _watch(reading: int) -> None:
    """Counts signals as they arrive, in a thread of its own, until the pipe is closed."""
    count = 0
    with open(reading, "rb", buffering=0) as pipe:
        while byte := pipe.read(1):
            if byte[0] not in ASKING:
                continue
            if _signals.repeated:
                _signals.repeated -= 1
                continue
            count += 1
            if _signals.decisive:
                end_at_once(_signals.decisive, 128 + byte[0])
            if count > 1:
                end_at_once("ended at once, because it was asked a second time", 128 + byte[0])
            if _signals.deferred:
                tell(b"asked to end: the step under way is finished and saved; ask again to end at once\n")


def end_at_once(sentence: str, code: int) -> NoReturn:
    """Ends the process with the sentence and the exit code, from any thread, whatever the others are doing."""
    tell(f"error: {printable(sentence)}\n".encode())
    os._exit(code)


def tell(line: bytes) -> None:
    """Writes to standard error without Python's buffers, whose locks another thread may hold, and without waiting."""
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
