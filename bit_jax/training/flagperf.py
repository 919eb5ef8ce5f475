"""FlagPerf's own definitions where they are not this project's, for the switches of `--flagperf-compat`.

Source: FlagOpen/FlagPerf 1b5a030, train/trainer.py and dataloaders/dataloader.py of training/benchmarks/bigtransfer.
FlagPerf runs one process for each device; a "rank" is the number of such a process.
"""

import dataclasses
import math

from jaxtyping import Array, Bool, Int

from bit_jax.accounts.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Rank0Share:
    """The examples that FlagPerf's rank 0 evaluates, and whose accuracy it reports as the accuracy.

    It is PyTorch's DistributedSampler with shuffle=False and drop_last=True: what is left of the split after the same
    number of examples for each device is dropped, and rank 0 takes the first of every `devices` examples.

    Attributes:
        devices: number of devices of the run.
        examples: number of examples in the split.
    """

    devices: int
    examples: int

    @property
    def size(self) -> int:
        """The number of examples that it holds."""
        return self.examples // self.devices

    def holds(self, index: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        """Whether each example, given by its index in the split, belongs to the share; padding (-1) does not."""
        return (index >= 0) & (index < self.size * self.devices) & (index % self.devices == 0)


def epoch_steps(examples: int, devices: int, batch_per_device: int) -> int:
    """Returns the number of steps of FlagPerf's epoch: each rank takes an equal share of the examples, rounded up, in
    batches of which the last may be smaller."""
    return math.ceil(math.ceil(examples / devices) / batch_per_device)


def p_core_unsynchronized(timeline: Timeline, trained: int) -> float | None:
    """Returns images/s over the activity `dispatch`, or None if nothing was trained.

    This is FlagPerf's clock for p_core: it runs from the moment that a step has its batch until the step's work has
    been handed to the devices, and does not wait for that work. It is no rate of training.
    """
    return trained / timeline["dispatch"] if trained else None
