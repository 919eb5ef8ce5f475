"""Holds an exported file against the model in float64, on fixed images of two sizes."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bit_jax.export.source import LARGEST, Source
from bit_jax.formats.weights import unflatten, with_telling_head

SHAPES = ((3, 32, 40, 3), (2, 49, 33, 3))  # odd and even sizes, neither square
FACTOR = 4.0  # by which the file's rounding may exceed the model's: other orders of summation, as in parity's verdict
# of the largest logit: the same mathematics in float64; 1e-8 for 1e-10 in the standardization is beyond it
LIMIT = 1e-9


class Format(Protocol):
    """A module of this room that writes and runs one kind of file."""

    def require(self, *, checked: bool) -> None:
        """Raises RequestError where a package is missing that writing, or running what is written, needs."""
        ...

    def write(self, source: Source, path: Path, dtype: np.dtype, *, beside: bool) -> None: ...

    def run(self, path: Path, batches: Sequence[np.ndarray]) -> list[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Check:
    """How far logits are from those of the Flax model in float64.

    Attributes:
        rmse: RMSE of the file's float32 logits.
        largest: largest difference of the file's float32 logits.
        own_rmse: RMSE of the Flax model's float32 logits.
        apart: largest difference of the logits of the same program, written and run in float64.
        largest_logit: largest float64 logit of the Flax model, in absolute value.
    """

    rmse: float
    largest: float
    own_rmse: float
    apart: float
    largest_logit: float

    @property
    def holds(self) -> bool:
        # a rounding of every logit is allowed even where the model happens to be exact
        allowed = FACTOR * max(self.own_rmse, float(np.finfo(np.float32).eps) * self.largest_logit / 4)
        return self.rmse <= allowed and self.apart <= LIMIT * max(self.largest_logit, 1.0)

    def __str__(self) -> str:
        return (
            f"logits up to {self.largest_logit:.3g}: the program in float64 differs from the model by {self.apart:.1e} "
            f"({LIMIT:.0e} of the largest is allowed), the file's float32 by {self.rmse:.1e} RMSE "
            f"(the model's own by {self.own_rmse:.1e}; {FACTOR:g} times that is allowed)"
        )


def check(source: Source, path: Path, made: Format, *, beside: bool) -> Check:
    """Runs a file, and the same program in float64, for which there is room on the same disk.

    A new head of zeros makes all logits 0, whatever the rest of a program computes. Both programs are then written for
    the check with random numbers in place of the zeros.

    Args:
        source: what was exported.
        path: the file that was written in float32.
        made: its format.
        beside: whether its weights lie beside it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=f".{path.name}.") as folder:
        telling = dataclasses.replace(source, arrays=with_telling_head(source.arrays))
        if telling.arrays is not source.arrays:
            path = Path(folder) / f"float32{path.suffix}"
            made.write(telling, path, np.dtype(np.float32), beside=beside)
        return _check(telling, path, made, Path(folder), beside=beside)


def _check(source: Source, path: Path, made: Format, folder: Path, *, beside: bool) -> Check:
    """Writes the program in float64 into `folder`, and runs both."""
    batches = images()
    exact = own_logits(source, batches, np.float64)
    own = own_logits(source, batches, np.float32)
    wide = folder / f"float64{path.suffix}"
    made.write(source, wide, np.dtype(np.float64), beside=beside or source.size(np.float64) > LARGEST)
    proven = made.run(wide, batches)
    narrow = made.run(path, [batch.astype(np.float32) for batch in batches])
    return Check(
        _over(narrow, exact, lambda d: np.sqrt((d**2).mean())),
        _over(narrow, exact, lambda d: np.abs(d).max()),
        _over(own, exact, lambda d: np.sqrt((d**2).mean())),
        _over(proven, exact, lambda d: np.abs(d).max()),
        max(float(np.abs(logits).max()) for logits in exact),
    )


def images() -> list[np.ndarray]:
    """Returns the fixed images, float64 in [-1, 1], one batch of each shape; they are multiples of 2/255 from -1."""
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, shape) - 127.5) / 127.5 for shape in SHAPES]


def own_logits(source: Source, batches: Sequence[np.ndarray], dtype: type) -> list[np.ndarray]:
    """Returns the logits of the Flax model, with the official arrays, in a dtype."""
    with jax.enable_x64(dtype == np.float64):
        model = source.architecture.model(jnp.dtype(dtype))
        params = unflatten({key: jnp.asarray(array, dtype) for key, array in source.arrays.items()})
        apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
        return [np.asarray(apply(params, jnp.asarray(batch, dtype))) for batch in batches]


def _over(logits: Sequence[np.ndarray], exact: Sequence[np.ndarray], norm: Callable[[np.ndarray], float]) -> float:
    """Returns the largest of a norm of the differences; infinite where one is not a number."""
    norms = [float(norm(each.astype(np.float64) - other)) for each, other in zip(logits, exact, strict=True)]
    return max(np.inf if np.isnan(value) else value for value in norms)
