"""What a host asks of all hosts: it travels in the rows of a batch, so that all of them see it after the same step."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh

from bit_jax.scale import sharding
from input_pipeline.exits import signal_asked


@dataclasses.dataclass(frozen=True, order=True)
class Asked:
    """What hosts ask for. The largest counts, so that the end of the run, which saves as well, goes before a save.

    Attributes:
        signal: number of the signal that asks the run to end; 0: none.
        save: whether a checkpoint is to be saved.
    """

    signal: int = 0
    save: bool = False

    @property
    def row(self) -> int:
        """The value of "signal" in all rows of a host's batch, from 0; the steps return the largest of all hosts'."""
        return 2 * self.signal + self.save

    @classmethod
    def of(cls, row: int) -> "Asked":
        """Returns what a value of `row` says."""
        return cls(row // 2, bool(row % 2))


NOTHING = Asked()


class Asking:
    """Adds to a batch the signal that asked this host to end, if one did, and its wish to save.

    Args:
        global_batch: number of rows of a batch, over all hosts.
        mesh: the devices that the rows are on.
    """

    def __init__(self, global_batch: int, mesh: Mesh):
        rows = global_batch // jax.process_count()

        @functools.cache
        def on_all_rows(value: int) -> dict[str, jax.Array]:
            return sharding.shard_batch({"signal": np.full(rows, value, np.int32)}, mesh)

        self._on_all_rows = on_all_rows

    def __call__(self, batch: dict[str, jax.Array], *, save: bool = False) -> dict[str, jax.Array]:
        return batch | self._on_all_rows(Asked(signal_asked(), save).row)
