"""Input, mixup and ranking as BiT's PyTorch code does them: Pillow images, torchvision's transforms, NCHW floats.

torchvision's transforms on Pillow images are Pillow calls and one division; they are written out here, so that the
comparison needs no torchvision.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from input_pipeline.examples import Source
from parity.sides.images import rgb


def evaluation(image: Image.Image, crop: int) -> np.ndarray:
    """Resize((crop, crop))."""
    return np.asarray(image.resize((crop, crop), Image.Resampling.BILINEAR))


def train(image: Image.Image, resize: int, crop: int, top: int, left: int, mirrored: bool) -> np.ndarray:
    """Resize((resize, resize)), RandomCrop((crop, crop)), RandomHorizontalFlip(), with the given draws."""
    image = image.resize((resize, resize), Image.Resampling.BILINEAR).crop((left, top, left + crop, top + crop))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def to_tensor(pixels: np.ndarray, dtype: torch.dtype) -> Tensor:
    """ToTensor(), Normalize(0.5, 0.5): uint8 [..., height, width, 3] -> [..., 3, height, width] in [-1, 1]."""
    return ((torch.tensor(pixels).to(dtype) / 255 - 0.5) / 0.5).movedim(-1, -3).contiguous()


def mixup(rows: Tensor, weight: float) -> Tensor:
    """Each row mixed with its neighbour: 0 with 1, 2 with 3 and so on; `weight` is a row's own share."""
    partner = torch.arange(len(rows)) ^ 1
    return weight * rows + (1 - weight) * rows[partner]


def evaluation_batches(
    source: Source, size: int, batch: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
    """(images, labels, numbers) of all examples in order; the last batch is as short as it is."""
    for start in range(0, len(source), batch):
        numbers = np.arange(start, min(start + batch, len(source)))
        examples = [source[int(number)] for number in numbers]
        pixels = np.stack([evaluation(rgb(example, source.name), size) for example in examples])
        yield to_tensor(pixels, dtype), np.array([example["label"] for example in examples], np.int32), numbers


def label_rank(logits: Tensor, label: Tensor) -> Tensor:
    """Place of the label among the sorted logits, 0 the largest; equal logits in the order of their classes.

    A label that is no class, and the label of a row that is not finite, come after everything.
    """
    order = torch.argsort(logits, dim=1, descending=True, stable=True)
    own = order == label[:, None]
    ranked = own.any(dim=1) & logits.isfinite().all(dim=1)
    return own.int().argmax(dim=1).where(ranked, torch.iinfo(torch.int64).max)
