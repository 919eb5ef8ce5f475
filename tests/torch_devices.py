"""One of the processes of PyTorch's side, which has one for each device; it imports no more than that process does."""

import contextlib
from pathlib import Path
from unittest import mock

import numpy as np

from parity.in_torch.devices import Devices
from parity.in_torch.training_tasks import TrainingTorch
from parity.sides import clock
from parity.sides.side import Side


def take_steps(rank: int, averaging: bool, weights: str, batches: str, count: int, meeting: Path, result: Path) -> None:
    """Takes a step on each of `count` batches as one of two devices, which average their gradients or, as a fault, do
    not; the first saves the losses and the parameters after them."""
    with contextlib.nullcontext() if averaging else mock.patch.object(Devices, "replica", lambda self, model: model):
        tasks = TrainingTorch(Side("torch", 2), "fp64", weights, lambda *_: None, rank=rank, meeting=meeting)
        _, saved = tasks.curve(batches, count, clock.SCHEDULE, clock.MOMENTUM)
    if rank == 0:
        np.savez(result, **saved)
