"""Wrong requests, told from defects and from failed runs.

Exit codes: 0 done; 1 a run or comparison failed, or another host did; 2 the request was wrong; 130 and 143 ended by
Ctrl-C and SIGTERM, 128 and the signal's number, as shells count. A `RequestError` ends in its one sentence and exit
code 2; a defect keeps its traceback.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


class RequestError(ValueError):
    """What was asked for cannot be done; the message names the value and the remedy."""


class RunFailed(RuntimeError):
    """The request was right, but the run cannot go on; the message says why."""


class Stopped(BaseException):
    """A signal ended the run; the message says what is saved. As KeyboardInterrupt, it is nothing to recover from."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


def exit_code(main: Callable[[], object], *wrong_request: type[Exception]) -> int:
    """Runs a command's `main` and turns what it raises into a sentence on standard error and an exit code.

    Args:
        main: the command.
        wrong_request: further exceptions that mean a wrong request, such as another package's own.
    """
    try:
        with _handling_signals():
            main()
    except (RequestError, *wrong_request) as error:
        return _say(str(error), 2)
    except RunFailed as error:
        return _say(str(error), 1)
    except OSError as error:
        if error.errno is None:
            raise
        where = f" {error.filename}" if error.filename else ""
        return _say(f"the operating system refuses{where}: {os.strerror(error.errno)}; mend that and start again", 2)
    except Stopped as stopped:
        return _say(str(stopped), 128 + stopped.number)
    return 0


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


_signals = _Signals()


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """Within, the first Ctrl-C or SIGTERM only shows in `signal_asked`, so that libraries are not interrupted half-way
    through a step or a save, where some have been seen to swallow the exception. A second one ends at once."""
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
    def handle(number: int, _: object) -> None:
        again, _signals.asked = _signals.asked, number
        if again or not _signals.deferred:
            raise Stopped(number, "interrupted")
        os.write(2, b"asked to end: the step under way is finished and saved; ask again to end at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.asked = 0


def _say(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    if _ending.abrupt:
        os._exit(code)
    return code
