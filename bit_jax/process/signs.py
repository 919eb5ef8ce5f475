"""Signs that this process runs, for the process that started it.

That one makes a file and names it in the variable `VARIABLE`. While `giving` runs, the file holds this process's
number, and a thread touches it every second. The thread stands still where the whole process is stopped, as by SIGSTOP,
and where a call that does not return holds Python's lock, as one of a driver may. It goes on where the main thread
waits in vain: `training/stall.py` notices that.
"""

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator

from bit_jax.process.stillness import BEAT

VARIABLE = "BIT_JAX_SIGNS"
TRACES = signal.SIGUSR2  # has a process that gives signs write where its threads stand, even without Python's lock


@contextlib.contextmanager
def giving() -> Iterator[None]:
    """Gives signs while the `with` block runs, if another process has asked for them; only once in this process, and
    not in those that it starts, which would give them in its name."""
    path, file = os.environ.get(VARIABLE, ""), None
    with contextlib.suppress(OSError):  # made on another machine, or by a process that has ended
        file = os.open(path, os.O_WRONLY)
    if file is None:
        yield
        return
    del os.environ[VARIABLE]  # and not put back: XLA's threads may read the environment by then
    faulthandler.register(TRACES, file=2, all_threads=True)
    done = threading.Event()
    thread = threading.Thread(target=_give, args=(file, done), name="signs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        faulthandler.unregister(TRACES)


def _give(file: int, done: threading.Event) -> None:
    """Touches the file until `done`, and then empties it, because nobody is to be missed any more."""
    with contextlib.suppress(OSError), os.fdopen(file, "wb", buffering=0) as signs:  # a full disk takes no number
        signs.write(str(os.getpid()).encode())
        while not done.wait(BEAT):
            os.utime(signs.fileno())
        signs.truncate(0)
