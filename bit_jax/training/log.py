"""A run's log: metrics.jsonl, TensorBoard events, the progress bar and lines on the terminal.

metrics.jsonl is a result: if it cannot be written, the run ends and says why. Everything else only reports, in threads
with bounded queues, so that a full disk, a closed pipe or a terminal that nobody reads neither ends nor blocks
training.
"""

import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from bit_jax.process.reporter import Reporter
from bit_jax.training import metrics
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.files import json_text, replacing
from input_pipeline.terminal import printable


class Log:
    """The log of one run. A continued run drops the lines of steps that will be trained again.

    Args:
        workdir: directory that receives metrics.jsonl and tensorboard/.
        start, stop: the steps at which the run starts and stops training.
        global_batch: examples per step, for the rate that the progress bar shows.
        quiet: whether nothing is written or printed, as on all hosts but the first.
    """

    def __init__(self, workdir: Path, *, start: int, stop: int, global_batch: int, quiet: bool = False):
        self._path = workdir / "metrics.jsonl"
        self._start, self._stop, self._global_batch = start, stop, global_batch
        self._began = time.perf_counter()
        stderr = _own_stderr()
        self._console = terminal.console(file=stderr, quiet=quiet)
        self._terminal = Reporter("terminal", stderr.close if stderr is not sys.stderr else lambda: None)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("training", total=stop, completed=start, rate="")
        kept, bad = metrics.read(self._path, last=start)
        self._last = [entry for entry in kept if entry["step"] == start]
        if bad:
            self.note(f"{self._path}: {bad} damaged line(s) dropped")
        try:
            if self._path.is_file() and not quiet:
                with replacing(self._path) as file:
                    file.write("".join(json_text(entry) + "\n" for entry in kept).encode())
            self._file = open(os.devnull if quiet else self._path, "a", buffering=1)  # noqa: SIM115 (closed on exit)
        except OSError as error:
            raise self._unwritable(error) from None
        self._board = None if quiet else _Board(workdir / "tensorboard", start, self.note)
        self._handler = _ToLog(self.note)

    def __enter__(self) -> "Log":
        logging.getLogger().addHandler(self._handler)
        if self._console.is_terminal:
            self._terminal(self._progress.start)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger().removeHandler(self._handler)
        if self._board is not None:
            self._board.close()
        if self._console.is_terminal:
            self._terminal(self._progress.stop)
        self._terminal.close()
        try:
            self._file.close()
        except OSError as error:  # the last line is still in the buffer
            if not any(exception):
                raise self._unwritable(error) from None

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has an evaluation of `step`, which must be the step that the run continues from."""
        return any(entry["step"] == step and "val_acc1" in entry for entry in self._last)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step` steps in all."""
        rate = (step - self._start) * self._global_batch / (time.perf_counter() - self._began)
        self._terminal(lambda: self._progress.update(self._task, completed=step, rate=f"{rate:,.0f} images/s"))

    def write(self, step: int, shown: Collection[str] | None = None, /, **scalars: float) -> None:
        """Writes a line of metrics.jsonl, and the same scalars to TensorBoard and the terminal. In metrics.jsonl, null
        stands for one that is not finite, as for the loss of a step that overflowed in float16.

        Args:
            shown: names of the scalars that the terminal shows; None: it shows all.

        Raises:
            RequestError: metrics.jsonl cannot be written.
        """
        try:
            self._file.write(json_text({"step": step, **scalars}) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None
        if self._board is not None:
            self._board.write(step, scalars)
        self.note(self._line(step, {name: scalars[name] for name in scalars if shown is None or name in shown}))

    def note(self, sentence: str) -> None:
        """Shows a sentence on the terminal."""
        self._terminal(lambda: self._progress.console.print(printable(sentence)))

    def _unwritable(self, error: OSError) -> RequestError:
        return RequestError(f"cannot write {self._path} ({error.strerror}); mend that and start again to continue")

    def _line(self, step: int, scalars: dict[str, float]) -> str:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        done = max(step - self._start, 1)
        left = (time.perf_counter() - self._began) / done * (self._stop - step)
        return f"step {step:>{len(str(self._stop))}}/{self._stop}  {shown}  {math.ceil(left)} s left"


class _Board:
    """TensorBoard events, one file for each start of a run."""

    def __init__(self, directory: Path, start: int, note: Callable[[str], None]):
        self._report = Reporter("tensorboard", self._end)
        self._note, self._noted = note, False
        self._writer: RecordWriter | None = None
        self._report(lambda: self._open(directory, start))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._say_failure()
        now = time.time()
        self._report(lambda: self._add(step, scalars, now))

    def close(self) -> None:
        self._report.close()
        self._say_failure()

    def _open(self, directory: Path, start: int) -> None:
        directory.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names; nanoseconds, because a run may start twice in a second
        path = directory / f"events.out.tfevents.{time.time_ns()}"
        # TensorBoard's own EventFileWriter would import TensorFlow where that is installed
        self._writer = RecordWriter(open(path, "wb"))  # noqa: SIM115 (closed by `_end`)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # this makes TensorBoard drop events of an earlier start from this step on
        session = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=start + 1, session_log=session))

    def _add(self, step: int, scalars: dict[str, float], now: float) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(wall_time=now, step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        assert self._writer is not None
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _say_failure(self) -> None:
        if self._report.failure and not self._noted:
            self._noted = True
            self._note(f"TensorBoard's events cannot be written ({self._report.failure}); the run goes on without them")


class _ToLog(logging.Handler):
    """Handler that shows warnings of libraries and of the input pipeline without waiting for the terminal."""

    def __init__(self, note: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(record.getMessage())


def _own_stderr() -> Any:
    """Opens standard error as a file object that nobody else uses. A thread that is blocked while writing to it then
    holds no lock that the end of the process needs."""
    if not isinstance(sys.stderr, io.TextIOWrapper):  # a test has replaced it
        return sys.stderr
    try:
        own = os.dup(sys.stderr.fileno())
        return open(own, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    except OSError:  # standard error is closed
        return io.StringIO()
