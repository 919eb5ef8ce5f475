"""PyTorch on several devices: one process for each device, and DistributedDataParallel averages the gradients."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from input_pipeline.errors import RequestError

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective; processes wait in one while others still compile


@dataclasses.dataclass(frozen=True)
class Devices:
    """This process among those of its side, each of which runs every task on its own device.

    Attributes:
        count: number of processes.
        rank: index of this process; the process of rank 0 answers.
        device: device of this process.
    """

    count: int
    rank: int
    device: torch.device

    @classmethod
    def join(cls, count: int, rank: int, meeting: Path, *, gpu: bool) -> "Devices":
        """Connects this process with the others and returns when all are there. On CPUs each process takes its share of
        the threads.

        Args:
            count: number of processes.
            rank: index of this process.
            meeting: path at which the processes meet; no file is there yet.
            gpu: whether each process has a GPU; otherwise they share the CPU.

        Raises:
            RequestError: there are fewer GPUs than processes.
        """
        if gpu and torch.cuda.device_count() < count:
            raise RequestError(
                f"torch:devices={count} needs {count} GPUs, and PyTorch finds {torch.cuda.device_count()}; take fewer"
            )
        device = torch.device("cuda", rank) if gpu else torch.device("cpu")
        if count > 1:
            if gpu:
                torch.cuda.set_device(device)
            torch.set_num_threads(max(torch.get_num_threads() // count, 1))
            dist.init_process_group(
                "nccl" if gpu else "gloo",
                init_method=meeting.absolute().as_uri(),
                rank=rank,
                world_size=count,
                timeout=TIMEOUT,
            )
        return cls(count, rank, device)

    def replica(self, model: nn.Module) -> nn.Module:
        """Returns what to call in the model's place, so that gradients are averaged over the devices."""
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(model, device_ids=[self.device] if on_gpu else None) if self.count > 1 else model

    def share(self, rows: Tensor) -> Tensor:
        """Returns this device's rows of a batch, whose rows are split over the devices in order."""
        return rows.tensor_split(self.count)[self.rank]

    def gather(self, rows: Tensor) -> Tensor:
        """Returns the rows of all devices in order; each device has equally many."""
        if self.count == 1:
            return rows
        shares = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(shares, rows.contiguous())
        return torch.cat(shares)

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of the devices' values, without gradient."""
        return self.gather(value.detach()[None]).mean(dim=0)

    def total(self, value: float) -> float:
        """Returns the sum of the devices' values."""
        return float(self.gather(torch.tensor([value], dtype=torch.float64, device=self.device)).sum())

    def agreed(self, answer: bool) -> bool:
        """Returns the answer of rank 0 in every process, when all have called this."""
        if self.count == 1:
            return answer
        return bool(self.gather(torch.tensor([answer], device=self.device))[0])

    def wait(self) -> None:
        """Waits until every device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.count > 1:
            self.agreed(True)


def unwrapped(model: Any) -> nn.Module:
    """Returns the model in a replica, or a model that is no replica itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
