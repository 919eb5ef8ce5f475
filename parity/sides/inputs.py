"""Inputs that both sides get: pictures, files, batches, random draws of augmentation. No framework is imported."""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bit_jax.model.architecture import Architecture
from input_pipeline.examples import DatasetError, Example, Source
from input_pipeline.image_file import read_image_file
from input_pipeline.preprocess import Views
from parity.sides import images
from parity.sides.classes import open_labelled

IDENTIFIED = 500  # examples of a split whose ids and labels the attestation's hash covers
# mixup's weights; most draws of BiT's Beta(0.1, 0.1) are so near 0 or 1, or by chance 1/2, that they would hide faults
LEAST_WEIGHT, MOST_WEIGHT = 0.1, 0.4


def pictures(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Draws coloured waves, edges and noise, uint8 [count, height, width, 3]. All channels differ, and no picture
    equals its mirror image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    drawn = np.empty((count, height, width, 3))
    for image in drawn:
        for channel in range(3):
            u, v, phase = rng.uniform(-12, 12), rng.uniform(-12, 12), rng.uniform(0, 2 * np.pi)
            image[..., channel] = 127 + 70 * np.sin(u * x + v * y + phase)
        top, left = rng.uniform(0, 0.6, 2)
        image[(y > top) & (y < top + 0.3) & (x > left) & (x < left + 0.3)] = rng.uniform(0, 255, 3)
        image += rng.normal(0, 12, image.shape)
    return np.clip(np.round(drawn), 0, 255).astype(np.uint8)


def write_files(folder: Path) -> list[Path]:
    """Writes a few small image files of the kinds in datasets: colour and grey, JPEG and PNG, high and wide, CMYK,
    palette."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {
        "landscape.jpg": (75, 100, "RGB"),
        "portrait.jpg": (131, 97, "RGB"),
        "grey.jpg": (64, 90, "L"),
        "cmyk.jpg": (80, 60, "CMYK"),
        "palette.png": (50, 71, "P"),
        "alpha.png": (33, 33, "RGBA"),
        "tiny.png": (8, 8, "L"),
    }
    for seed, (name, (height, width, mode)) in enumerate(shapes.items()):
        image = Image.fromarray(pictures(1, height, width, seed)[0]).convert(mode)
        image.save(folder / name, quality=92)
    return [folder / name for name in shapes]


class Files:
    """Image files as a `Source`; all labels are 0."""

    name = "image files"
    class_names: Sequence[str] = ("unknown",)

    def __init__(self, paths: Sequence[str | Path]):
        self._paths = [Path(path) for path in paths]
        self.labels = np.zeros(len(paths), np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        path = self._paths[index]
        return {"image": read_image_file(path), "label": 0, "id": path.name}


def described(splits: Sequence[Sequence[Any]]) -> dict[str, str]:
    """Describes the examples of splits for the attestation: their number and name, and a hash over the ids and labels
    of at most `IDENTIFIED` of each split, evenly spread.

    Args:
        splits: (entry of the attestation, dataset, split, data_dir, class names of the head or None) of each split.
    """
    entries = {}
    for entry, *request in splits:
        source = open_labelled(*request)
        chosen = np.linspace(0, len(source) - 1, min(len(source), IDENTIFIED)).astype(int)
        examples = [source[int(index)] for index in chosen]
        identity = "\n".join(f"{example['id']} {example['label']}" for example in examples)
        digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:16]
        first, last = examples[0]["id"], examples[-1]["id"]
        entries[entry] = f"{len(source):,} of {source.name}, ids {first} to {last}, hash {digest}"
    return entries


def draws(views: Views, files: Files, epochs: int, seed: int) -> list[list[tuple[Any, ...]]]:
    """Returns (top, left, mirrored), or the fields of a `Box` in Inception's style, for [epoch][example], drawn from
    (seed, epoch, example) alone as in the loader."""
    sizes = [images.rgb(files[index], files.name).size for index in range(len(files))]

    def draw(epoch: int, index: int) -> tuple[Any, ...]:
        rng, (width, height) = np.random.default_rng((seed, epoch, index)), sizes[index]
        if views.crop_style == "inception":
            return tuple(views.draw_box(rng, height, width))
        window = views.draw(rng)
        return window.top, window.left, window.mirrored

    return [[draw(epoch, index) for index in range(len(files))] for epoch in range(epochs)]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Training batches before mixup.

    Attributes:
        image: images, uint8 [batches, rows, height, width, 3].
        label: labels, int32 [batches, rows].
        weight: mixup's weight of each image itself, float64 [batches]; None: images are not mixed.
        ids: id of every row's example.
    """

    image: np.ndarray
    label: np.ndarray
    weight: np.ndarray | None
    ids: list[list[str]]

    def save(self, path: Path) -> None:
        """Writes images, labels and weights to an .npz file, from which both sides read them."""
        weight: dict[str, Any] = {} if self.weight is None else {"weight": self.weight}
        np.savez(path, image=self.image, label=self.label, **weight)


def joined(parts: Sequence[Batches]) -> Batches:
    """Concatenates batches, one after the other."""
    image, label, weight = (np.concatenate([getattr(p, name) for p in parts]) for name in ("image", "label", "weight"))
    return Batches(image, label, weight, [ids for part in parts for ids in part.ids])


def picture_batches(rows: int, height: int, width: int, num_classes: int, seeds: Iterable[int]) -> Batches:
    """Makes a batch of pictures with random labels for each seed."""
    return joined([picture_batch(rows, height, width, num_classes, seed) for seed in seeds])


def picture_batch(rows: int, height: int, width: int, num_classes: int, seed: int) -> Batches:
    """Makes one batch of pictures with random labels."""
    label = np.random.default_rng(seed).integers(num_classes, size=(1, rows)).astype(np.int32)
    ids = [[f"picture {seed}/{row}" for row in range(rows)]]
    return Batches(pictures(rows, height, width, seed)[None], label, _weights(1, seed), ids)


def dataset_batches(source: Source, count: int, rows: int, height: int, width: int, seed: int) -> Batches:
    """Makes batches of a dataset's examples in an order that the seed decides, each image resized to height x width."""
    order = np.random.default_rng(seed).permutation(len(source))
    chosen = np.resize(order, count * rows)
    examples = [source[int(index)] for index in chosen]
    image = np.stack([_resized(images.rgb(example, source.name), height, width) for example in examples])
    label = np.array([example["label"] for example in examples], np.int32)
    if label.min() < 0 or label.max() >= len(source.class_names):
        raise DatasetError(f"{source.name} has examples without a label, which nothing is trained with; choose a split")
    ids = [str(example["id"]) for example in examples]
    shape = (count, rows)
    return Batches(
        image.reshape(*shape, height, width, 3),
        label.reshape(shape),
        _weights(count, seed),
        [ids[start : start + rows] for start in range(0, count * rows, rows)],
    )


def _resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _weights(count: int, seed: int) -> np.ndarray:
    """Draws mixup's weights, float64 [count]; they are float32 numbers, so that every precision gets the same."""
    drawn = np.random.default_rng(seed).uniform(LEAST_WEIGHT, MOST_WEIGHT, count)
    return drawn.astype(np.float32).astype(np.float64)


def disturbance(name: str, shape: tuple[int, ...], seed: Sequence[int], amplitude: float) -> np.ndarray:
    """Returns factors 1 + u with u uniform in +-amplitude. An array of that name is multiplied by them, to see how much
    a relative error of that size changes the results."""
    rng = np.random.default_rng((*seed, zlib.crc32(name.encode())))
    return 1 + amplitude * rng.uniform(-1, 1, shape)


def disturbed_file(path: str, disturb: tuple[Sequence[int], float] | None) -> dict[str, np.ndarray]:
    """Reads {name: array} of an .npz file and disturbs the arrays; None: they stay as they are."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if disturb is None:
        return arrays
    return {name: array * disturbance(name, array.shape, *disturb) for name, array in arrays.items()}


def random_weights(path: Path, architecture: str, num_classes: int, seed: int = 0) -> None:
    """Writes an official `.npz` with `random_arrays` for R<depth>x<width>."""
    np.savez(path, **random_arrays(Architecture.parse(architecture, num_classes), seed))


def random_arrays(architecture: Architecture, seed: int = 0) -> dict[str, Any]:
    """Draws {official key: float32 array} for an architecture; no array is all zeros or ones."""
    rng = np.random.default_rng(seed)
    flat = {}
    for key, shape in architecture.layout.items():
        if key.endswith("kernel"):
            values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1])) + 0.01 * rng.standard_normal(
                shape[-1]
            )
        else:
            values = 0.1 * rng.standard_normal(shape) + key.endswith("gamma")
        flat[key] = values.astype(np.float32)
    return flat
