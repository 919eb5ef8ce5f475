"""Wrong requests, told from defects and from failed runs.

Exit codes: 0 done, 1 a run or comparison failed, 2 the request was wrong. A `RequestError` ends in its one sentence and
exit code 2; a defect keeps its traceback.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator


class RequestError(ValueError):
    """What was asked for cannot be done; the message names the value and the remedy."""


class RunFailed(RuntimeError):
    """The request was right, but the run cannot go on; the message says why."""


def exit_code(main: Callable[[], object], *wrong_request: type[Exception]) -> int:
    """Runs a command's `main` and turns what it raises into a sentence on standard error and an exit code.

    Args:
        main: the command.
        wrong_request: further exceptions that mean a wrong request, such as another package's own.
    """
    try:
        with _handling_interrupts():
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
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    return 0


@dataclasses.dataclass
class _Interrupts:
    asked: bool = False
    deferred: bool = False


_interrupts = _Interrupts()


@contextlib.contextmanager
def deferring_interrupts() -> Iterator[None]:
    """Within, Ctrl-C only makes the next `raise_if_interrupted` raise, so that libraries are not interrupted half-way
    through a step or a save, where some have been seen to swallow the exception. A second one interrupts at once."""
    _interrupts.deferred = True
    try:
        yield
    finally:
        _interrupts.deferred = False


def raise_if_interrupted() -> None:
    if _interrupts.asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handling_interrupts() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        again, _interrupts.asked = _interrupts.asked, True
        if again or not _interrupts.deferred:
            raise KeyboardInterrupt
        os.write(2, b"interrupted: ending after this step; interrupt again to end at once\n")

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupts.asked = False


def _say(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code
