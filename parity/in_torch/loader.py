"""BiT's PyTorch input as a DataLoader, to compare speeds with: `python -m parity.in_torch.loader torch FOLDER BATCH`.

As in BiT's PyTorch code, Pillow decodes, resizes, crops and mirrors images in worker processes; batches are float32
NCHW.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from input_pipeline.bench import CROP, RESIZE_TO, serve
from input_pipeline.examples import Source
from input_pipeline.sources import open_source
from parity.in_torch import pipeline
from parity.sides.images import rgb


class Images(Dataset):
    """A source's examples as training shows them, (float32 [3, crop, crop] in [-1, 1], label): resized to a square of
    side `resize`, cropped at random and mirrored by chance."""

    def __init__(self, source: Source, resize: int, crop: int):
        self.source, self.resize, self.crop = source, resize, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        example = self.source[index]
        image = rgb(example, self.source.name)
        top, left = (int(offset) for offset in torch.randint(self.resize - self.crop + 1, (2,)))
        mirrored = bool(torch.rand(()) < 0.5)
        pixels = pipeline.train(image, self.resize, self.crop, top, left, mirrored)
        return pipeline.to_tensor(np.ascontiguousarray(pixels), torch.float32), example["label"]


class EvaluationImages(Dataset):
    """A source's examples as evaluation shows them, (float32 [3, crop, crop] in [-1, 1], label)."""

    def __init__(self, source: Source, crop: int):
        self.source, self.crop = source, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        example = self.source[index]
        pixels = pipeline.evaluation(rgb(example, self.source.name), self.crop)
        return pipeline.to_tensor(pixels, torch.float32), example["label"]


def evaluation_batches(source: Source, batch: int, *, crop: int, workers: int) -> Iterator[Any]:
    """Yields (images, labels) of every example once, in order."""
    return iter(DataLoader(EvaluationImages(source, crop), batch, num_workers=workers))


def batches(
    source: Source, batch: int, *, resize: int, crop: int, workers: int, shard: tuple[int, int] = (0, 1)
) -> Iterator[Any]:
    """Yields (images, labels) in shuffled epochs without end; the last batch of an epoch is dropped if it is short.

    Args:
        source: dataset.
        batch: number of rows in a batch of this process.
        resize, crop: sides in pixels of the resized images, and of the crops.
        workers: number of processes that read images.
        shard: (index of this process, number of processes that share an epoch).
    """
    images, (rank, count) = Images(source, resize, crop), shard
    sampler: DistributedSampler = DistributedSampler(images, count, rank, drop_last=True)
    loader = DataLoader(images, batch, sampler=sampler, num_workers=workers, drop_last=True, persistent_workers=True)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


if __name__ == "__main__":
    cores = len(os.sched_getaffinity(0))
    source = open_source(f"folder:{sys.argv[2]}", "train")
    serve(batches(source, int(sys.argv[3]), resize=RESIZE_TO, crop=CROP, workers=cores))
