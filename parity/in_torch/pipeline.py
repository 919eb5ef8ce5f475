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
    """Resizes an image as evaluation does, uint8 [crop, crop, 3]: Resize((crop, crop))."""
    return np.asarray(image.resize((crop, crop), Image.Resampling.BILINEAR))


def train(image: Image.Image, resize: int, crop: int, top: int, left: int, mirrored: bool) -> np.ndarray:
    """Transforms an image as training does, uint8 [crop, crop, 3], with draws that are given: Resize((resize, resize)),
    RandomCrop((crop, crop)), RandomHorizontalFlip()."""
    image = image.resize((resize, resize), Image.Resampling.BILINEAR).crop((left, top, left + crop, top + crop))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def train_inception(
    image: Image.Image, crop: int, top: int, left: int, height: int, width: int, mirrored: bool
) -> np.ndarray:
    """Transforms an image as training with Inception's crop does, with draws that are given: RandomResizedCrop(crop),
    which crops before it resizes, and RandomHorizontalFlip()."""
    image = image.crop((left, top, left + width, top + height)).resize((crop, crop), Image.Resampling.BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def to_tensor(pixels: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Turns uint8 [..., height, width, 3] into [..., 3, height, width] in [-1, 1]: ToTensor(), Normalize(0.5, 0.5)."""
    return ((torch.tensor(pixels).to(dtype) / 255 - 0.5) / 0.5).movedim(-1, -3).contiguous()


def mixup(rows: Tensor, weight: float) -> Tensor:
    """Mixes each row with its neighbour, 0 with 1, 2 with 3 and so on; `weight` is the share of the row itself."""
    partner = torch.arange(len(rows)) ^ 1
    return weight * rows + (1 - weight) * rows[partner]


def evaluation_batches(
    source: Source, size: int, batch: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
    """Yields (images, labels, indices) of all examples in order; the last batch may be short."""
    for start in range(0, len(source), batch):
        indices = np.arange(start, min(start + batch, len(source)))
        examples = [source[int(index)] for index in indices]
        pixels = np.stack([evaluation(rgb(example, source.name), size) for example in examples])
        yield to_tensor(pixels, dtype), np.array([example["label"] for example in examples], np.int32), indices


def label_rank(logits: Tensor, label: Tensor) -> Tensor:
    """Returns the rank of each row's label among its logits, int64 [rows]: 0 is the largest, and equal logits rank in
    the order of their classes. A label that is no class, or whose row is not finite, ranks behind all classes."""
    order = torch.argsort(logits, dim=1, descending=True, stable=True)
    at_label = order == label[:, None]
    ranked = at_label.any(dim=1) & logits.isfinite().all(dim=1)
    return at_label.int().argmax(dim=1).where(ranked, torch.iinfo(torch.int64).max)
