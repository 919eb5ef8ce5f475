"""Checks before a long run whether all hosts would compute the same run, and measures the links between them."""

import contextlib
import dataclasses
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import input_pipeline
from bit_jax.config import Config, of_all_hosts
from bit_jax.model.precision import PRECISIONS, choose, products
from bit_jax.scale import alike, hosts
from bit_jax.training import figures, resources
from bit_jax.training.run import Run
from input_pipeline import terminal
from input_pipeline.errors import RunFailed

ELEMENTS = 2**24  # float32 numbers in a collective's result on every device, 64 MiB: enough for NVLink's full rate
REPETITIONS = 5


def examine(cfg: Config) -> None:
    """Compares the hosts and what the run would be made of there, tries the mesh's collectives, and prints the results
    on the first host. Trains nothing.

    Raises:
        RequestError: the hosts differ, the run would be refused, or its store breaks a promise.
        RunFailed: a collective returns a wrong number.
    """
    choose(cfg.model.precision)  # before any array is made
    console = terminal.console(width=120, quiet=not hosts.is_first())
    # before `Run.of`, which refuses a mesh that does not fit the devices, but cannot name the host that lacks some
    facts = _compare("program and devices", _facts(cfg), console)
    for warning in _unused_gpus(facts):
        console.print(warning, style="yellow")
    run = Run.of(cfg)
    inputs = {source.name: input_pipeline.fingerprint(source) for source in (run.train, run.validation)}
    if run.weight_file is not None:
        inputs["weights"] = file_fingerprint(run.weight_file)
    needs = run.needs()
    facts = _compare("data", {"alike": inputs, "needs": [dataclasses.asdict(need) for need in needs]}, console)
    console.print(_resources(facts))
    resources.require(needs)  # every host checks its own
    if run.workdir.mirror is not None:
        run.workdir.mirror.store.require()  # every host writes there
        console.print(f"{run.workdir.name} keeps the promises that a work directory rests on")

    mesh, seconds = run.mesh, cfg.scale.host_timeout
    late = f"the collectives were not done in {seconds} s; the hosts reach --coordinator, but do they reach each other?"
    with hosts.within(seconds, late, 1) if mesh.size > 1 else contextlib.nullcontext():
        console.print(_links(measure(mesh)))
    shape = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    what = "alike, and every collective's result is right" if mesh.size > 1 else "nothing to compare"
    console.print(f"hosts: {len(facts)}, devices: {mesh.size} ({shape}); {what}")


def _compare(title: str, facts: dict, console: Console) -> list[dict]:
    """Returns the facts of all hosts, and prints those that have to be the same.

    Raises:
        RequestError: they are not the same.
    """
    everyone = [json.loads(text) for text in hosts.exchange(f"doctor, {title}", json.dumps(facts))]
    console.print(_comparison(title, everyone))
    alike.refuse(alike.differences([host["alike"] | host.get("flags", {}) for host in everyone]))
    return everyone


def _facts(cfg: Config) -> dict:
    """Returns this host's facts: those that have to be the same on all hosts (`alike`, `flags`), and others."""
    local, flags = jax.local_devices(), of_all_hosts(cfg)
    used = dict(zip(("matrix", "convolution"), products(PRECISIONS[cfg.model.precision]), strict=True))
    same = {
        **figures.versions(),
        "program": alike.program(),
        "configuration": alike.digest([json.dumps(flags, sort_keys=True).encode()]),
        "devices": f"{len(local)} x {local[0].device_kind}",
        "products": ", ".join(f"{kind} {width}" for kind, width in used.items()),
    }
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return {"machine": platform.node(), "gpus": gpus, "devices": len(local), "alike": same, "flags": flags}


def _resources(facts: list[dict]) -> Table:
    """Makes a table of each host's resources and those that the run needs; it marks where there is too little."""
    table = Table("resource", "needed", *(f"host {number}" for number in range(len(facts))), title="Resources")
    for rows in zip(*(host["needs"] for host in facts), strict=True):
        needs = [resources.Need(**row) for row in rows]
        have = [resources.amount(need.available) + ("" if need.enough else " (too little)") for need in needs]
        table.add_row(needs[0].name, resources.amount(max(need.needed for need in needs)), *have)
    return table


def file_fingerprint(path: Path) -> str:
    """Returns the first 64 bits of the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _unused_gpus(facts: list[dict]) -> list[str]:
    """Returns a sentence for every machine that has more NVIDIA GPUs than the run would use, which may be intended."""
    used = dict.fromkeys((host["machine"] for host in facts), 0)
    for host in facts:
        used[host["machine"]] += host["devices"] if "cpu" not in host["alike"]["devices"] else 0
    there = {host["machine"]: host["gpus"] for host in facts}
    return [
        f"{machine} has {there[machine]} NVIDIA GPUs, of which the run would use {count}"
        for machine, count in used.items()
        if count < there[machine]
    ]


def _comparison(title: str, facts: list[dict]) -> Table:
    table = Table("", "host 0", "the others", title=f"What has to be the same on every host: {title}")
    for name, value in facts[0]["alike"].items():
        values = {number: host["alike"].get(name, alike.MISSING) for number, host in enumerate(facts)}
        others = [f"host {number}: {other}" for number, other in values.items() if other != value]
        table.add_row(name, value, "\n".join(others) or ("the same" if len(facts) > 1 else "there are none"))
    return table


@dataclasses.dataclass(frozen=True)
class Link:
    """The measurement of one collective over one axis of the mesh.

    Attributes:
        devices: number of devices in a group.
        seconds: median of REPETITIONS runs, each of which is waited for.
        rate: bytes/s of each device's link, nccl-tests' "bus bandwidth": the bytes that it has to send by the best
            algorithm, over the time. All-reduce: 2 (n-1)/n of the result; all-gather: (n-1)/n.
    """

    collective: str
    axis: str
    devices: int
    seconds: float
    rate: float


def measure(mesh: Mesh) -> list[Link]:
    """Times all-reduce and all-gather over each axis of the mesh that has more than one device.

    Raises:
        RunFailed: a device's result is wrong.
    """
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    return [link for axis in axes for link in (_all_reduce(mesh, axis), _all_gather(mesh, axis))]


def _all_reduce(mesh: Mesh, axis: str) -> Link:
    """Times the all-reduce of 1 on the axis's first device, 2 on the second, and so on."""
    size = mesh.shape[axis]
    numbers = _spread(mesh, axis, lambda place: np.full((1, ELEMENTS), place + 1, np.float32))
    add = jax.jit(lambda numbers: numbers.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    right = np.full(ELEMENTS, size * (size + 1) // 2, np.float32)
    return _timed("all-reduce", axis, size, lambda: add(numbers), right, sent=2 * (size - 1) / size)


def _all_gather(mesh: Mesh, axis: str) -> Link:
    """Times the all-gather of equally many numbers from each device of the axis, each equal to its index."""
    size = mesh.shape[axis]
    part = ELEMENTS // size
    numbers = _spread(mesh, axis, lambda place: np.full((1, part), place, np.float32))
    gather = jax.jit(lambda numbers: numbers, out_shardings=NamedSharding(mesh, PartitionSpec()))
    right = np.repeat(np.arange(size, dtype=np.float32)[:, None], part, axis=1)
    return _timed("all-gather", axis, size, lambda: gather(numbers), right, sent=(size - 1) / size)


def _spread(mesh: Mesh, axis: str, of_place: Callable[[int], np.ndarray]) -> Array:
    """Makes a global array whose rows are sharded over the axis, one row per index; `of_place(index)` makes a row."""
    rows, columns = mesh.shape[axis], of_place(0).shape[1]
    sharding = NamedSharding(mesh, PartitionSpec(axis))

    def row(part: tuple[slice, ...] | None) -> np.ndarray:
        assert part is not None
        return of_place(part[0].start or 0)

    return jax.make_array_from_callback((rows, columns), sharding, row)


def _timed(collective: str, axis: str, size: int, run: Callable[[], Array], right: np.ndarray, *, sent: float) -> Link:
    try:
        first = jax.block_until_ready(run())  # the first run compiles and opens the connections
    except jax.errors.JaxRuntimeError as error:
        raise RunFailed(f"{collective} over {axis} fails: {str(error).splitlines()[0]}") from None
    for shard in first.addressable_shards:
        if not np.array_equal(np.asarray(shard.data), right):
            raise RunFailed(
                f"{collective} over {axis} gives a wrong result on {shard.device}; a link or a device of its group is "
                "broken: leave out one host after the other to find it"
            )
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return Link(collective, axis, size, median, sent * right.nbytes / median)


def _links(links: list[Link]) -> Table | str:
    if not links:
        return "one device: no collectives to try"
    table = Table(
        "collective", "over", "devices", "ms", "GB/s a link", title=f"Collectives of {ELEMENTS * 4 / 2**20:.0f} MiB"
    )
    for link in links:
        milliseconds, rate = f"{link.seconds * 1e3:.1f}", f"{link.rate / 1e9:.2f}"
        table.add_row(link.collective, link.axis, str(link.devices), milliseconds, rate)
    return table
