"""Index -> batch: which examples make batch number s, in which order, and which share of it this host reads.

Position, not state: batch s is a function of (source, seed, s) alone. A run continues from a step number; any number
of hosts reads the same global batches, each its own contiguous rows.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import numpy as np

from input_pipeline.examples import DamagedImage, DatasetError, Source
from input_pipeline.preprocess import Views

READ_AHEAD = 2  # batches waiting before and after `place`: one is in use, one is on its way
DAMAGED_IN_A_ROW = 10  # more are no damaged images but a damaged dataset
log = logging.getLogger(__name__)


class Batch(TypedDict):
    image: np.ndarray  # uint8 [batch, crop, crop, 3]
    label: np.ndarray  # int32 [batch]
    mask: np.ndarray  # bool [batch]; False where a row only fills the last batch
    index: np.ndarray  # int32 [batch]: which example of the source; -1 where a row only fills, -2 - i where another
    # example is shown in place of the damaged example i


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
        threads: that read, decode and resize; all of them release the GIL. None: one a core.
        skip_damaged: show the next example in place of a damaged one, in training; it is said in the log.
    """

    source: Source
    views: Views
    global_batch: int
    seed: int = 0
    place: Callable[[Batch], Any] = lambda batch: batch
    host: int = 0
    hosts: int = 1
    threads: int | None = None
    skip_damaged: bool = False

    def __post_init__(self):
        if self.global_batch % self.hosts:
            raise DatasetError(f"global batch {self.global_batch} is not divisible by {self.hosts} hosts")

    def train(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(step, placed batch) for start <= step < stop, read from this call on, not from the first batch's use.

        An epoch may end within a batch; none is ever short.
        """
        import grain  # here, because it brings JAX, which those who read only `sources.py` do without

        order: Any = grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()

        def row(position: int) -> dict:
            index = order[position]
            epoch = position // len(self.source)
            return self._training_row(index, np.random.default_rng((self.seed, epoch, index)))

        return self._batches(row, start, stop)

    def evaluation(self) -> Iterator[tuple[int, Any]]:
        """(number, placed batch), every example exactly once over all hosts; rows that only fill up have mask False."""

        def row(position: int) -> dict:
            if position < len(self.source):
                return self._row(position, self.views.evaluation)
            image = np.zeros((self.views.crop, self.views.crop, 3), np.uint8)
            return {"image": image, "label": np.int32(0), "mask": False, "index": np.int32(-1)}

        return self._batches(row, 0, math.ceil(len(self.source) / self.global_batch))

    def _training_row(self, index: int, rng: np.random.Generator) -> dict:
        """The example, or the first after it that is not damaged; the same on every host and in every run."""
        for shown in range(index, index + DAMAGED_IN_A_ROW):
            try:
                row = self._row(shown % len(self.source), lambda pixels: self.views.train(pixels, rng))
            except DamagedImage as error:
                if not self.skip_damaged:
                    raise
                log.warning("%s; the example after it is shown instead", error)
            else:
                return row if shown == index else row | {"index": np.int32(-2 - index)}
        raise DatasetError(
            f"{DAMAGED_IN_A_ROW} examples of {self.source.name} from number {index} on are damaged; "
            "python -m input_pipeline check lists all that are"
        )

    def _row(self, index: int, view: Callable[[np.ndarray], np.ndarray]) -> dict:
        example = self.source[index]
        label, classes = example["label"], len(self.source.class_names)
        if not 0 <= label < classes:
            raise DatasetError(
                f"example {example['id']} of {self.source.name} has label {label}, but there are {classes} classes; "
                "choose another split or prepare the dataset again"
            )
        try:
            image = view(self.views.decode(example["image"]))
        except DamagedImage as error:
            raise DamagedImage(f"example {example['id']} of {self.source.name} is {error}") from None
        return {"image": image, "label": np.int32(label), "mask": True, "index": np.int32(index)}

    def _batches(self, row: Callable[[int], dict], start: int, stop: int) -> Iterator[tuple[int, Any]]:
        import grain

        rows = self.global_batch // self.hosts
        threads = self.threads or len(os.sched_getaffinity(0))

        def position(local: int) -> int:
            batch, offset = divmod(local, rows)
            return batch * self.global_batch + self.host * rows + offset

        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(rows, 2 * threads))
        dataset = (
            grain.MapDataset.range(start * rows, stop * rows)
            .map(lambda local: row(position(local)))
            .to_iter_dataset(reading)
            .batch(rows)
            .map(self.place)
        )
        ahead: Any = iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=READ_AHEAD))
        ahead.start_prefetch()
        return _until_closed(ahead, start)


def _until_closed(ahead: Any, start: int) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(ahead, start)
    finally:
        ahead.close()  # its threads end here
