"""PyTorch on several devices, as the reference case: a process each, and DistributedDataParallel averages gradients."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from input_pipeline.errors import RequestError

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective; compiling differs by less between processes


@dataclasses.dataclass(frozen=True)
class Devices:
    """This process among those of its side; every one of them runs every task.

    Attributes:
        count: how many processes, with a device each.
        rank: this one's number; 0 answers.
        device: its own.
    """

    count: int
    rank: int
    device: torch.device

    @classmethod
    def join(cls, count: int, rank: int, meeting: Path, *, gpu: bool) -> "Devices":
        """Returns once all are there; `meeting` is a file that none of them has made yet. On CPUs each process takes
        its share of the threads.

        Raises:
            RequestError: there are not as many GPUs.
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
        """What is called in the model's place, so that gradients are those of all rows."""
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(model, device_ids=[self.device] if on_gpu else None) if self.count > 1 else model

    def own(self, rows: Tensor) -> Tensor:
        """This device's share of a batch, in device order."""
        return rows.tensor_split(self.count)[self.rank]

    def joined(self, rows: Tensor) -> Tensor:
        """The whole batch of everyone's shares, which are equal."""
        if self.count == 1:
            return rows
        shares = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(shares, rows.contiguous())
        return torch.cat(shares)

    def mean(self, own: Tensor) -> Tensor:
        return self.joined(own.detach()[None]).mean(dim=0)

    def total(self, own: float) -> float:
        return float(self.joined(torch.tensor([own], dtype=torch.float64, device=self.device)).sum())

    def first(self, own: bool) -> bool:
        """What rank 0 says; until it has, nobody goes on."""
        if self.count == 1:
            return own
        return bool(self.joined(torch.tensor([own], device=self.device))[0])

    def wait(self) -> None:
        """Until every device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.count > 1:
            self.first(True)


def bare(model: Any) -> nn.Module:
    """The model in a replica."""
    return model.module if isinstance(model, DistributedDataParallel) else model
