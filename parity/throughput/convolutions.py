"""Every convolution of an architecture in both frameworks, alone: where one loses, by shape and pass."""

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

from bit_jax.model.architecture import Architecture
from bit_jax.published import locate
from input_pipeline import terminal
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.files import write_json
from input_pipeline.flags import UserPath, require_positive, typed
from parity.ladder.ladder import RANDOM, working_folder
from parity.report import saved
from parity.sides import flops
from parity.sides.clock import Pass
from parity.sides.side import Side, parse_side
from parity.sides.worker import Worker
from parity.throughput.machine import machine
from parity.throughput.request import RANDOM_CLASSES

ALIKE = 0.01  # two results' RMS, relative: in bfloat16 they are seen within 0.0001
PASSES: tuple[Pass, ...] = get_args(Pass)


@dataclasses.dataclass(frozen=True)
class Convolutions:
    """The convolutions to time and the two sides; each default is written here alone."""

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
        """Raises RequestError for what cannot be measured."""
        require_positive(typed(self, "size", "rows", "sets", "repeat", "rounds", "seconds"))
        for framework in ("torch", "jax"):
            side = parse_side(given := getattr(self, framework))
            if side.framework != framework:
                raise RequestError(f"--{framework} {given} is not of that framework")
            if side.devices != 1:
                raise RequestError(f"--{framework} {given} has {side.devices} devices; a convolution is timed on one")
        if self.json is not None:
            saved.writable(self.json)

    def architecture(self) -> Architecture:
        if self.weights.startswith(RANDOM):
            return Architecture.parse(self.weights.removeprefix(RANDOM), RANDOM_CLASSES)
        return Architecture.of(locate.weight_file(self.weights).absolute())


def measure(options: Convolutions, console: Console) -> dict[str, Any]:
    """Everything that is reported, in JSON's types. A pass that one side cannot compute is left out, and named."""
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


def title(one: flops.Convolution) -> str:
    """3x3, 64 to 64 channels, 56x56."""
    step = f", stride {one.stride}" if one.stride > 1 else ""
    return f"{one.size}x{one.size}, {one.cin} to {one.cout} channels, {one.given[0]}x{one.given[1]}{step}"


class _Pair:
    """Both sides' processes, for as long as the block lasts."""

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
        """{side: seconds of the pass, the median of its rounds, and "SIDE of rounds": of each}.

        Raises:
            RunFailed: a side cannot compute it, or the two compute something else.
        """
        options, found = self.options, {name: [] for name in self._workers}
        given = {"convolution": list(convolution), "rows": options.rows, "which": which}
        work = {"sets": options.sets, "repeat": options.repeat, "seconds": 0}
        rms = {name: self._ask(name, "convolution_time", **work, **given)["rms"] for name in self._workers}
        if not abs(rms["jax"] / rms["torch"] - 1) <= ALIKE:
            raise RunFailed(f"the RMS of PyTorch's result is {rms['torch']:.6g}, of JAX's {rms['jax']:.6g}")
        for _ in range(options.rounds):
            for name, medians in found.items():
                calls = self._ask(name, "again", seconds=options.seconds)["calls"]
                medians.append(statistics.median(calls) / (options.sets * options.repeat))
        of_rounds = {f"{name} of rounds": medians for name, medians in found.items()}
        return {name: statistics.median(medians) for name, medians in found.items()} | of_rounds

    def _ask(self, name: str, task: str, **arguments: Any) -> Any:
        return self._workers[name].ask(task, save_as=task, progress=lambda done, of: None, **arguments).info


def show(found: dict[str, Any], console: Console) -> None:
    options = found["options"]
    table = Table(
        title=f"{options['weights']}, {options['rows']} x {options['size']}x{options['size']}, "
        f"{options['precision']}: {options['jax']} beside {options['torch']}, worst first"
    )
    for column in ("convolution", "pass", "times", "PyTorch ms", "JAX ms", "PyTorch / JAX", "TFLOP/s", "lost ms"):
        table.add_column(column, justify="left" if column in ("convolution", "pass") else "right")
    for row in found["convolutions"]:
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
    sums = {name: sum(row["count"] * row[name] for row in found["convolutions"]) for name in ("torch", "jax")}
    ratio = sums["torch"] / sums["jax"] if sums["jax"] else float("nan")
    console.print(
        f"all of a step, each by itself: PyTorch {sums['torch'] * 1e3:.1f} ms, JAX {sums['jax'] * 1e3:.1f} ms, "
        f"{ratio:.2f} times as fast"
    )
    for sentence in found["failed"]:
        console.print(f"left out: {sentence}", style="bold red")


def run(options: Convolutions) -> bool:
    """Measures, prints, saves; whether every pass could be computed by both."""
    options.check()
    found = measure(options, terminal.console(stderr=True))
    show(found, terminal.console())
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, found)
    return not found["failed"]
