"""Tasks of SLURM and Open MPI: a process's index among those that they start together, and its own GPUs."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from input_pipeline.errors import RequestError

ALL: list[int] = []  # all GPUs, for `jax.distributed.initialize`; None would mean one GPU
# variables with the number of processes, this process's index, and its index on its machine
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
# srun sets these if it assigns GPUs to tasks, so that each task sees only its own
PER_TASK = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU")


class Task(NamedTuple):
    """This process among those that a scheduler started.

    Attributes:
        scheduler: the scheduler's name.
        count, number: the number of processes, and this process's index.
        local_count, local_number: the number of processes on this machine, and this process's index among them.
    """

    scheduler: str
    count: int
    number: int
    local_count: int
    local_number: int

    @classmethod
    def find(cls) -> "Task | None":
        """Returns this process's task, or None if no scheduler started it.

        Raises:
            RequestError: the scheduler's variables do not say how many tasks this machine has.
        """
        if all(name in os.environ for name in SLURM):
            count, number, local_number = (_number(name) for name in SLURM)
            return cls("SLURM", count, number, _slurm_tasks_here(count), local_number)
        if all(name in os.environ for name in OPEN_MPI):
            count, number, local_number = (_number(name) for name in OPEN_MPI)
            return cls("Open MPI", count, number, _number("OMPI_COMM_WORLD_LOCAL_SIZE"), local_number)
        return None

    def own_gpus(self) -> list[int]:
        """Returns the indices, among the GPUs that this process sees, of those to use; `ALL` means all of them.

        If a process sees one GPU, that is its own. If srun assigns GPUs to tasks, each process sees only its own.
        Otherwise all processes of the machine see the same GPUs, and each takes an equal share.

        Raises:
            RequestError: the number of GPUs is not a multiple of the number of the machine's processes.
        """
        seen = visible_gpus()
        if self.local_count == 1 or seen <= 1 or any(os.environ.get(name) for name in PER_TASK) or _gpu_per_task():
            return ALL
        if seen % self.local_count:
            raise RequestError(
                f"{self.scheduler} started {self.local_count} processes on this machine, which see {seen} GPUs; start "
                "as many as there are GPUs, or one for all of them, or hand GPUs out by srun --gpus-per-task"
            )
        share = seen // self.local_count
        return list(range(self.local_number * share, (self.local_number + 1) * share))


def visible_gpus() -> int:
    """Counts the NVIDIA GPUs, or parts of one (MIG), that CUDA will show this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    # CUDA stops at the first entry that is not an index, GPU-<uuid> or MIG-<uuid>
    entries = [entry.strip() for entry in visible.split(",")]
    wrong = (place for place, entry in enumerate(entries) if not re.match(r"\d+$|GPU-|MIG-", entry))
    return next(wrong, len(entries))


def _gpu_per_task() -> bool:
    """Whether srun was told --tres-per-task=gres/gpu:N or --gpu-bind, which hide the other tasks' GPUs."""
    bound = os.environ.get("SLURM_TRES_BIND", "") + os.environ.get("SLURM_GPU_BIND", "")
    return "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "") or bool(bound and "none" not in bound)


def _slurm_tasks_here(count: int) -> int:
    """Returns the number of tasks on this machine; SLURM lists the numbers by node, such as 8(x2),4."""
    listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    nodes = [
        int(tasks) for tasks, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed) for _ in range(int(repeated or 1))
    ]
    node = int(os.environ.get("SLURM_NODEID") or 0)
    if node < len(nodes):
        return nodes[node]
    if os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return count
    raise RequestError(
        f"SLURM_STEP_TASKS_PER_NODE={listed!r} says nothing of node {node}, so this process does not know which GPUs "
        "are its own; start it by srun, or outside of SLURM with --coordinator, --hosts and --host"
    )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise RequestError(f"{name}={text!r} is no number, though the scheduler sets it; start by srun or mpirun")
    return int(text)
