"""What a training step would take on GPUs that are not here: memory, traffic, collectives, and a roofline.

    python -m bit_jax.plan --model BiT-M-R152x2 --device a100-40g --devices 8 --precision bf16 --remat norm

Compiles the very train step that train.py runs, for that GPU, with XLA's own compiler (`pip install 'bit-jax[plan]'`;
no GPU is needed), and reads the result. Nothing runs, so there are no times: the roofline divides by published peaks
and is a lower bound.
"""

import dataclasses
import math
import sys
import time
from typing import Any

import jax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from bit_jax.compiled import hlo
from bit_jax.compiled.gpus import GIB, Accelerator, accelerator
from bit_jax.config import FLAGPERF, Config, ScaleConfig
from bit_jax.model.architecture import Architecture
from bit_jax.model.execution import Remat
from bit_jax.model.precision import PRECISIONS
from bit_jax.scale import sharding
from bit_jax.training import figures, hyperrule
from bit_jax.training.program import Steps, make_steps
from bit_jax.training.target import Target
from bit_jax.zoo import published
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import write_json
from input_pipeline.flags import UserPath

IMAGENET_EXAMPLES, IMAGENET_AREA = 1_281_167, 400 * 350
POOL = 0.9  # of a device's memory is XLA's (train.py asks for it); the rest is the CUDA context's and NCCL's
# cuDNN's workspaces come out of the pool, unseen by the compiler: this many times the largest activation. Bounds of
# 0.7 GiB for R152x2 and 1.4 GiB for R152x4, float32, batch 16, are 1.6 times theirs.
WORKSPACE = 1.6
UNLIMITED = 2**50  # bytes of memory, with which XLA does not rematerialize
HOSTS = (1, 2, 4, 8, 16, 32, 64)  # of the communication model


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile. Defaults are FlagPerf's case on one device."""

    model: str = "BiT-M-R152x2"
    """A published name, or an architecture: R50x1, R152x4, R14x0.5. No file is read."""
    device: str = "a100-40g"
    """a100-40g, a100-80g or h100-80g."""
    hosts: int = 1
    devices: int = 1
    """GPUs a host."""
    mesh: str = ""
    """As train.py's: data=2,fsdp=8."""
    precision: str = "fp32"
    """fp32, tf32, bf16 or fp16."""
    batch_per_device: int = 16
    remat: Remat = "none"
    microbatches: int = 1
    crop: int = 480
    """Side of the images."""
    classes: int = 1000
    network_gbps: float = 200.0
    """Of a host's link to the others, in Gbit/s."""

    def check(self) -> None:
        """Raises RequestError for a number or name that cannot be."""
        for flag in ("hosts", "devices", "batch_per_device", "microbatches", "crop", "classes", "network_gbps"):
            if getattr(self, flag) <= 0:
                raise RequestError(f"--{flag.replace('_', '-')} {getattr(self, flag)} must be greater than 0")
        if self.batch_per_device % 2:
            raise RequestError(f"--batch-per-device {self.batch_per_device} must be even: mixup pairs neighbours")
        precisions = accelerator(self.device).flops
        if self.precision not in precisions:
            raise RequestError(f"--precision {self.precision} is not planned for; there are {', '.join(precisions)}")

    @property
    def gpu(self) -> Accelerator:
        return accelerator(self.device)

    def architecture(self) -> Architecture:
        name = known.architecture if (known := published(self.model)) else self.model
        if not Architecture.is_name(name):
            raise RequestError(f"unknown --model {self.model!r}; write a published name or R<depth>x<width>")
        return Architecture.parse(name, self.classes)

    def config(self) -> Config:
        return dataclasses.replace(
            FLAGPERF,
            model=dataclasses.replace(FLAGPERF.model, model=self.model, precision=self.precision),
            data=dataclasses.replace(FLAGPERF.data, crop=self.crop, batch_per_device=self.batch_per_device),
            scale=ScaleConfig(self.mesh, self.remat, self.microbatches),
        )

    def steps(self, memory: int) -> Steps:
        """The steps of train.py on GPUs with so many bytes of memory."""
        try:
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=self.gpu.target(memory), topology=f"1x{self.hosts}x{self.devices}"
            )
        except Exception as error:  # the plugin raises many kinds
            raise RequestError(
                f"XLA's compiler for NVIDIA GPUs cannot be used ({str(error).splitlines()[0]}); "
                "pip install 'bit-jax[plan]'"
            ) from None
        fsdp = sharding.parse_mesh(self.mesh, len(topology.devices))
        return self.steps_on(sharding.make_mesh(topology.devices, fsdp=fsdp))

    def steps_on(self, mesh: Mesh) -> Steps:
        """The steps of train.py on these devices, whatever they are."""
        cfg = self.config()
        global_batch = sharding.global_batch_size(
            mesh, global_batch=0, batch_per_device=self.batch_per_device, microbatches=self.microbatches
        )
        return make_steps(
            Target(mesh, PRECISIONS[self.precision], self.remat, self.microbatches),
            self.architecture(),
            hyperrule.recipe(cfg, train_examples=IMAGENET_EXAMPLES, native_area=IMAGENET_AREA),
            momentum=cfg.optimizer.momentum,
            seed=cfg.run.seed,
            global_batch=global_batch,
        )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A train step's executable and what it says of itself."""

    module: hlo.Module
    peak: int  # bytes on a device, arguments included
    parameters: int  # bytes on a device
    optimizer: int  # bytes on a device
    seconds: float  # that tracing and compiling took

    @classmethod
    def of(cls, request: Request, memory: int) -> "Compiled":
        start = time.perf_counter()
        steps = request.steps(memory)
        executable = steps.lower_train_step().compile(compiler_options=steps.target.compiler_options)
        analysis: Any = executable.memory_analysis()
        return cls(
            module=hlo.Module(executable.as_text() or ""),
            peak=analysis.peak_memory_in_bytes,
            parameters=_on_a_device(steps.state.params),
            optimizer=_on_a_device(steps.state.opt_state),
            seconds=time.perf_counter() - start,
        )


def _on_a_device(tree: Any) -> int:
    def held(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(held(leaf) for leaf in jax.tree.leaves(tree))


def _memory(request: Request, compiled: Compiled) -> dict[str, Any]:
    """Of one device, in bytes, and whether it fits."""
    largest = max(line.bytes for line, _ in compiled.module.executed() if hlo.is_convolution(line))
    workspace, pool = int(WORKSPACE * largest), int(POOL * request.gpu.memory)
    return {
        "parameters": compiled.parameters,
        "optimizer": compiled.optimizer,
        "peak": compiled.peak,
        "workspace": workspace,
        "pool": pool,
        "outside_pool": request.gpu.memory - pool,
        "fits": compiled.peak + workspace <= pool,
    }


def plan(request: Request) -> dict[str, Any]:
    """Everything that is printed, as JSON: bytes and counts are of one device and one step."""
    real = Compiled.of(request, request.gpu.memory)
    return demands(request) | {
        "with_xla_rematerialization": {
            "peak": real.peak,
            "fits": _memory(request, real)["fits"],
            "repeated_instructions": real.module.rematerialized(),
            "convolutions": real.module.convolutions(),
        }
    }


def demands(request: Request) -> dict[str, Any]:
    """`plan` of one compilation, in which XLA does not rematerialize on its own."""
    plain = Compiled.of(request, UNLIMITED)
    module = plain.module
    hosts = [count for count in HOSTS if request.hosts > 1]
    return {
        "request": dataclasses.asdict(request),
        "device": request.gpu.title,
        "memory": _memory(request, plain),
        "convolutions": module.convolutions(),
        "flops": module.flops(),
        "traffic": module.traffic(),
        "collectives": _collectives(module),
        "estimate": estimate(request, module),
        "model_of_hosts": [{"hosts": count, **estimate(request, module, count)} for count in hosts],
        "compile_seconds": plain.seconds,
        "versions": figures.versions(),
    }


def _collectives(module: hlo.Module) -> list[dict[str, Any]]:
    """By kind and number of devices that take part: how many, of how many bytes, and how much of that overlaps."""
    total: dict[tuple[str, int], dict[str, Any]] = {}
    for one in module.collectives():
        entry = total.setdefault(
            (one.kind, one.group), {"count": 0, "bytes": {}, "overlapped_count": 0, "overlapped_bytes": 0}
        )
        size = one.times * sum(one.bytes.values())
        entry["count"] += one.times
        for dtype, moved in one.bytes.items():
            entry["bytes"][dtype] = entry["bytes"].get(dtype, 0) + one.times * moved
        entry["overlapped_count"] += one.times * one.overlapped
        entry["overlapped_bytes"] += size * one.overlapped
    return [{"kind": kind, "group": group, **entry} for (kind, group), entry in total.items()]


def estimate(request: Request, module: hlo.Module, hosts: int | None = None) -> dict[str, float]:
    """Roofline of a step, in seconds: a lower bound at published peaks, not a prediction.

    Each instruction takes the longer of its products at the peak rate and its bytes at memory bandwidth. Collectives
    are rings: within a host over its links, between hosts over one network link a host, which its devices share. What
    overlaps costs the longer of computation and communication, what does not is added.

    Args:
        hosts: as many instead of the request's, with the same work on each device; beyond the compiled program, so a
            model of a model.
    """
    gpu = request.gpu
    compute = module.roofline(gpu.flops[request.precision], gpu.bandwidth)
    hosts = hosts or request.hosts
    hidden, exposed = 0.0, 0.0
    for one in module.collectives():
        seconds = one.times * _ring(one, request, hosts)
        hidden, exposed = hidden + seconds * one.overlapped, exposed + seconds * (not one.overlapped)
    step = max(compute, hidden) + exposed
    images = request.batch_per_device * request.devices * hosts
    return {"compute": compute, "overlapped": hidden, "exposed": exposed, "step": step, "images_per_s": images / step}


def _ring(one: hlo.Collective, request: Request, hosts: int) -> float:
    """Seconds of a collective as a ring within each host and one between them.

    A ring of n moves (n - 1) / n of the collective's larger side through each link, an all-reduce twice that.
    """
    size = sum(one.bytes.values()) * (2 if one.kind == "all-reduce" else 1)
    members, hosts = _span(one, request, hosts)
    inside = size * (members - 1) / members / request.gpu.link
    groups = request.devices / members  # that use the host's network at the same time
    return inside + groups * size * (hosts - 1) / hosts / (request.network_gbps * 1e9 / 8)


def _span(one: hlo.Collective, request: Request, hosts: int) -> tuple[int, int]:
    """(devices of each host that take part together, hosts). Devices are numbered host by host, `fsdp` innermost."""
    devices = request.devices
    fsdp = sharding.parse_mesh(request.mesh, request.hosts * devices)
    if one.group == request.hosts * devices:
        return devices, hosts
    if one.kind == "all-reduce":  # over `data`: one device of each group of fsdp
        members = max(devices // fsdp, 1)
        return members, one.group // members * hosts // request.hosts
    return min(one.group, devices), max(one.group // devices, 1)


def search(request: Request, console: Console) -> list[dict[str, Any]]:
    """For each `--remat`, from the one that computes least again: the largest batch a device that fits, by compiling.

    Memory grows by a constant amount an image, so two compilations predict the largest batch; compiling that and its
    neighbours settles it.
    """
    rows = []
    for remat in ("none", "norm", "unit"):
        found: dict[int, dict[str, Any]] = {}

        def needs(batch: int, remat: Remat = remat, found: dict[int, dict[str, Any]] = found) -> int:
            """Bytes beyond what there is; more than 0 does not fit."""
            if batch not in found:
                candidate = dataclasses.replace(request, remat=remat, batch_per_device=batch)
                found[batch] = _memory(candidate, Compiled.of(candidate, UNLIMITED))
                memory = found[batch]
                console.print(f"--remat {remat}, {batch} a device: {_gib(memory['peak'] + memory['workspace'])} GiB")
            return found[batch]["peak"] + found[batch]["workspace"] - found[batch]["pool"]

        unit = 2 * request.microbatches  # mixup wants an even number
        low, high = unit, 4 * unit
        if needs(low) > 0:
            rows.append({"remat": remat, "largest_batch": 0, "memory": found[low]})
            continue
        while True:
            an_image = (needs(high) - needs(low)) / (high - low)
            guess = max(unit, int(low - needs(low) / an_image) // unit * unit)
            if guess in (low, high) or guess in found:
                break
            low, high = (high, guess) if guess > high else (low, guess)
        while needs(guess) > 0:
            guess -= unit
        while needs(guess + unit) <= 0:
            guess += unit
        rows.append({"remat": remat, "largest_batch": guess, "memory": found[guess]})
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    request, memory, xla = (result[name] for name in ("request", "memory", "with_xla_rematerialization"))
    title = (
        f"{request['model']} {request['precision']}, {request['batch_per_device']} a device, "
        f"{request['hosts']}x{request['devices']} {result['device']}, --remat {request['remat']}"
    )
    table = Table(title=title, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("note")
    table.add_row("parameters", _gib(memory["parameters"]), "GiB a device")
    table.add_row("momentum", _gib(memory["optimizer"]), "GiB a device")
    table.add_row("peak", _gib(memory["peak"]), "GiB, parameters and momentum included")
    table.add_row("cuDNN workspace", _gib(memory["workspace"]), "GiB allowed; the compiler does not see it")
    verdict = "fits" if memory["fits"] else "does NOT fit"
    table.add_row("XLA's share", _gib(memory["pool"]), f"GiB, {POOL:.0%} of the device's: it {verdict}")
    table.add_row("left outside", _gib(memory["outside_pool"]), "GiB for the CUDA context and NCCL")
    table.add_row(
        "with XLA's own remat",
        _gib(xla["peak"]),
        f"GiB; {xla['repeated_instructions']} instructions repeated, {xla['convolutions']} convolutions; "
        f"{'fits' if xla['fits'] else 'does NOT fit'}",
        end_section=True,
    )
    table.add_row("convolutions", f"{result['convolutions']}", f"{result['flops'] / 1e12:.2f} TFLOP with all products")
    for kind, moved in result["traffic"].items():
        table.add_row(f"traffic: {kind}", f"{moved / 1e9:.1f}", "GB read and written")
    table.add_row("traffic", f"{sum(result['traffic'].values()) / 1e9:.1f}", "GB", end_section=True)
    for one in result["collectives"]:
        kinds = ", ".join(f"{moved / 1e6:,.1f} MB {dtype}" for dtype, moved in one["bytes"].items())
        behind = one["overlapped_bytes"] / max(sum(one["bytes"].values()), 1)
        table.add_row(one["kind"], f"{one['count']}", f"over {one['group']} devices: {kinds}; {behind:.0%} overlapped")
    about = result["estimate"]
    table.add_section()
    table.add_row("roofline: computation", f"{about['compute'] * 1e3:.1f}", "ms, an ESTIMATE at published peaks")
    table.add_row("roofline: collectives", f"{(about['overlapped'] + about['exposed']) * 1e3:.1f}", "ms")
    table.add_row("roofline: step", f"{about['step'] * 1e3:.1f}", f"ms: at most {about['images_per_s']:,.0f} images/s")
    console.print(table)
    if result["model_of_hosts"]:
        console.print(f"communication MODEL: the same work a device, {request['network_gbps']:g} Gbit/s a host")
        shown = Table("hosts", "ms a step", "images/s", "of linear")
        one = result["model_of_hosts"][0]
        for row in result["model_of_hosts"]:
            linear = row["images_per_s"] / row["hosts"] / (one["images_per_s"] / one["hosts"])
            shown.add_row(f"{row['hosts']}", f"{row['step'] * 1e3:.1f}", f"{row['images_per_s']:,.0f}", f"{linear:.0%}")
        console.print(shown)


def show_search(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("--remat", "largest batch a device", "GiB with workspace", title="what fits, by compiling")
    for row in rows:
        memory = row["memory"]
        used = _gib(memory["peak"] + memory["workspace"])
        table.add_row(row["remat"], f"{row['largest_batch'] or 'none'}", f"{used} of {_gib(memory['pool'])}")
    console.print(table)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


@dataclasses.dataclass(frozen=True)
class Arguments:
    request: Request
    search: bool = False
    """Find the largest batch a device that fits, for each --remat; --batch-per-device and --remat are ignored."""
    json: UserPath | None = None
    """Write everything here too."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    request = arguments.request
    request.check()
    jax.config.update("jax_platforms", "cpu")  # a GPU that is here must not be taken for the one that is asked for
    console, progress = terminal.console(width=120), terminal.console(stderr=True)
    if arguments.search:
        rows = search(request, progress)
        result: dict[str, Any] = {"request": dataclasses.asdict(request), "search": rows}
        show_search(rows, console)
    else:
        progress.print("compiling twice: a minute or two each for a large model")
        result = plan(request)
        show(result, console)
    if arguments.json is not None:
        write_json(arguments.json, result)


if __name__ == "__main__":
    sys.exit(exit_code(main))
