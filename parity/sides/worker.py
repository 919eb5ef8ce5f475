"""Runs one framework in a process of its own: `Worker` is this end, `parity/serve.py` the other.

A `Worker` writes requests, one JSON object per line, to the process's standard input. The process runs the named task,
saves arrays in a file, and answers in JSON on its standard output; everything else that it prints goes to its log.
When its standard input ends, because this end is done or was killed, the process ends at once, even within a task.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.errors import RequestError, RunFailed
from parity.sides.side import Side

LOG_TAIL = 3  # lines of a worker's log that the error of a failure quotes
Progress = Callable[[int, int], None]  # (number done, number in all)


# a program that is needed again in the same comparison, such as one that a fault does not touch, is read from a file
_COMPILED_ONCE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}


class Arrays:
    """{name: array} in a file; each array is read when it is used."""

    def __init__(self, path: Path):
        self.path = path
        self._file = np.load(path)
        self.names: list[str] = self._file.files

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[name]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def close(self) -> None:
        self._file.close()


class Worker:
    """A side's process, or one process for each of PyTorch's devices, of which the first answers.

    Args:
        side, precision: side and precision that it runs in.
        weights: path of an official `.npz`.
        folder: folder that receives its files and its log.
        alone: whether it compiles every program by itself, instead of taking those that other processes have compiled.
    """

    def __init__(self, side: Side, precision: str, weights: Path, folder: Path, *, alone: bool = False):
        self.side, self.precision, self.folder = side, precision, folder
        folder.mkdir(parents=True, exist_ok=True)
        job = {"side": side.fields(), "precision": precision, "weights": str(weights), "meeting": str(folder / "meet")}
        self._log = folder / "log.txt"
        compiled = folder if alone else folder.parent
        programs = {
            "JAX_COMPILATION_CACHE_DIR": str(compiled / "xla"),
            "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        }
        environment = _COMPILED_ONCE | programs | os.environ | side.environment(precision) | (programs if alone else {})
        with open(self._log, "wb") as log:
            self._process, *self._others = [
                subprocess.Popen(
                    [sys.executable, "-m", "parity.serve", json.dumps(job | {"rank": rank})],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=log,
                    env=environment,
                    text=True,
                )
                for rank in range(side.processes)
            ]

    def ask(self, task: str, *, save_as: str, progress: Progress, **arguments: Any) -> "Answer":
        """Runs one task and waits for it; its arrays go to the file `save_as`.npz.

        Raises:
            RequestError: the request cannot be carried out.
            RunFailed: the task failed or the process died.
        """
        assert self._process.stdout is not None
        path = self.folder / f"{save_as}.npz"
        request = json.dumps({"task": task, "path": str(path), "arguments": arguments}, default=str)
        for process in (self._process, *self._others):
            assert process.stdin is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failure(task, f"died with exit code {process.wait()}") from None
        for line in self._process.stdout:
            reply = json.loads(line)
            if "progress" in reply:
                progress(*reply["progress"])
            elif "refused" in reply:
                raise RequestError(reply["refused"])
            elif "failed" in reply:
                raise self._failure(task, reply["failed"])
            else:
                return Answer(reply["answer"], Arrays(path) if reply["saved"] else None)
        raise self._failure(task, f"died with exit code {self._process.wait()}")

    def close(self) -> None:
        for process in (self._process, *self._others):
            process.kill()
            process.communicate()

    def _failure(self, task: str, what: str) -> RunFailed:
        tail = " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-LOG_TAIL:])
        return RunFailed(f"{self.side} in {self.precision}, task {task}: {what} ({self._log}: {tail})")


class Answer:
    """A task's answer: `info`, the value that it returned, and the arrays that it saved."""

    def __init__(self, info: Any, arrays: Arrays | None):
        self.info = info
        self._arrays = arrays

    @property
    def arrays(self) -> Arrays:
        assert self._arrays is not None, "the task saved no arrays"
        return self._arrays

    def close(self) -> None:
        """Closes the file with the arrays, which can no longer be read."""
        if self._arrays is not None:
            self._arrays.close()

    def discard(self) -> None:
        """Closes and removes the file with the arrays."""
        self.close()
        if self._arrays is not None:
            self._arrays.path.unlink(missing_ok=True)
