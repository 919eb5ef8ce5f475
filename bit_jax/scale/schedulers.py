"""What SLURM and Open MPI tell the processes that they start together, and which GPUs are a process's own."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from input_pipeline.errors import RequestError

ALL: list[int] = []  # GPUs, for `jax.distributed.initialize`; by None it means one
# how many processes there are, which this is, and its number on its machine
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
# set by srun where GPUs are handed out task by task, so that each task sees its own alone
PER_TASK = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU")


class Task(NamedTuple):
    """This process among those that a scheduler started.

    Attributes:
        scheduler: its name.
        count, number: how many processes there are, and which this is.
        local_count, local_number: the same among those of this machine.
    """

    scheduler: str
    count: int
    number: int
    local_count: int
    local_number: int

    @classmethod
    def find(cls) -> "Task | None":
        """This process's task; None where no scheduler started it.

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
        """Indices, among the GPUs that this process sees, of those that it shall use; `ALL` means all of them.

        A process that sees one GPU was given it. Where srun was told to hand out GPUs by task, each sees its own. Else
        all processes of the machine see the same ones, and each takes an equal share.

        Raises:
            RequestError: the machine's processes see fewer GPUs than they are, or do not divide them.
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
    """How many NVIDIA GPUs, or parts of one (MIG), CUDA will show this process."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    # CUDA stops at the first entry that is none: an index, GPU-<uuid> or MIG-<uuid>
    entries = [entry.strip() for entry in told.split(",")]
    wrong = (place for place, entry in enumerate(entries) if not re.match(r"\d+$|GPU-|MIG-", entry))
    return next(wrong, len(entries))


def _gpu_per_task() -> bool:
    """Whether srun was told --tres-per-task=gres/gpu:N or --gpu-bind, which hide the other tasks' GPUs."""
    bound = os.environ.get("SLURM_TRES_BIND", "") + os.environ.get("SLURM_GPU_BIND", "")
    return "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "") or bool(bound and "none" not in bound)


def _slurm_tasks_here(count: int) -> int:
    """Tasks on this machine: SLURM lists them by node, as 8(x2),4."""
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
