"""What is exported: the arrays of an official file, with the constants that they were trained with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bit_jax.model.architecture import STANDARDIZED, Architecture
from input_pipeline.errors import RequestError

# bytes of weights in one file: protobuf and flatbuffers, which ONNX and jax.export write, end at 2 GiB
LARGEST = (1 << 31) - (1 << 26)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        architecture: units, width, classes, and what is added to a kernel's variance.
        arrays: {official key: array}; kernels are HWIO and not standardized.
    """

    architecture: Architecture
    arrays: Mapping[str, np.ndarray]

    def require_room(self, dtype: Any) -> None:
        """Raises RequestError where the weights do not fit into one file."""
        size = self.size(dtype)
        if size > LARGEST:
            raise RequestError(
                f"the weights of a {self.architecture} are {size / 1e9:.1f} GB, and a file with them inside cannot be "
                "larger than 2 GiB; add --weights-beside"
            )

    def size(self, dtype: Any) -> int:
        """Returns the bytes that the weights take in a dtype."""
        return sum(array.size for array in self.arrays.values()) * np.dtype(dtype).itemsize

    def folded(self, dtype: Any) -> dict[str, np.ndarray]:
        """Returns {official key: array} with kernels standardized in float64, then rounded to `dtype`.

        Whatever runs the file then neither standardizes kernels nor needs the right epsilon.
        """
        eps = self.architecture.standardize_eps
        return {
            key: (standardized(array, eps) if STANDARDIZED in key else array).astype(dtype)
            for key, array in self.arrays.items()
        }


def standardized(kernel: np.ndarray, eps: float) -> np.ndarray:
    """Returns (kernel - mean) / sqrt(variance + eps) in float64, statistics over all values of an output channel."""
    kernel = kernel.astype(np.float64)
    return (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + eps)
