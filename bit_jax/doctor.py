"""Before hours are spent: whether all hosts would compute the same run, and how fast they reach each other."""

import contextlib
import dataclasses
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from bit_jax.config import Config, identity
from bit_jax.model.precision import PRECISIONS, products
from bit_jax.scale import hosts
from bit_jax.scale import sharding as mesh
from bit_jax.training import figures, resources
from input_pipeline import terminal
from input_pipeline.errors import RequestError, RunFailed

ROOT = Path(__file__).parent.parent
PROGRAM = ("bit_jax/**/*.py", "input_pipeline/**/*.py")  # relative to ROOT, which holds both packages
ELEMENTS = 2**24  # float32 numbers that every device ends with, 64 MiB: enough for the full rate of NVLink
REPETITIONS = 5
MISSING = "missing"


def examine(cfg: Config, inputs: dict[str, str], needs: list[resources.Need]) -> None:
    """Compares the hosts, tries the mesh's collectives, and prints both on the first host.

    Args:
        cfg: of the run that is to be started.
        inputs: {"weights" or a dataset: its fingerprint}.
        needs: what the run will need of this machine.

    Raises:
        RequestError: the hosts differ, or do not fit the mesh.
        RunFailed: a collective returns a wrong number.
    """
    found = [json.loads(text) for text in hosts.exchange("doctor", json.dumps(_facts(cfg, inputs, needs)))]
    console = terminal.console(width=120, quiet=not hosts.is_first())
    console.print(_comparison(found))
    console.print(_resources(found))
    if differing := _differences([one["alike"] | one["flags"] for one in found]):
        raise RequestError(f"the hosts differ: {'; '.join(differing)}; make them alike before the run is started")
    for warning in _unused_gpus(found):
        console.print(warning, style="yellow")
    resources.require(needs)  # each host says it of itself

    devices = mesh.make_mesh(fsdp=mesh.parse_mesh(cfg.scale.mesh, jax.device_count()))
    seconds = cfg.scale.host_timeout
    late = f"the collectives were not done in {seconds} s; the hosts reach --coordinator, but do they reach each other?"
    with hosts.within(seconds, late, 1) if devices.size > 1 else contextlib.nullcontext():
        console.print(_links(measure(devices)))
    shape = ",".join(f"{axis}={size}" for axis, size in devices.shape.items())
    what = "alike, and every collective's result is right" if devices.size > 1 else "nothing to compare"
    console.print(f"hosts: {len(found)}, devices: {devices.size} ({shape}); {what}")


def _facts(cfg: Config, inputs: dict[str, str], needs: list[resources.Need]) -> dict:
    """Of this host: what has to be the same on all, and what only has to be known."""
    local, flags = jax.local_devices(), identity(cfg)
    used = dict(zip(("matrix", "convolution"), products(PRECISIONS[cfg.model.precision]), strict=True))
    alike = {
        **figures.versions(),
        "program": _digest(path.read_bytes() for pattern in PROGRAM for path in sorted(ROOT.glob(pattern))),
        "configuration": _digest([json.dumps(flags, sort_keys=True).encode()]),
        **inputs,
        "devices": f"{len(local)} x {local[0].device_kind}",
        "products": ", ".join(f"{kind} {width}" for kind, width in used.items()),
    }
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return {
        "machine": platform.node(),
        "gpus": gpus,
        "devices": len(local),
        "alike": alike,
        "flags": flags,
        "needs": [dataclasses.asdict(need) for need in needs],
    }


def _resources(found: list[dict]) -> Table:
    """What each host has of what the run needs; too little is marked."""
    table = Table("resource", "needed", *(f"host {number}" for number in range(len(found))), title="Resources")
    for rows in zip(*(one["needs"] for one in found), strict=True):
        needs = [resources.Need(**row) for row in rows]
        have = [resources.amount(need.available) + ("" if need.enough else " (too little)") for need in needs]
        table.add_row(needs[0].name, resources.amount(max(need.needed for need in needs)), *have)
    return table


def _differences(found: list[dict]) -> list[str]:
    everything = dict.fromkeys(what for one in found for what in one)  # a host may have read another dataset
    return [
        f"{what} is {one.get(what, MISSING)} on host {number}, {found[0].get(what, MISSING)} on host 0"
        for number, one in enumerate(found)
        for what in everything
        if one.get(what, MISSING) != found[0].get(what, MISSING)
    ]


def _digest(parts: Iterable[bytes]) -> str:
    """The first 64 bits of SHA-256, which is enough to tell honest files apart."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """As `_digest`, of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _unused_gpus(found: list[dict]) -> list[str]:
    """One sentence for every machine that has more NVIDIA GPUs than the run would use, which may be meant so."""
    used = dict.fromkeys((one["machine"] for one in found), 0)
    for one in found:
        used[one["machine"]] += one["devices"] if "cpu" not in one["alike"]["devices"] else 0
    there = {one["machine"]: one["gpus"] for one in found}
    return [
        f"{machine} has {there[machine]} NVIDIA GPUs, of which the run would use {count}"
        for machine, count in used.items()
        if count < there[machine]
    ]


def _comparison(found: list[dict]) -> Table:
    table = Table("", "host 0", "the others", title="What has to be the same on every host")
    for what, value in found[0]["alike"].items():
        values = {number: one["alike"].get(what, MISSING) for number, one in enumerate(found)}
        others = [f"host {number}: {other}" for number, other in values.items() if other != value]
        table.add_row(what, value, "\n".join(others) or ("the same" if len(found) > 1 else "there are none"))
    return table


@dataclasses.dataclass(frozen=True)
class Link:
    """One collective over one axis of the mesh, in groups of so many devices.

    Attributes:
        seconds: median of REPETITIONS, each waited for.
        rate: bytes/s of each device's link, nccl-tests' "bus bandwidth": what it had to send by the best algorithm,
            over the time. All-reduce: 2 (n-1)/n of the result; all-gather: (n-1)/n.
    """

    collective: str
    axis: str
    devices: int
    seconds: float
    rate: float


def measure(devices: Mesh) -> list[Link]:
    """All-reduce and all-gather over each axis of the mesh that has several places.

    Raises:
        RunFailed: a result is not the one that every device has to have.
    """
    axes = [axis for axis, size in devices.shape.items() if size > 1]
    return [one for axis in axes for one in (_all_reduce(devices, axis), _all_gather(devices, axis))]


def _all_reduce(devices: Mesh, axis: str) -> Link:
    """Of 1 on the first place of the axis, 2 on the second, and so on."""
    size = devices.shape[axis]
    numbers = _spread(devices, axis, lambda place: np.full((1, ELEMENTS), place + 1, np.float32))
    add = jax.jit(lambda numbers: numbers.sum(axis=0), out_shardings=NamedSharding(devices, PartitionSpec()))
    right = np.full(ELEMENTS, size * (size + 1) // 2, np.float32)
    return _timed("all-reduce", axis, size, lambda: add(numbers), right, sent=2 * (size - 1) / size)


def _all_gather(devices: Mesh, axis: str) -> Link:
    """Of as many numbers from each place, which are the place's."""
    size = devices.shape[axis]
    part = ELEMENTS // size
    numbers = _spread(devices, axis, lambda place: np.full((1, part), place, np.float32))
    gather = jax.jit(lambda numbers: numbers, out_shardings=NamedSharding(devices, PartitionSpec()))
    right = np.repeat(np.arange(size, dtype=np.float32)[:, None], part, axis=1)
    return _timed("all-gather", axis, size, lambda: gather(numbers), right, sent=(size - 1) / size)


def _spread(devices: Mesh, axis: str, of_place: Callable[[int], np.ndarray]) -> Array:
    """A global array whose first dimension lies along the axis, one row on each of its places."""
    rows, columns = devices.shape[axis], of_place(0).shape[1]
    sharding = NamedSharding(devices, PartitionSpec(axis))

    def row(part: tuple[slice, ...] | None) -> np.ndarray:
        assert part is not None
        return of_place(part[0].start or 0)

    return jax.make_array_from_callback((rows, columns), sharding, row)


def _timed(collective: str, axis: str, size: int, run: Callable[[], Array], right: np.ndarray, *, sent: float) -> Link:
    try:
        first = jax.block_until_ready(run())  # which compiles it and opens the connections
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
