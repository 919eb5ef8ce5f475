"""Times every convolution of an architecture by itself in both frameworks, to show where one of them loses."""

import collections
import dataclasses
import datetime
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table

from bit_jax.formats import weights
from bit_jax.model.architecture import Architecture
from bit_jax.published import locate
from input_pipeline import terminal
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.files import writable, write_json
from input_pipeline.flags import UserPath, require_positive, typed
from parity.ladder.ladder import working_folder
from parity.sides import flops
from parity.sides.clock import Pass
from parity.sides.side import Side, parse_side
from parity.sides.weights import RANDOM
from parity.sides.worker import Worker
from parity.throughput.machine import machine
from parity.throughput.request import RANDOM_CLASSES

ALIKE = 0.01  # relative difference allowed between the two results' RMS; in bfloat16 it is seen below 0.0001
PASSES: tuple[Pass, ...] = get_args(Pass)


@dataclasses.dataclass(frozen=True)
class Convolutions:
    """The convolutions to time and the two sides."""

    weights: str = "random:R50x1"
    """Weights whose architecture is timed: a published name, the path of an .npz, `embedded`, or random:R50x1."""
    size: int = 224
    """Side of the square images in pixels."""
    rows: int = 32
    """Images per batch."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the convolutions."""
    torch: str = "torch:channels_last"
    """PyTorch's side, written like --reference of the rungs."""
    jax: str = "jax:tuned"
    """JAX's side, written like --reference of the rungs."""
    sets: int = 4
    """Number of different inputs to work on in turn, so that none is still in a cache."""
    repeat: int = 4
    """Passes over all these inputs before the clock waits for the device."""
    rounds: int = 3
    """Number of times that each side is timed, in turns with the other."""
    seconds: float = 0.1
    """Seconds that each round takes."""
    json: UserPath | None = None
    """File to write the measurements to. None: they are only shown."""

    def check(self) -> None:
        """Checks the values and the file that they name.

        Raises:
            RequestError: a value cannot be measured with, or the file cannot be written.
        """
        require_positive(typed(self, "size", "rows", "sets", "repeat", "rounds", "seconds"))
        for framework in ("torch", "jax"):
            side = parse_side(text := getattr(self, framework))
            if side.framework != framework:
                raise RequestError(f"--{framework} {text} is not of that framework")
            if side.devices != 1:
                raise RequestError(f"--{framework} {text} has {side.devices} devices; a convolution is timed on one")
        if self.json is not None:
            writable(self.json)

    def architecture(self) -> Architecture:
        """Returns the architecture of the weights."""
        if self.weights.startswith(RANDOM):
            return Architecture.parse(self.weights.removeprefix(RANDOM), RANDOM_CLASSES)
        return weights.read(locate.weight_file(self.weights).absolute())[0]


def measure(options: Convolutions, console: Console) -> dict[str, Any]:
    """Measures all convolutions and returns the report, in JSON's types.

    A pass that a side cannot compute, or for which the two results differ, is left out and named in the report.
    """
    counts = collections.Counter(flops.convolutions(options.architecture(), options.size, options.size))
    rows, failed = [], []
    with working_folder() as folder, _Pair(options, folder) as pair:
        for number, (convolution, count) in enumerate(counts.items(), start=1):
            console.print(f"{number}/{len(counts)}  {title(convolution)}")
            for which in PASSES if number > 1 else ("forward", "by kernel"):  # images need no gradient
                try:
                    times = pair.times(convolution, which)
                except RunFailed as error:
                    failed.append(f"{title(convolution)}, {which}: {error}")
                    continue
                rows.append({"convolution": title(convolution), "pass": which, "count": count, **times})
                rows[-1]["flops"] = convolution.flops * options.rows
    return {
        "command": shlex.join(["python", "-m", "parity", *sys.argv[1:]]),
        "when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "options": dataclasses.asdict(options),
        "failed": failed,
        "convolutions": sorted(rows, key=lambda row: row["count"] * (row["torch"] - row["jax"])),
    }


def title(convolution: flops.Convolution) -> str:
    """Returns a convolution in words, such as "3x3, 64 to 64 channels, 56x56"."""
    size, (height, width) = convolution.size, convolution.input_size
    stride = f", stride {convolution.stride}" if convolution.stride > 1 else ""
    return f"{size}x{size}, {convolution.cin} to {convolution.cout} channels, {height}x{width}{stride}"


class _Pair:
    """Both sides' processes, which end with the `with` block."""

    def __init__(self, options: Convolutions, folder: Path):
        self.options = options
        sides: dict[str, Side] = {"torch": parse_side(options.torch), "jax": parse_side(options.jax)}
        unused = folder / "no weights"
        self._workers = {name: Worker(side, options.precision, unused, folder / name) for name, side in sides.items()}

    def __enter__(self) -> "_Pair":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def times(self, convolution: flops.Convolution, which: Pass) -> dict[str, Any]:
        """Returns {side: seconds of the pass in the median of the rounds, "SIDE of rounds": seconds in each round}.

        Raises:
            RunFailed: a side cannot compute the pass, or the two sides' results differ.
        """
        options, seconds = self.options, {name: [] for name in self._workers}
        work = {"convolution": list(convolution), "rows": options.rows, "which": which}
        work |= {"sets": options.sets, "repeat": options.repeat, "seconds": 0}
        rms = {name: self._ask(name, "convolution_time", **work)["rms"] for name in self._workers}
        if not abs(rms["jax"] / rms["torch"] - 1) <= ALIKE:
            raise RunFailed(f"the RMS of PyTorch's result is {rms['torch']:.6g}, of JAX's {rms['jax']:.6g}")
        for _ in range(options.rounds):
            for name, of_rounds in seconds.items():
                calls = self._ask(name, "again", seconds=options.seconds)["calls"]
                of_rounds.append(statistics.median(calls) / (options.sets * options.repeat))
        medians = {name: statistics.median(of_rounds) for name, of_rounds in seconds.items()}
        return medians | {f"{name} of rounds": of_rounds for name, of_rounds in seconds.items()}

    def _ask(self, name: str, task: str, **arguments: Any) -> Any:
        return self._workers[name].ask(task, save_as=task, progress=lambda done, of: None, **arguments).info


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the table, the sums over a step, and the passes that are left out."""
    options = report["options"]
    table = Table(
        title=f"{options['weights']}, {options['rows']} x {options['size']}x{options['size']}, "
        f"{options['precision']}: {options['jax']} beside {options['torch']}, worst first"
    )
    for column in ("convolution", "pass", "times", "PyTorch ms", "JAX ms", "PyTorch / JAX", "TFLOP/s", "lost ms"):
        table.add_column(column, justify="left" if column in ("convolution", "pass") else "right")
    for row in report["convolutions"]:
        torch, jax = row["torch"], row["jax"]
        table.add_row(
            row["convolution"],
            row["pass"],
            f"{row['count']}",
            f"{torch * 1e3:.3f}",
            f"{jax * 1e3:.3f}",
            f"{torch / jax:.2f}",
            f"{row['flops'] / jax / 1e12:.2f}",
            f"{row['count'] * (jax - torch) * 1e3:.2f}",
        )
    console.print(table)
    sums = {name: sum(row["count"] * row[name] for row in report["convolutions"]) for name in ("torch", "jax")}
    ratio = sums["torch"] / sums["jax"] if sums["jax"] else float("nan")
    console.print(
        f"all of a step, each by itself: PyTorch {sums['torch'] * 1e3:.1f} ms, JAX {sums['jax'] * 1e3:.1f} ms, "
        f"{ratio:.2f} times as fast"
    )
    for sentence in report["failed"]:
        console.print(f"left out: {sentence}", style="bold red")


def run(options: Convolutions) -> bool:
    """Measures, prints and saves; returns whether both sides computed every pass."""
    options.check()
    report = measure(options, terminal.console(stderr=True))
    show(report, terminal.console())
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, report)
    return not report["failed"]
