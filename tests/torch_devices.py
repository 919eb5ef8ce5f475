"""One of the processes of PyTorch's side, which has one for each device; it imports no more than that process does."""

import contextlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch.distributed

from parity.in_torch.devices import Devices
from parity.in_torch.training_tasks import TrainingTorch
from parity.sides import clock
from parity.sides.side import Side


def take_steps(rank: int, weights: str, batches: str, count: int, folder: Path) -> None:
    """Takes a step on each of `count` batches as one of two devices, which average their gradients, and once more as
    devices that, as a fault, do not. The first saves the losses and the parameters after them, as True.npz and
    False.npz."""
    for averaging in (True, False):
        right = contextlib.nullcontext()
        with right if averaging else mock.patch.object(Devices, "replica", lambda self, model: model):
            meeting = folder / f"meeting {averaging}"
            tasks = TrainingTorch(Side("torch", 2), "fp64", weights, lambda *_: None, rank=rank, meeting=meeting)
            _, saved = tasks.curve(batches, count, clock.SCHEDULE, clock.MOMENTUM)
        torch.distributed.destroy_process_group()
        if rank == 0:
            np.savez(folder / f"{averaging}.npz", **saved)
