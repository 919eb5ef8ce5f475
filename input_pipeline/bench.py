"""Measures training input in images/s: this package's loader beside tf.data. `python -m parity input` adds PyTorch's.

Each pipeline runs in its own process, `python -m input_pipeline.bench ARM FOLDER BATCH`, and takes turns with the
others. A process is stopped while it waits for its turn, so that it does not fill its buffers during another's turn.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import tyro
from rich.table import Table

from input_pipeline.examples import DatasetError
from input_pipeline.files import writable, write_json
from input_pipeline.flags import UserPath
from input_pipeline.loader import Loader
from input_pipeline.preprocess import Views
from input_pipeline.sources import open_source
from input_pipeline.terminal import console

RESIZE_TO, CROP = 512, 480  # pixels; BiT uses them for ImageNet
SETTLE = 8  # batches before each measurement, more than any pipeline keeps ready
WATCH = 1.0  # seconds between two readings of memory, each of which stops the process for milliseconds
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Arm:
    """One pipeline.

    Attributes:
        what: the pipeline's name in tables.
        needs: the package that the pipeline needs and is left out without; empty where it needs none.
        module: the module that its process runs.
    """

    what: str
    needs: str
    module: str = "input_pipeline.bench"


ARMS = {
    "pillow": Arm("this loader, --resize pillow", ""),
    "tf": Arm("this loader, --resize tf", ""),
    "tf.data": Arm("tf.data as BiT's TensorFlow code, float32", "tensorflow", "input_pipeline.tf_data"),
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """The images that every pipeline reads, and how often."""

    folder: tyro.conf.Positional[UserPath]
    """Folder of images, FOLDER/train/CLASS/IMAGE; python benchmarks/photographs.py FOLDER draws one."""
    batch: int = 32
    """Number of images in a batch."""
    batches: int = 40
    """Number of batches in a measurement."""
    rounds: int = 5
    """Number of measurements of each pipeline; the pipelines take turns."""
    json: UserPath | None = None
    """File to write the figures to, besides showing them."""

    def run(self, arms: dict[str, Arm], command: str) -> None:
        """Measures the arms whose packages are installed, and shows the figures; `command` is kept beside them.

        Raises:
            DatasetError: there are too few images, a number is below 1, or a pipeline dies.
            RequestError: the file of figures cannot be written.
        """
        source = open_source(f"folder:{self.folder}", "train")
        if min(self.batch, self.batches, self.rounds) < 1:
            numbers = f"--batch {self.batch}, --batches {self.batches} and --rounds {self.rounds}"
            raise DatasetError(f"{numbers} must be at least 1")
        if len(source) < self.batch:
            few = f"{self.folder} has {len(source)} training images, fewer than --batch {self.batch}"
            raise DatasetError(f"{few}; draw more")
        if self.json is not None:
            writable(self.json)
        errors = console(stderr=True)
        installed = {name: arm for name, arm in arms.items() if not arm.needs or importlib.util.find_spec(arm.needs)}
        for name in arms.keys() - installed.keys():
            errors.print(f"{arms[name].what} is left out: {arms[name].needs} is not installed")
        processes: dict[str, Process] = {}
        rates: dict[str, list[float]] = {name: [] for name in installed}
        try:
            for name, arm in installed.items():
                errors.print(f"starting {arm.what}")
                processes[name] = Process(name, arm, self.folder, self.batch)
            for number in range(1, self.rounds + 1):
                for name, process in processes.items():
                    rates[name].append(self.batch * self.batches / process.run(self.batches))
                shown = ", ".join(f"{name} {measured[-1]:,.0f}" for name, measured in rates.items())
                errors.print(f"round {number} of {self.rounds}: {shown}")
        finally:
            for process in processes.values():
                process.close()
        memory = {name: process.memory for name, process in processes.items()}
        title = f"{len(source):,} images, batch {self.batch}, {RESIZE_TO} to {CROP}, {_machine()}"
        _show(installed, rates, memory, title)
        if self.json is not None:
            flags = f"{self.folder.name} --batch {self.batch} --batches {self.batches} --rounds {self.rounds}"
            _save(self.json, f"{command} {flags}", rates, memory)


class Process:
    """The process of a pipeline, with the processes that it starts.

    Attributes:
        memory: largest number of bytes that they were seen to hold together; pages that they share count once.
    """

    def __init__(self, name: str, arm: Arm, folder: Path, batch: int):
        self.memory = 0
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", arm.module, name, str(folder), str(batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()
        self._signal(signal.SIGSTOP)

    def run(self, batches: int) -> float:
        """Returns the seconds that the next `batches` batches take."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        print(batches, file=self._process.stdin, flush=True)
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        watcher.start()
        try:
            return float(self._answer())
        finally:
            done.set()
            watcher.join()
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _signal(self, number: int) -> None:
        for process in _tree(self._process.pid):
            process.send_signal(number)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise DatasetError(
                f"the pipeline {self._name} died with exit code {self._process.wait()}; run it by itself"
            )
        return line

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(WATCH):
            held = 0
            for process in _tree(self._process.pid):
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:  # it just ended
                    continue
            self.memory = max(self.memory, held)


def serve(batches: Iterator[Any]) -> None:
    """Runs a pipeline's process: it answers each number of batches on standard input with the seconds they took."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print to standard output, which would be taken for an answer
    next(batches)
    print("ready", file=replies)
    for line in sys.stdin:
        for _ in range(SETTLE):
            next(batches)
        start = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        print(time.perf_counter() - start, file=replies)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _show(arms: dict[str, Arm], rates: dict[str, list[float]], memory: dict[str, int], title: str) -> None:
    table = Table("pipeline", "images/s, median", "least to most", "times, round by round", "peak MiB", title=title)
    ours = rates["pillow"]
    for name, arm in arms.items():
        ratios = [mine / theirs for mine, theirs in zip(ours, rates[name], strict=True)]
        table.add_row(
            arm.what,
            f"{statistics.median(rates[name]):,.0f}",
            f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}",
            "" if name == "pillow" else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{memory[name] / MIB:,.0f}",
        )
    output = console()
    output.print(table)
    output.print("times: how many times the pipeline's images/s the first line has, in the same round")


def _save(path: Path, command: str, rates: dict[str, list[float]], memory: dict[str, int]) -> None:
    packages = ("grain", "numba", "simplejpeg", "pillow", "numpy", "tensorflow-cpu", "torch")
    installed = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    content = {
        "command": command,
        "machine": _machine(),
        "images_per_s": rates,
        "peak_bytes": memory,
        "versions": {name: installed[name] for name in packages if name in installed},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}"


def main() -> None:
    """Serves this package's own pipeline as a process."""
    resize, folder, batch = sys.argv[1:]
    source = open_source(f"folder:{folder}", "train")
    views = Views(RESIZE_TO, CROP, flip=True, resize="tf" if resize == "tf" else "pillow")
    serve(Loader(source, views, int(batch)).train(0, 1 << 40))


if __name__ == "__main__":
    main()
