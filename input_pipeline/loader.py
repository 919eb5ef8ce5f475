"""Batches: which examples make up batch number s, in which order, and which of its rows this host reads.

Batch s is a function of (source, seed, s) alone, so a run continues from a step number without other state. Any number
of hosts reads the same global batches, and each reads its own contiguous rows.
"""

import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import numpy as np

from input_pipeline.examples import DamagedImage, DatasetError, Source, decoded, first_undamaged, label_of
from input_pipeline.features import FeatureViews
from input_pipeline.preprocess import Views
from input_pipeline.terminal import printable

READ_AHEAD = 3  # batches that are being made, placed or waiting while another one is in use
# Copying an array takes little longer than the Python code around it, which holds the GIL; more threads would only wait
# for the GIL, and delay the thread that dispatches training steps.
THREADS_FOR_ARRAYS = 2
log = logging.getLogger(__name__)
Rows = dict[str, np.ndarray]  # a `Batch`, by the names of its arrays


class Batch(TypedDict):
    # uint8 [batch, crop, crop, 3]; from a file of features `features` is in its place, float32 [batch, channels]
    image: np.ndarray
    label: np.ndarray  # int32 [batch]
    mask: np.ndarray  # bool [batch]; False where a row is padding of the last batch
    # int32 [batch], the example's index in its source; -1 for padding, -2 - i if another example replaces damaged i
    index: np.ndarray


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of one split.

    Attributes:
        source: the examples.
        views: resizing, cropping and flipping of the images, or `FeatureViews` where the examples are features.
        global_batch: rows of a batch over all hosts.
        seed: seed of order and augmentation, which depend on (seed, epoch, example) only.
        place: function that is applied to a host's batch ahead of its use, such as moving it to the devices.
        host, hosts: index of the host that reads, starting at 0, and the number of hosts.
        threads: threads that read, decode and resize, which all release the GIL; by default one for each core, and two
            where the source's images are arrays.
        skip_damaged: whether training uses the next example in place of a damaged one, which is logged once.
        logged: indices of the damaged examples that were logged.
    """

    source: Source
    views: Views | FeatureViews
    global_batch: int
    seed: int = 0
    place: Callable[[Any], Any] = lambda batch: batch
    host: int = 0
    hosts: int = 1
    threads: int | None = None
    skip_damaged: bool = False
    logged: set[int] = dataclasses.field(default_factory=set, repr=False, compare=False)

    def __post_init__(self):
        if self.global_batch % self.hosts:
            raise DatasetError(f"global batch {self.global_batch} is not divisible by {self.hosts} hosts")

    def train(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Yields (step, placed batch) for start <= step < stop; reading begins with this call, not with the first use.

        Every batch is full; an epoch may end within a batch.
        """
        order = self._order()

        def fill(batch: Rows, row: int, position: int) -> None:
            index = order[position]
            epoch = position // len(self.source)
            self._fill_training_row(batch, row, index, np.random.default_rng((self.seed, epoch, index)))

        return self._batches(fill, start, stop)

    def examples(self, number: int) -> list[int]:
        """Returns the indices of the examples of training batch `number`, over all hosts, in the order of its rows. A
        damaged example is there, and not the one that is shown in its place."""
        order, first = self._order(), number * self.global_batch
        return [int(order[position]) for position in range(first, first + self.global_batch)]

    def _order(self) -> Any:
        """Returns the order of training, over all epochs: {position: index of the example}."""
        import grain  # here, because it imports JAX, which users of `sources.py` alone do not need

        return grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()

    def evaluation(self) -> Iterator[tuple[int, Any]]:
        """Yields (number, placed batch) with every example exactly once over all hosts; padding has mask False."""

        def fill(batch: Rows, row: int, position: int) -> None:
            if position < len(self.source):
                self._fill_row(batch, row, position, self.views.evaluation)
            else:
                batch[self.views.field][row], batch["label"][row] = 0, 0
                batch["mask"][row], batch["index"][row] = False, -1

        return self._batches(fill, 0, math.ceil(len(self.source) / self.global_batch))

    def _fill_training_row(self, batch: Rows, row: int, index: int, rng: np.random.Generator) -> None:
        """Fills a row with the example, or with the first after it that is not damaged, the same in every run."""

        def show(number: int) -> None:
            self._fill_row(batch, row, number, lambda image, into: self.views.train(image, rng, into))

        def note(number: int, error: DamagedImage) -> None:
            if number not in self.logged:
                log.warning("%s; the example after it is shown instead", printable(error))
                self.logged.add(number)

        shown, _ = first_undamaged(self.source, index, show, skip_damaged=self.skip_damaged, note=note)
        batch["index"][row] = index if shown == index else -2 - index

    def _fill_row(self, batch: Rows, row: int, index: int, view: Callable[[Any, np.ndarray], Any]) -> None:
        example = self.source[index]
        label = label_of(example, self.source)
        try:
            view(example["image"], batch[self.views.field][row])
        except DamagedImage as error:
            raise DamagedImage(f"example {example['id']} of {self.source.name} is {error}") from None
        batch["label"][row], batch["mask"][row], batch["index"][row] = label, True, index

    def _batches(self, fill: Callable[[Rows, int, int], None], start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Yields (number, placed batch); `fill(batch, row, position)` writes the row of that position in the order."""
        import grain

        rows = self.global_batch // self.hosts
        cores = len(os.sched_getaffinity(0))
        threads = self.threads or (min(cores, THREADS_FOR_ARRAYS) if decoded(self.source) else cores)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="input")
        part = math.ceil(rows / threads)  # one part per thread, so that threads rarely wait for the GIL

        def make(number: int) -> Any:
            batch: Rows = {
                self.views.field: self.views.empty(rows),
                "label": np.empty(rows, np.int32),
                "mask": np.empty(rows, np.bool_),
                "index": np.empty(rows, np.int32),
            }
            first = number * self.global_batch + self.host * rows

            def fill_part(start: int) -> None:
                for row in range(start, min(start + part, rows)):
                    fill(batch, row, first + row)

            for _ in pool.map(fill_part, range(0, rows, part)):
                pass
            return self.place(batch)

        # two batches are made at a time, so that the pool's threads have work while one batch is finished and placed
        reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=READ_AHEAD)
        ahead: Any = iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(reading))
        ahead.start_prefetch()
        return _ReadAhead(ahead, pool, start)


class _ReadAhead(Iterator):
    """Iterator over numbered batches. Its threads end when it is exhausted, fails or is closed; if it is garbage, they
    end a few batches later.

    It has no finalizer, because garbage is collected at any allocation, even in a thread that holds an executor's lock;
    shutting down another executor there takes the same locks in the opposite order.
    """

    def __init__(self, ahead: Any, pool: ThreadPoolExecutor, start: int):
        self._ahead, self._pool, self._numbers = ahead, pool, itertools.count(start)

    def __next__(self) -> tuple[int, Any]:
        try:
            batch = next(self._ahead)
        except BaseException:
            self.close()
            raise
        return next(self._numbers), batch

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._ahead.close()
