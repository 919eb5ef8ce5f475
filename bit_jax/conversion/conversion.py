"""What is converted: a model's weights in memory, and what it computes in float64 on fixed images."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bit_jax.formats import weights
from bit_jax.formats.described import Description, described
from bit_jax.model.architecture import Architecture

IMAGES = (2, 64, 96, 3)  # shape of the images: two, not square, so that no axis can be taken for another
SEED = 0


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A source of weights.

    Attributes:
        path: the file or directory that it was read from.
        architecture: its architecture.
        arrays: {official key: array}, float32, or float64 where the source has such.
        description: class names and size, where they are known.
    """

    path: Path
    architecture: Architecture
    arrays: Mapping[str, np.ndarray]
    description: Description

    @classmethod
    def of(cls, path: Path, *, num_classes: int | None = None, standardize_eps: float | None = None) -> "Conversion":
        """Reads the source whole. The class names of a head that is replaced are left out.

        Raises:
            WeightsError, RequestError: see `weights.load`.
        """
        architecture, arrays = weights.read(path, num_classes=num_classes, standardize_eps=standardize_eps)
        wide = {
            key: array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32, copy=False)
            for key, array in arrays
        }
        known = described(path)
        if num_classes is not None:
            known = dataclasses.replace(known, class_names=None)
        return cls(path, architecture, wide, known)

    @property
    def class_names(self) -> list[str] | None:
        """The class names, if there is one for each class of the head."""
        names = self.description.class_names
        return names if names is not None and len(names) == self.architecture.num_classes else None

    def logits(self, standardize_eps: float | None = None) -> Float[np.ndarray, "batch num_classes"]:
        """Returns the float64 logits of `images()`, computed on the CPU.

        Args:
            standardize_eps: what is added to a kernel's variance; None: what the weights were trained with.
        """
        architecture = self.architecture
        if standardize_eps is not None:
            architecture = dataclasses.replace(architecture, standardize_eps=standardize_eps)
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            params = weights.unflatten({key: jnp.asarray(array, jnp.float64) for key, array in self.arrays.items()})
            apply = jax.jit(architecture.model(jnp.dtype("float64")).apply)
            return np.asarray(apply({"params": params}, jnp.asarray(images())))


def images() -> Float[np.ndarray, "batch height width 3"]:
    """The images, float64 in [-1, 1], that every target is compared on."""
    return np.random.default_rng(SEED).uniform(-1, 1, IMAGES)
