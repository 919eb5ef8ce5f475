"""What a model sees in image files: `python -m bit_jax.predict --weights final.npz IMAGE...`.

It prints the five likeliest classes of each image, and with --html shows them on a page. With --features it writes what
the model's head is given for each image instead.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

import input_pipeline
from bit_jax.formats import weights
from bit_jax.formats.described import described
from bit_jax.formats.sources import digest
from bit_jax.formats.weights import Params
from bit_jax.model.architecture import Architecture
from bit_jax.model.class_names import in_words
from bit_jax.model.precision import choose
from bit_jax.model.resnetv2 import ResNetV2
from bit_jax.predictions import page, rows
from bit_jax.predictions.classes import Head
from bit_jax.predictions.progress import counting
from bit_jax.predictions.views import Preprocessing
from bit_jax.predictions.views import in_words as view_in_words
from bit_jax.published import locate
from bit_jax.scale import sharding
from bit_jax.training import figures, steps
from bit_jax.training.target import Target
from input_pipeline import DatasetError, read_image_file
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.features import Features
from input_pipeline.files import writable
from input_pipeline.flags import UserPath, require_distinct, require_positive
from input_pipeline.loose_files import LooseFiles, find
from input_pipeline.preprocess import native_area
from input_pipeline.terminal import printable

TOP = 5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A likely class of an image, with its name, its label and its probability."""

    name: str
    label: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Request:
    """A model, and the images that it is shown."""

    images: tyro.conf.Positional[tuple[UserPath, ...]]
    """Image files, or directories of them: of images, or of one directory of images for each class."""
    weights: Annotated[str, tyro.conf.arg(metavar="PATH|NAME")]
    """Weights of the model: a file or directory of the official layout, the original PyTorch code, timm or Hugging
    Face; `embedded`, a published name or address, or hf:OWNER/NAME."""
    view: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    html: UserPath | None = None
    """File to write a page to that shows the images with the likeliest classes of each."""
    features: UserPath | None = None
    """File (.npz) to write the pooled features of all images to, with their names and classes, instead of predicting.
    All images are then resized to the same size; docs/evaluating.md describes the file."""
    batch_per_device: int = 32
    """Number of images that each device computes at a time, with --features."""

    def check(self) -> None:
        """Refuses what can be refused before anything is read.

        Raises:
            RequestError: a flag is out of its range, or a file cannot be written.
        """
        if not self.images:
            raise RequestError("no image to predict; name at least one image file")
        require_positive({"--batch-per-device": self.batch_per_device})
        self.view.check()
        if self.html is not None and self.features is not None:
            raise RequestError("--html shows predictions and --features makes none; give one of them")
        outputs = {"--html": self.html, "--features": self.features}
        require_distinct({"--weights": Path(self.weights)} | outputs)
        for image in self.images:
            require_distinct({"IMAGE": image} | outputs)
        for path in filter(None, outputs.values()):
            writable(path)


def main() -> None:
    predict_files(tyro.cli(Request, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))


def predict_files(request: Request) -> None:
    """Prints the five likeliest classes of each image, or writes the features of all images to a file."""
    request.check()
    files = find(request.images)
    path = locate.weight_file(request.weights)
    if request.features is not None:
        input_pipeline.raise_descriptor_limit()
        features_of(files, request, path).save(request.features)
        print(f"{printable(request.features)}: features of {len(files):,} images")
        return
    shown = []
    for image, predictions in predict(path, files.paths, view=request.view):
        print(printable(image))
        for prediction in predictions:
            print(f"  {prediction.probability:7.2%}  {printable(prediction.name)}  ({prediction.label})", flush=True)
        if request.html is not None:
            shown.append(predictions)
    if request.html is not None:
        architecture, _ = weights.read(path)
        every = zip(files.names, files.paths, shown, strict=True)
        images = ((name, read_image_file(file), top) for name, file, top in every)
        page.write_images(request.html, images, weights=request.weights, architecture=architecture)


def predict(weight_file: Path, images: Sequence[Path], *, view: Preprocessing | None = None):
    """Yields (path, the five likeliest classes as `Prediction`s, the likeliest first) for each image file.

    Args:
        view: how images are resized; None: as the weights were fine-tuned.

    Raises:
        RequestError, DatasetError: the weights or an image cannot be read.
    """
    view = view or Preprocessing()
    known = described(weight_file)
    model, params = weights.load(weight_file)
    if note := Architecture.of(model).note:
        print(note, file=sys.stderr)
    names = class_names(known.class_names, model.num_classes)
    for path in images:
        encoded = read_image_file(path)
        try:
            side = view.side(known, functools.partial(native_area, encoded))
            pixels = view.views(known, side).evaluation(encoded)
        except DatasetError as error:
            raise DatasetError(f"{path} is {error}") from None
        image = steps.normalize(jnp.asarray(pixels[None]), jnp.dtype(jnp.float32))
        probabilities = np.asarray(_probabilities(model, params, image))
        likeliest = np.argsort(-probabilities, kind="stable")[:TOP]
        yield path, [Prediction(names[label], int(label), float(probabilities[label])) for label in likeliest]


@functools.partial(jax.jit, static_argnames="model")
def _probabilities(
    model: ResNetV2, params: Params, image: Float[Array, "1 height width 3"]
) -> Float[Array, " num_classes"]:
    return jax.nn.softmax(model.apply({"params": params}, image)[0])


def class_names(dataset: Sequence[str] | None, num_classes: int) -> list[str]:
    """Returns names to show for the classes of a head: those that `Head.of` finds, in words, else numbers.

    Args:
        dataset: the class names of the dataset that the weights were trained on, or None if they are not known.
    """
    head = Head.of(dataset, num_classes, "these weights")
    return [f"class {label}" for label in range(num_classes)] if head is None else in_words(head.names)


def features_of(files: LooseFiles, request: Request, weight_file: Path) -> Features:
    """Computes the pooled features of all files, in float32.

    Raises:
        RequestError, DatasetError: the weights or an image cannot be read.
    """
    known, view = described(weight_file), request.view
    side = view.side(known, lambda: input_pipeline.typical_area(files, skip_damaged=False)[0])
    views, precision = view.views(known, side), choose("fp32")
    architecture, _ = weights.read(weight_file, num_classes=0)
    mesh = sharding.make_mesh()
    rows_each = min(request.batch_per_device, -(-len(files) // mesh.size))
    work = rows.Work(weight_file, architecture, Target(mesh, precision), files, views, rows_each * mesh.size)
    with counting("computing features", len(files)) as done:
        computed = rows.compute(work, rows.pooled_features(work), done)
    metadata = {
        "weights": request.weights,
        "sha256": digest(weight_file),
        "architecture": architecture.name,
        "size": side,
        "resize": view.resize or known.resize,
        "view": view_in_words(views),
        "precision": precision.name,
        "versions": figures.versions(),
    }
    return Features(computed.rows["features"], files.names, files.classes, files.directories, metadata)


if __name__ == "__main__":
    sys.exit(exit_code(main))
