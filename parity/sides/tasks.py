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
UNKNOWN = "unknown"  # an entry of the attestation that a side cannot look up
ANY = "any"  # a size of its images that an exported file leaves open


class ForwardTasks(Protocol):
    """What every side owes, an exported file too. Arguments that name files are paths."""

    def injected(self, fault: str | None) -> AbstractContextManager[None]:
        """Has the fault of that name while the `with` block runs; None: no fault."""
        ...

    def attest(self, images: str, dataset: Sequence[Any] = (), *, program: bool = False) -> Result:
        """Says what computes here: versions, device, precision, constants, and what identifies weights and data; with
        `program`, also what identifies the compiled forward pass, if there is one."""
        ...

    def products(self) -> Result:
        """Says in which type a matrix product and a convolution really multiply."""
        ...

    def forward(self, images: str) -> Result:
        """Returns the logits, and the output of every unit that can be observed."""
        ...

    def loss(self, mixed: str) -> Result:
        """Returns the loss of each row of the first batch, and their mean."""
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


class Tasks(ForwardTasks, Protocol):
    """One side, in a process that has imported its framework.

    `mixed` is a file of batches after normalization and mixup, of which `count` are used; `start` is a file of a state,
    with arrays `params/KEY`, `momentum/KEY` and, if an average is kept, `ema/KEY`; `seconds` is how long something is
    timed; `additions` has the fields of `Additions` that are not off, or is None.
    """

    def weights(self) -> Result:
        """Returns every array of the weight file, as the model holds it."""
        ...

    def pixels(
        self,
        files: Sequence[str],
        resize: int,
        crop: int,
        epochs: int,
        seed: int,
        draws: list[Any],
        crop_style: str = "bit",
    ) -> Result:
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

    def loss(self, mixed: str, disturb: Disturb | None = None, additions: dict | None = None) -> Result:
        """Returns the loss of each row of the first batch, and their mean."""
        ...

    def gradients(
        self,
        mixed: str,
        count: int,
        disturb: Disturb | None = None,
        scale: float = ...,
        additions: dict | None = None,
    ) -> Result:
        """Returns the gradient of each batch's mean loss by what trains; in float16 the loss is scaled."""
        ...

    def operations(self, mixed: str, site: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Records the values and gradients of one site's operations; with a `teacher`, the file of a recording, returns
        what each operation, and its gradient, makes of the recorded ones; see `operations.py`."""
        ...

    def operation(
        self, question: dict[str, Any], operands: str, disturb: Disturb | None = None, programs: str | None = None
    ) -> Result:
        """Returns what one operation by itself makes of operands, computed by the model's module and, under names that
        begin with `plain`, by the framework's public functions; writes the module's program into a folder."""
        ...

    def optimizer(
        self,
        gradients: str,
        schedule: dict,
        momentum: float,
        step: int,
        start: str | None = None,
        additions: dict | None = None,
    ) -> Result:
        """Returns parameters, momentum and average after update number `step` with the given gradients, from momentum
        and average in `start` or else from such that are not zero."""
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
        additions: dict | None = None,
    ) -> Result:
        """Returns the loss of each of `count` training steps, and parameters and average after them; from the state
        `start` after `step` steps, the momentum too."""
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

    def ceiling(self, seconds: float) -> Result:
        """Says how many floating-point operations a second large matrix products reach, timed for so many seconds."""
        ...
