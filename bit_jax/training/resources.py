"""Compares a run's needs with the machine's resources before the run starts, not hours later."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import psutil

from bit_jax.checkpoints import local
from bit_jax.config import NO_ADDITIONS, Additions
from bit_jax.model.architecture import Architecture
from bit_jax.training.trained import trains
from bit_jax.training.workdir import Workdir
from input_pipeline.errors import RequestError
from input_pipeline.limits import RESERVED, raise_descriptor_limit

GIB, MIB = 2**30, 2**20
SHARED_PER_GPU = 32 * MIB  # NCCL's buffers in /dev/shm if GPUs of a host communicate through it
SHARED = Path("/dev/shm")
HOST_MEMORY = "host memory, GiB"
MEMORY = ("tmpfs", "ramfs")  # file systems
# files with a container's memory limit and its use, in cgroups v2 and v1
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
USED = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))


@dataclasses.dataclass(frozen=True)
class Need:
    """The need of one resource.

    Attributes:
        name: the resource's name, with its unit.
        needed, available: amounts in that unit.
        remedy: advice for the case that too little is available.
    """

    name: str
    needed: float
    available: float
    remedy: str

    @property
    def enough(self) -> bool:
        return self.needed <= self.available


def needs(
    architecture: Architecture,
    dtype: np.dtype,
    workdir: Workdir,
    keep: int,
    files: int,
    additions: Additions = NO_ADDITIONS,
) -> list[Need]:
    """Returns all needs that are known before a run starts.

    Args:
        architecture, dtype: architecture and dtype of the parameters.
        workdir: work directory, which receives the checkpoints.
        keep: number of checkpoints to keep; there is one more while a checkpoint is written.
        files: number of files that stay open while the datasets are read.
        additions: which parameters train, and whether an average of them is kept.
    """
    sizes = {key: int(np.prod(shape)) * np.dtype(dtype).itemsize for key, shape in architecture.layout.items()}
    parameters = sum(sizes.values())
    training = sum(size for key, size in sizes.items() if trains(key, additions.train))
    in_store = workdir.mirror is not None
    state = parameters + training * (1 if additions.ema is None else 2)  # parameters, momentum and their average
    return [
        Need(
            "open files (ulimit -n)",
            files + RESERVED,
            raise_descriptor_limit(),
            "raise the hard limit (ulimit -Hn), or prepare the dataset in fewer shards",
        ),
        Need(
            f"space under {workdir.path.parent if in_store else workdir.path}, GiB",
            # a store gets this host's part of each checkpoint from here
            ((state / jax.process_count() if in_store else (keep + 1) * state) + parameters) / GIB,
            (_free(workdir.path) + _written(workdir)) / GIB,
            "free some, or give another directory for temporary files in the environment variable TMPDIR"
            if in_store
            else "free some, choose another --workdir, or lower --keep-checkpoints",
        ),
        Need(
            HOST_MEMORY,
            # on a CPU the state and the gradients; elsewhere the copy of the state that a checkpoint is written from
            (state + training if jax.default_backend() == "cpu" else state) / GIB,
            _free_memory() / GIB,
            "end other programs, or give the container more",
        ),
        Need(
            "shared memory (/dev/shm), GiB",
            (SHARED_PER_GPU * jax.local_device_count() if _talks_through_shared_memory() else 0) / GIB,
            _free(SHARED) / GIB if SHARED.exists() else 0,
            "start the container with a larger --shm-size, or with --ipc=host",
        ),
    ]


def with_local_copies(needs: list[Need], directory: Path, state: int, workdir: Workdir) -> list[Need]:
    """Returns the needs of a run that keeps local copies as well: space for them, and host memory for those that lie in
    memory, and for the one that is being written.

    Args:
        needs: what the run needs without them.
        directory: directory of the local copies.
        state: bytes of the part of the state that this host's devices hold.
        workdir: work directory, which names this run's earlier copies; new ones replace those.
    """
    copies = (local.kept() + 1) * state / GIB
    run = workdir.known_run
    written = sum(local.sizes(directory / run)) / GIB if run else 0
    in_memory = _in_memory(directory)
    more = state / GIB + (copies if in_memory else 0)
    space = Need(
        f"space under {directory}, GiB",
        copies,
        _free(directory) / GIB + written,
        "free some, choose other --local-checkpoints, or leave them out",
    )
    return [
        dataclasses.replace(need, needed=need.needed + more, available=need.available + written * in_memory)
        if need.name == HOST_MEMORY
        else need
        for need in needs
    ] + [space]


def _in_memory(path: Path) -> bool:
    """Whether what is written at the path lies in the machine's memory, as under /dev/shm."""
    whole = path.absolute()
    mounts = [part for part in psutil.disk_partitions(all=True) if whole.is_relative_to(part.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda part: len(part.mountpoint)).fstype in MEMORY


def require(needs: list[Need]) -> None:
    """Checks that every need is met.

    Raises:
        RequestError: there is too little of a resource; the message names the first.
    """
    for need in needs:
        if not need.enough:
            raise RequestError(
                f"the run needs {amount(need.needed)} of {need.name}, and there are {amount(need.available)}; "
                f"{need.remedy}"
            )


def amount(value: float) -> str:
    """Formats an amount: a number from 100 on without decimals, a smaller one with four digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _talks_through_shared_memory() -> bool:
    return jax.default_backend() == "gpu" and jax.local_device_count() > 1


def _free(path: Path) -> int:
    """Returns the bytes that this user may write on the path's file system, even if the path does not exist yet."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _written(workdir: Workdir) -> int:
    """Returns the bytes of this run's earlier files, which new ones will replace."""
    files = [workdir.final, *workdir.checkpoints.rglob("*")] if workdir.checkpoints.is_dir() else []
    return sum(path.stat().st_size for path in files if path.is_file())


def _free_memory() -> int:
    """Returns the free bytes of the machine, or of the container if that has less."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for limit, used in zip(LIMITS, USED, strict=True):
        try:
            free = min(free, int(limit.read_text()) - int(used.read_text()) + _reclaimable(used.parent))
        except (OSError, ValueError):  # another version of cgroups, or the limit "max"
            continue
    return free


def _reclaimable(group: Path) -> int:
    """Returns the bytes of cached files that count as the container's memory, which the kernel frees when needed."""
    lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines() if len(line.split()) == 2)
    return int(lines.get("inactive_file", 0)) + int(lines.get("active_file", 0))
