"""The tasks that both frameworks owe; `serve.py` runs them by their names.

A task returns what it says, as JSON's types, and arrays by name or None. Arrays are in the checkpoint's layout whatever
the framework: images NHWC, kernels HWIO, names as the keys of the weight file.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from parity.sides.clock import Pass

Result = tuple[Any, dict[str, np.ndarray] | None]
Disturb = tuple[Sequence[int], float]  # (seed, relative amplitude), see `inputs.disturbance`


class Tasks(Protocol):
    """One side, in a process that has imported its framework. Arguments that name files are paths.

    `mixed` is a file of batches after normalization and mixup, of which `count` are used; `start` is a file of a state,
    with arrays `params/KEY` and `momentum/KEY`; `seconds` is how long something is timed.
    """

    def injected(self, fault: str | None) -> AbstractContextManager[None]:
        """Has the fault of that name while the `with` block runs; None: no fault."""
        ...

    def attest(self, images: str, dataset: Sequence[Any] = ()) -> Result:
        """Says what computes here: versions, device, precision, constants, and what identifies weights and data."""
        ...

    def products(self) -> Result:
        """Says in which type a matrix product and a convolution really multiply."""
        ...

    def weights(self) -> Result:
        """Returns every array of the weight file, as the model holds it."""
        ...

    def pixels(self, files: Sequence[str], resize: int, crop: int, epochs: int, seed: int, draws: list[Any]) -> Result:
        """Returns what evaluation and `epochs` epochs of training show of image files. JAX's loader draws by the seed;
        PyTorch is told the draws."""
        ...

    def forward(self, images: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Returns every unit's output for the first batch of a file of pictures or a mixed one; with a `teacher` file,
        of units that are each given the teacher's input."""
        ...

    def mix(self, batches: str) -> Result:
        """Returns every batch after normalization and mixup."""
        ...

    def loss(self, mixed: str, disturb: Disturb | None = None) -> Result:
        """Returns the loss of each row of the first batch, and their mean."""
        ...

    def gradients(self, mixed: str, count: int, disturb: Disturb | None = None, scale: float = ...) -> Result:
        """Returns the gradient of each batch's mean loss by every parameter; in float16 the loss is scaled."""
        ...

    def optimizer(self, gradients: str, schedule: dict, momentum: float, step: int, start: str | None = None) -> Result:
        """Returns parameters and momentum after update number `step` with the given gradients, from the momentum in
        `start` or else from one that is not zero."""
        ...

    def curve(
        self,
        mixed: str,
        count: int,
        schedule: dict,
        momentum: float,
        disturb: Disturb | None = None,
        scale: float = ...,
        start: str | None = None,
        step: int = 0,
    ) -> Result:
        """Returns the loss of each of `count` training steps, and the parameters after them; from the state `start`
        after `step` steps, the momentum too."""
        ...

    def accuracy(
        self,
        dataset: str,
        split: str,
        data_dir: str | None,
        class_names: Sequence[str] | None,
        size: int,
        batch: int,
        limit: int | None,
    ) -> Result:
        """Returns logits, label and number of every example that evaluation counts; says evaluation's own sums."""
        ...

    def forward_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times the forward pass; says the losses of its first batch."""
        ...

    def train_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times a step of training; says the losses of its first steps."""
        ...

    def convolution_time(
        self, convolution: list[Any], rows: int, which: Pass, sets: int, repeat: int, seconds: float
    ) -> Result:
        """Times one pass of a convolution by itself."""
        ...

    def again(self, seconds: float) -> Result:
        """Times once more what was timed last."""
        ...

    def loop_time(self, folder: str, resize: int, crop: int, rows: int, steps: int) -> Result:
        """Times training on a folder of images with its input, and an evaluation after it."""
        ...

    def ceiling(self) -> Result:
        """Says how many floating-point operations a second large matrix products reach."""
        ...
