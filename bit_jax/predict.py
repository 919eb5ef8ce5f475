"""Top-5 predictions for image files: `python -m bit_jax.predict --weights final.npz IMAGE...`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from bit_jax import hyperrule, steps, weights, zoo
from bit_jax.class_names import imagenet1k, in_words
from input_pipeline import DatasetError, Views
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.preprocess import native_area

TOP = 5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One of the likeliest classes of an image."""

    name: str
    label: int
    probability: float


def main() -> None:
    tyro.cli(predict_files, description=__doc__)


def predict_files(
    images: tyro.conf.Positional[tuple[Path, ...]],
    weights: Annotated[str, tyro.conf.arg(metavar="NPZ|NAME")],
    size: int | None = None,
) -> None:
    """Prints the five likeliest classes of each image.

    Args:
        images: image files.
        weights: an .npz in the official layout, or a published name.
        size: side of the square the images are resized to. None: what the weights were fine-tuned at, where their
            config.json says so, else BiT-HyperRule's size for the image.
    """
    if not images:
        raise RequestError("no image to predict; name at least one image file")
    if size is not None and size <= 0:
        raise RequestError(f"--size {size} must be greater than 0")
    path = zoo.find(weights)
    for image, predictions in predict(path, images, size=size):
        print(image)
        for prediction in predictions:
            print(f"  {prediction.probability:7.2%}  {prediction.name}  ({prediction.label})")


def predict(weight_file: Path, images: Sequence[Path], *, size: int | None = None):
    """Yields (path, the likeliest five as `Prediction`s, likeliest first) for each image file.

    Raises:
        RequestError, DatasetError: the weights or an image cannot be read.
    """
    model, params = weights.load(weight_file)
    names = class_names(weight_file, model.num_classes)
    size = size or _fine_tuned_size(weight_file)
    resize = _config_beside(weight_file).get("config", {}).get("data.resize", "pillow")
    apply = jax.jit(lambda params, image: jax.nn.softmax(model.apply({"params": params}, image)[0]))
    for path in images:
        try:
            encoded = path.read_bytes()
            side = size or hyperrule.resolution(native_area(encoded))[1]
            pixels = Views(side, side, flip=False, resize=resize).evaluation(encoded)
        except DatasetError as error:
            raise DatasetError(f"{path} is {error}") from None
        except OSError as error:
            raise RequestError(f"cannot read image {path}: {error.strerror}") from None
        image = steps.normalize(jnp.asarray(pixels[None]), jnp.dtype(jnp.float32))
        probabilities = np.asarray(apply(params, image))
        likeliest = np.argsort(-probabilities, kind="stable")[:TOP]
        yield path, [Prediction(names[label], int(label), float(probabilities[label])) for label in likeliest]


def class_names(weight_file: Path, num_classes: int) -> list[str]:
    """Of a head: from the config.json that training left beside the file, ImageNet-1k's for 1,000, else numbers."""
    names = _config_beside(weight_file).get("class_names", [])
    if len(names) == num_classes:
        return in_words(names)
    if num_classes == len(imagenet1k()):
        return list(imagenet1k().values())
    return [f"class {label}" for label in range(num_classes)]


def _fine_tuned_size(weight_file: Path) -> int | None:
    return _config_beside(weight_file).get("recipe", {}).get("crop")


def _config_beside(weight_file: Path) -> dict:
    path = weight_file.parent / "config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise RequestError(f"{path} is damaged ({error}); delete it to predict with numbered classes") from None


if __name__ == "__main__":
    sys.exit(exit_code(main))
