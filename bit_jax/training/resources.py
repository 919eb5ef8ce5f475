"""What a run will need of the machine, held against what there is before the run starts, not hours later."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import psutil

from bit_jax.model.architecture import Architecture
from bit_jax.training.workdir import Workdir
from input_pipeline.errors import RequestError
from input_pipeline.limits import RESERVED, raise_descriptor_limit

GIB, MIB = 2**30, 2**20
SHARED_PER_GPU = 32 * MIB  # NCCL's buffers in /dev/shm where GPUs of a host talk through it
SHARED = Path("/dev/shm")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container
USED = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))


@dataclasses.dataclass(frozen=True)
class Need:
    """One resource.

    Attributes:
        name: what it is, with its unit.
        needed, available: amounts in that unit.
        remedy: what to do where it is not enough.
    """

    name: str
    needed: float
    available: float
    remedy: str

    @property
    def enough(self) -> bool:
        return self.needed <= self.available


def needs(architecture: Architecture, dtype: np.dtype, workdir: Workdir, keep: int, files: int) -> list[Need]:
    """Everything that a run can be told about before it starts.

    Args:
        architecture, dtype: of the parameters.
        workdir: receives the checkpoints.
        keep: how many checkpoints stay; one more is whole while the next is written.
        files: descriptors that reading the datasets holds open.
    """
    parameters = sum(int(np.prod(shape)) for shape in architecture.layout.values()) * np.dtype(dtype).itemsize
    state = 2 * parameters  # with the momentum
    return [
        Need(
            "open files (ulimit -n)",
            files + RESERVED,
            raise_descriptor_limit(),
            "raise the hard limit (ulimit -Hn), or prepare the dataset in fewer shards",
        ),
        Need(
            f"space under {workdir.path}, GiB",
            ((keep + 1) * state + parameters) / GIB,
            (_free(workdir.path) + _written(workdir)) / GIB,
            "free some, choose another --workdir, or lower --keep-checkpoints",
        ),
        Need(
            "host memory, GiB",
            # on a CPU also the gradients; elsewhere the copy from which a checkpoint is written
            (state + parameters if jax.default_backend() == "cpu" else state) / GIB,
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


def require(found: list[Need]) -> None:
    """Raises:
    RequestError: something is not enough; the message names the first.
    """
    for need in found:
        if not need.enough:
            raise RequestError(
                f"the run needs {amount(need.needed)} of {need.name}, and there are {amount(need.available)}; "
                f"{need.remedy}"
            )


def amount(value: float) -> str:
    """A count in full, or a fraction with four digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _talks_through_shared_memory() -> bool:
    return jax.default_backend() == "gpu" and jax.local_device_count() > 1


def _free(path: Path) -> int:
    """Bytes that this user may write on the path's file system, whether the path exists yet or not."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _written(workdir: Workdir) -> int:
    """Bytes of this run's own files there, which the new ones replace."""
    files = [workdir.final, *workdir.checkpoints.rglob("*")] if workdir.checkpoints.is_dir() else []
    return sum(path.stat().st_size for path in files if path.is_file())


def _free_memory() -> int:
    """Bytes of the machine, and of the container where that is less."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for limit, used in zip(LIMITS, USED, strict=True):
        try:
            free = min(free, int(limit.read_text()) - int(used.read_text()) + _reclaimable(used.parent))
        except (OSError, ValueError):  # no such version of cgroups here, or "max"
            continue
    return free


def _reclaimable(group: Path) -> int:
    """Bytes of files that the container's account holds and that the kernel gives back when asked."""
    lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines() if len(line.split()) == 2)
    return int(lines.get("inactive_file", 0)) + int(lines.get("active_file", 0))
