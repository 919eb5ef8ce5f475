"""Profiles training steps: the time by kind of work, for `train.py --profile N`.

    python -m bit_jax.profile WORKDIR [--instructions 20]

shows the table of a run's profile again. WORKDIR/profile holds the trace, which TensorBoard's XProf plugin reads too,
the program that was traced, and the table as JSON.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.profiler import ProfileData, ProfileOptions
from rich.console import Console
from rich.table import Table

from bit_jax.compiled import hlo
from bit_jax.compiled.gpus import ACCELERATORS
from bit_jax.model.architecture import STANDARDIZED
from input_pipeline import terminal
from input_pipeline.errors import RunFailed
from input_pipeline.files import read_json, replacing, write_json
from input_pipeline.flags import UserPath
from input_pipeline.terminal import printable

SETTLED = 3  # steps before the first traced one
PROGRAM, TABLE = "train_step.hlo.txt", "profile.json"

FORWARD, BY_INPUT, BY_KERNEL = (f"convolutions, {which}" for which in ("forward", "by input", "by kernel"))
NORM, STANDARDIZATION, POOL, HEAD = "GroupNorm and ReLU", "standardization", "max-pool", "head"
UPDATE, COLLECTIVES, COPIES = "mixup, loss and update", "collectives", "copies"
GRAPHS, OTHER = "in CUDA graphs", "other"
KINDS = (FORWARD, BY_INPUT, BY_KERNEL, NORM, STANDARDIZATION, POOL, HEAD, UPDATE, COLLECTIVES, COPIES, GRAPHS, OTHER)
IDLE = "idle"
LAUNCHED = "XLA_FLAGS=--xla_gpu_enable_command_buffer="  # makes XLA launch kernels one by one


class Recorder:
    """Traces some steps of training into a folder, after the first few if enough steps are left.

    Args:
        folder: folder that receives the trace, the program and the table.
        program: the compiled training step.
        precision: name of the precision of its products.
        remaining: numbers of the steps that the run will take.
        wanted: number of steps to trace.
    """

    def __init__(self, folder: Path, program: Any, precision: str, *, remaining: range, wanted: int):
        self.folder, self.program, self.precision = folder, program, precision
        steps = min(wanted, len(remaining))
        self.first = remaining.start + min(SETTLED, len(remaining) - steps)
        self.last = self.first + steps - 1
        self._began = 0.0

    def waits_for(self, step: int) -> bool:
        """Whether the step must finish before anything else begins, because the trace begins or ends after it."""
        return self.first <= self.last and step in (self.first - 1, self.last)

    def before(self, step: int, trained: float) -> str | None:
        """Begins the trace if the step is the first to trace, and returns a sentence if that fails.

        Args:
            trained: seconds that the run has spent on steps and on waiting for their input so far.
        """
        sentence = None
        if step == self.first <= self.last:
            options = ProfileOptions()
            options.python_tracer_level = 0  # Python's own calls would be most of the trace
            try:
                jax.profiler.start_trace(self.folder, profiler_options=options)
            except Exception as error:  # a profile that fails must not end the run
                self.last = self.first - 1
                sentence = f"no step is traced: {error}"
            self._began = trained
        return sentence

    def after(self, step: int, trained: float) -> str | None:
        """Ends the trace once the last traced step has finished, and returns a sentence for the log: a summary of the
        table, or why there is none."""
        if not step == self.last >= self.first:
            return None
        try:
            jax.profiler.stop_trace()
            return summary(self._table(trained - self._began), self.folder.parent)
        except Exception as error:  # a profile that fails must not end the run
            return f"the trace in {self.folder} has no table: {error}"

    def _table(self, seconds: float) -> dict[str, Any]:
        text = self.program.as_text()
        with replacing(self.folder / PROGRAM) as file:
            file.write(text.encode())
        device = jax.devices()[0].device_kind
        steps = self.last - self.first + 1
        table = tabulate(newest_trace(self.folder), hlo.Module(text), steps, seconds, device, self.precision)
        write_json(self.folder / TABLE, table)
        return table


def newest_trace(folder: Path) -> Any:
    """Returns the newest trace in the folder; raises RunFailed if there is none."""
    traces = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise RunFailed(f"{folder} holds no trace (*.xplane.pb)")
    return ProfileData.from_file(str(traces[-1]))


@dataclasses.dataclass(frozen=True)
class Event:
    """One piece of work of a device.

    Attributes:
        instruction: name of the program's instruction.
        start, end: times in nanoseconds.
    """

    instruction: str
    start: float
    end: float


def events(trace: Any, program: str) -> Iterator[tuple[str, Event]]:
    """Yields (device, event) for the program of that name: kernels and copies on GPUs, instructions on CPUs. Events of
    other programs are left out, because there may be an evaluation between two traced steps."""
    for plane in trace.planes:
        gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):
                continue  # a summary of the streams
            for event in line.events:
                stats = {name: value for name, value in event.stats if name in ("hlo_op", "hlo_module")}
                if "hlo_op" in stats and stats.get("hlo_module") == program:
                    yield plane.name, Event(str(stats["hlo_op"]), event.start_ns, event.end_ns)


def tabulate(trace: Any, module: hlo.Module, steps: int, seconds: float, device: str, precision: str) -> dict[str, Any]:
    """Returns the seconds of a step by kind of work on one device: the mean over traced steps and devices.

    Args:
        module: the program that was traced.
        steps: number of traced steps.
        seconds: seconds that they took together, with waiting for their input.
        device: kind of the device; rows have a roofline if `gpus.ACCELERATORS` knows it.
        precision: precision whose peak rate the roofline of products uses.

    Raises:
        RunFailed: the trace does not show the program.
    """
    by_device: dict[str, list[Event]] = collections.defaultdict(list)
    for name, event in events(trace, module.name):
        by_device[name].append(event)
    runs = steps * len(by_device)
    spent: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    for event in (event for of_device in by_device.values() for event in of_device):
        spent[event.instruction] += (event.end - event.start) * 1e-9 / runs
        calls[event.instruction] += 1
    if not any(name in module.instructions for name in spent):
        raise RunFailed("the trace shows no instruction of the training step")
    gpu = next((known for known in ACCELERATORS.values() if known.title == device), None)
    peaks = (gpu.flops[precision], float(gpu.bandwidth)) if gpu else None
    instructions = [
        {"name": name, "seconds": took, "calls": calls[name] / runs, **_described(module, name, peaks)}
        for name, took in sorted(spent.items(), key=lambda item: -item[1])
    ]
    step = seconds / steps
    busy = sum(map(_covered, by_device.values())) / runs
    return {
        "device": device,
        "steps": steps,
        "seconds": step,
        "busy": busy,
        "kinds": _by_kind(instructions) | {IDLE: {"seconds": max(step - busy, 0.0)}},
        "roofline": module.roofline(*peaks) if peaks else None,
        "instructions": instructions,
    }


def _by_kind(instructions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        own = [instruction for instruction in instructions if instruction["kind"] == kind]
        if own:
            names = ("seconds", "calls", "flops", "bytes", "roofline")
            rows[kind] = {name: sum(row[name] for row in own) for name in names if own[0].get(name) is not None}
    return rows


def _described(module: hlo.Module, name: str, peaks: tuple[float, float] | None) -> dict[str, Any]:
    """Describes an instruction of the program; one that the program does not contain counts as no work."""
    line = module.instructions.get(name)
    if line is None:
        of_graph = name.startswith("command_buffer")
        return {
            "kind": GRAPHS if of_graph else OTHER,
            "of": "",
            "flops": 0.0,
            "bytes": 0,
            "roofline": 0.0 if peaks else None,
        }
    flops, moved = module.work(line)
    return {
        "kind": kind(module, line),
        "of": operation(module, line),
        "flops": flops,
        "bytes": moved,
        "roofline": max(flops / peaks[0], moved / peaks[1]) if peaks else None,
    }


def _covered(spans: Iterable[Event]) -> float:
    """Returns the seconds in which at least one of the events ran."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(span.end - max(span.start, until), 0.0)
        until = max(until, span.end)
    return total * 1e-9


def operation(module: hlo.Module, line: hlo.Instruction) -> str:
    """Returns JAX's name of an instruction: `jit(train_step)/jvp(ResNetV2)/block1/unit01/a/group_norm/...`. A fusion
    without a name gets its first part's."""
    parts = [line, *module.computations.get(line.called() or "", [])]
    return next((name for part in parts if (name := part.attribute(r'op_name="([^"]*)"'))), "")


def kind(module: hlo.Module, line: hlo.Instruction) -> str:
    """Returns the instruction's kind of work, one of `KINDS`."""
    if hlo.is_collective(line):
        return COLLECTIVES
    name = operation(module, line)
    parts = [line, *module.computations.get(line.called() or "", [])]
    product = next((part for part in parts if hlo.is_convolution(part) or part.opcode in ("convolution", "dot")), None)
    if product is not None and "/head/" not in name:
        if "transpose(" not in name:
            return FORWARD
        return BY_KERNEL if _is_by_kernel(product) else BY_INPUT
    if line.opcode in ("copy", "transpose", "copy-start"):
        return COPIES
    if f"/{STANDARDIZED}/" in name and "(_standardize)" not in name:
        return COPIES  # pads, slices and transposes that a convolution or product needs
    marks = {"(_standardize)": STANDARDIZATION, "group_norm": NORM, "/head/": HEAD, "root_block": POOL}
    for mark, of_mark in marks.items():
        if mark in name:
            return of_mark
    if "/ResNetV2" in name or "(ResNetV2)" in name:
        return NORM if "/block" in name else HEAD  # residual additions are fused with the GroupNorm that reads them
    return UPDATE if name else OTHER


def _is_by_kernel(product: hlo.Instruction) -> bool:
    """Whether a gradient is the one by a convolution's kernel, whose result has no batch axis."""
    if "BackwardFilter" in product.attributes:
        return True
    labels = product.attribute(r"dim_labels=\w+->(\w+)")
    if labels is not None and not hlo.is_convolution(product):
        return labels[0].isdigit()
    contracted = re.findall(r"[lr]hs_contracting_dims=\{([\d,]*)\}", product.attributes)
    return contracted == ["0", "0"]


def load(workdir: Path) -> dict[str, Any]:
    """Reads the table of a run.

    Raises:
        RequestError: the run has none.
    """
    return read_json(workdir / "profile" / TABLE, dict, f"train with --profile N and --workdir {workdir} to make it")


def show(table: dict[str, Any], console: Console, instructions: int = 0) -> None:
    """Shows the table by kind, and the instructions that exceed their roofline most, or take longest without one."""
    step = table["seconds"]
    shown = Table(title=f"a training step on {table['device']}: {step * 1e3:.2f} ms, the mean of {table['steps']}")
    shown.add_column("kind of work")
    roofline = table["roofline"] is not None
    for column in ("ms", "of the step", "calls", "GB", "TFLOP", *(("roofline ms", "times it") if roofline else ())):
        shown.add_column(column, justify="right")
    for name, row in table["kinds"].items():
        cells = [f"{row['seconds'] * 1e3:.2f}", f"{row['seconds'] / step:.1%}"]
        if name != IDLE:
            cells += [f"{row['calls']:.0f}", f"{row['bytes'] / 1e9:.2f}", f"{row['flops'] / 1e12:.2f}"]
            cells += _beside_roofline(row["seconds"], row["roofline"]) if roofline else []
        shown.add_row(name, *cells)
    if roofline:
        shown.add_section()
        shown.add_row("step", f"{step * 1e3:.2f}", "", "", "", "", *_beside_roofline(step, table["roofline"]))
    console.print(shown)
    if GRAPHS in table["kinds"]:
        console.print(f"a trace names no instruction within a CUDA graph; {LAUNCHED} shows them all, one by one")
    excess = sorted(table["instructions"], key=lambda row: (row["roofline"] or 0) - row["seconds"])
    for row in excess[:instructions]:
        console.print(
            printable(
                f"{row['seconds'] * 1e6:9.1f} us  {row['calls']:.0f} calls  {row['bytes'] / 1e6:8.1f} MB  "
                f"{row['flops'] / 1e9:8.1f} GFLOP  {row['kind']}: {row['name']}, {row['of']}"
            )
        )


def summary(table: dict[str, Any], workdir: Path) -> str:
    """One sentence on what takes most of the step."""
    rows = sorted(table["kinds"].items(), key=lambda item: -item[1]["seconds"])
    parts = ", ".join(f"{name} {row['seconds'] / table['seconds']:.0%}" for name, row in rows[:4])
    return (
        f"{table['steps']} steps of {table['seconds'] * 1e3:.1f} ms are traced: {parts}; "
        f"python -m bit_jax.profile {workdir} shows all"
    )


def _beside_roofline(seconds: float, roofline: float) -> list[str]:
    return [f"{roofline * 1e3:.2f}", f"{seconds / roofline:.2f}" if roofline else ""]


def main(workdir: tyro.conf.Positional[UserPath], instructions: int = 20) -> None:
    """Shows the profile of a run that was trained with --profile.

    Args:
        workdir: Work directory of the run.
        instructions: Number of the program's instructions to list, those that lose most time first.
    """
    show(load(workdir), terminal.console(), instructions)
