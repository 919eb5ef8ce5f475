"""Index -> batch: which examples make batch number s, in which order, and which share of it this host reads.

Position, not state: batch s is a function of (source, seed, s) alone. A run continues from a step number; any number
of hosts reads the same global batches, each its own contiguous rows.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import numpy as np

from input_pipeline.preprocess import Views, decode
from input_pipeline.sources import DatasetError, Source

THREADS = 4  # decoding releases the GIL
READ_AHEAD = 2  # batches waiting on each side of `place`


class Batch(TypedDict):
    image: np.ndarray  # uint8 [batch, crop, crop, 3]
    label: np.ndarray  # int32 [batch]
    mask: np.ndarray  # bool [batch]; False where a row only fills the last batch
    index: np.ndarray  # int32 [batch]: which example of the source


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of one split.

    Attributes:
        source: the examples.
        views: how they are shown.
        global_batch: rows of a batch over all hosts.
        seed: of order and augmentation; both depend on (seed, epoch, example) only.
        place: what becomes of a host's batch ahead of its use, such as moving it to the devices.
        host, hosts: whose rows these are.
    """

    source: Source
    views: Views
    global_batch: int
    seed: int = 0
    place: Callable[[Batch], Any] = lambda batch: batch
    host: int = 0
    hosts: int = 1

    def __post_init__(self):
        if self.global_batch % self.hosts:
            raise DatasetError(f"global batch {self.global_batch} is not divisible by {self.hosts} hosts")

    def train(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(step, placed batch) for start <= step < stop. An epoch may end within a batch; none is ever short."""
        import grain  # here, because it brings JAX, which those who read only `sources.py` do without

        order: Any = grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()

        def row(position: int) -> dict:
            index = order[position]
            epoch = position // len(self.source)
            rng = np.random.default_rng((self.seed, epoch, index))
            return self._row(index, lambda image: self.views.train(image, rng))

        return self._batches(row, start, stop)

    def evaluation(self) -> Iterator[tuple[int, Any]]:
        """(number, placed batch), every example exactly once over all hosts; rows that only fill up have mask False."""

        def row(position: int) -> dict:
            if position < len(self.source):
                return self._row(position, self.views.evaluation)
            image = np.zeros((self.views.crop, self.views.crop, 3), np.uint8)
            return {"image": image, "label": np.int32(0), "mask": False, "index": np.int32(-1)}

        return self._batches(row, 0, math.ceil(len(self.source) / self.global_batch))

    def _row(self, index: int, view: Callable) -> dict:
        example = self.source[index]
        try:
            image = view(decode(example["image"]))
        except DatasetError as error:
            raise DatasetError(f"example {example['id']} of {self.source.name} is {error}") from None
        return {"image": image, "label": np.int32(example["label"]), "mask": True, "index": np.int32(index)}

    def _batches(self, row: Callable[[int], dict], start: int, stop: int) -> Iterator[tuple[int, Any]]:
        import grain

        rows = self.global_batch // self.hosts

        def position(local: int) -> int:
            batch, offset = divmod(local, rows)
            return batch * self.global_batch + self.host * rows + offset

        reading = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=READ_AHEAD * rows)
        dataset = (
            grain.MapDataset.range(start * rows, stop * rows)
            .map(lambda local: row(position(local)))
            .to_iter_dataset(reading)
            .batch(rows)
            .map(self.place)
        )
        yield from enumerate(
            grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=READ_AHEAD), start
        )
