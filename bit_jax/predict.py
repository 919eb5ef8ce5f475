"""Top-5 predictions for image files: `python -m bit_jax.predict --weights final.npz IMAGE...`."""

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

from bit_jax.formats import weights
from bit_jax.formats.described import described
from bit_jax.formats.weights import Params
from bit_jax.model.architecture import Architecture
from bit_jax.model.class_names import imagenet1k, in_words
from bit_jax.model.resnetv2 import ResNetV2
from bit_jax.published import locate
from bit_jax.training import hyperrule, steps
from input_pipeline import DatasetError, Views, read_image_file
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.flags import UserPath, require_positive
from input_pipeline.preprocess import native_area
from input_pipeline.terminal import printable

TOP = 5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A likely class of an image, with its name, its label and its probability."""

    name: str
    label: int
    probability: float


def main() -> None:
    tyro.cli(predict_files, description=__doc__)


def predict_files(
    images: tyro.conf.Positional[tuple[UserPath, ...]],
    weights: Annotated[str, tyro.conf.arg(metavar="PATH|NAME")],
    size: int | None = None,
) -> None:
    """Prints the five likeliest classes of each image.

    Args:
        images: Image files to classify.
        weights: Weights of the model: a file or directory of the official layout, the original PyTorch code, timm or
            Hugging Face; a published name or address; or hf:OWNER/NAME.
        size: Side in pixels of the square that images are resized to. None: the size that the weights were fine-tuned
            at, where the config.json beside them says so, else BiT-HyperRule's size for the image.
    """
    if not images:
        raise RequestError("no image to predict; name at least one image file")
    require_positive({"--size": size})
    path = locate.weight_file(weights)
    for image, predictions in predict(path, images, size=size):
        print(printable(image))
        for prediction in predictions:
            print(f"  {prediction.probability:7.2%}  {printable(prediction.name)}  ({prediction.label})")


def predict(weight_file: Path, images: Sequence[Path], *, size: int | None = None):
    """Yields (path, the five likeliest classes as `Prediction`s, the likeliest first) for each image file.

    Raises:
        RequestError, DatasetError: the weights or an image cannot be read.
    """
    known = described(weight_file)
    model, params = weights.load(weight_file)
    if note := Architecture.of(model).note:
        print(note, file=sys.stderr)
    names = class_names(known.class_names, model.num_classes)
    size = size or known.crop
    for path in images:
        encoded = read_image_file(path)
        try:
            side = size or hyperrule.resolution(native_area(encoded))[1]
            pixels = Views(side, side, flip=False, resize=known.resize).evaluation(encoded)
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
    """Returns names to show for the classes of a head: the dataset's if it has one for each class, else ImageNet-1k's
    for 1,000 classes, else numbers.

    Args:
        dataset: the class names of the dataset that the weights were trained on, or None if they are not known.
    """
    if dataset is not None and len(dataset) == num_classes:
        return in_words(dataset)
    if num_classes == len(imagenet1k()):
        return list(imagenet1k().values())
    return [f"class {label}" for label in range(num_classes)]


if __name__ == "__main__":
    sys.exit(exit_code(main))
