"""The flags of a throughput comparison and the checks of their values."""

import dataclasses
from typing import Annotated, Literal

import tyro

from input_pipeline.errors import RequestError
from input_pipeline.files import writable
from input_pipeline.flags import UserPath, require_positive, typed
from input_pipeline.sources import open_source
from parity.sides import clock
from parity.sides.side import Side, parse_side

RANDOM_CLASSES = 1000  # classes of a random model's head


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The work to time and the arms that do it; each default is written here alone."""

    weights: str = "random:R50x1"
    """Weights: a published name, the path of an .npz, `embedded`, or random:R50x1 for random ones."""
    work: Literal["train", "forward", "loop"] = "train"
    """Work to time: `train` is a training step (forward pass, gradients, SGD with momentum);
    `forward` is the forward pass alone;
    `loop` is the whole loop: reading, decoding and augmenting images, mixup, training, and an evaluation."""
    folder: UserPath | None = None
    """Folder of images for --work loop, FOLDER/train/CLASS/IMAGE; python benchmarks/photographs.py FOLDER draws one."""
    steps: int = 30
    """Number of training steps that each process times with --work loop."""
    size: int = 128
    """Side of the square images in pixels."""
    rows: int = 8
    """Images per batch, over all devices together."""
    loss_check_rows: int | None = None
    """Images per batch in the loss check, which also computes in float64 on the CPU. None: --rows.
    Take fewer for large models and batches."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products and convolutions in every arm."""
    arms: tuple[str, ...] = (
        "torch",
        "torch:channels_last",
        "torch:compile",
        "torch:compile,channels_last",
        "torch:compile,hugepages",
        "torch:compile,channels_last,hugepages",
        "jax",
        "jax:tuned",
        "jax:tuned,hugepages",
    )
    """Sides to time, written like --reference of the rungs.
    `torch` and `jax`, with devices=N or without, run with their frameworks' defaults."""
    processes: int = 3
    """Number of processes of each arm; the arms take turns."""
    seconds: float = 10.0
    """Seconds that each process is timed after compilation and warm-up. --work loop ignores it."""
    together: bool = False
    """Keep one process of each arm and time these in turns, --processes times, so that each arm compiles once.
    On GPUs, their memory must hold all arms."""
    loss_check: Literal["float64", "losses"] = "float64"
    """Loss check that an arm must pass. `float64`: its losses equal float64's up to rounding.
    `losses`: the loss of its first call equals PyTorch's within 2 %, for work too large for float64.
    `python -m parity gradients` judges the same model in full."""
    time_anyway: bool = False
    """Time arms that fail the loss check too, to see what a fault costs or gains.
    Every place that shows such an arm calls it WRONG, no ratio uses it, and the exit code stays 1."""
    seed: int = 0
    """Seed of weights, images and labels."""
    json: UserPath | None = None
    """File to write the measurements to. None: they are only shown."""
    html: UserPath | None = None
    """File to write a web page with plots to. None: no page is written."""
    compare: UserPath | None = None
    """File of an earlier --json to compare with; the exit code is 1 if an arm became slower. None: no comparison."""

    # fault that the tests inject into the arms of the framework that it is written for, see `faults.py`
    fault: Annotated[str | None, tyro.conf.Suppress] = None

    def check(self) -> None:
        """Checks the values against each other and the files that they name.

        Raises:
            RequestError: a value cannot be measured with, or a file cannot be written.
        """
        require_positive(typed(self, "size", "rows", "processes", "seconds", "steps"))
        for flag, rows in (("--rows", self.rows), ("--loss-check-rows", self.checked_rows)):
            for arm, side in self.sides.items():
                unit = 2 * side.devices * side.microbatches  # mixup pairs neighbours
                if rows <= 0 or rows % unit:
                    raise RequestError(f"{flag} {rows} must be a multiple of {unit}: {arm} needs even rows a device")
        if "torch" not in {side.framework for side in self.sides.values()}:
            raise RequestError("--arms needs one of PyTorch, which the others' errors are compared with")
        if (self.work == "loop") != (self.folder is not None):
            raise RequestError("--work loop needs --folder, and nothing else takes it")
        if self.work == "loop" and self.together:
            raise RequestError("--work loop takes no --together: its images would be read at once")
        if self.work == "loop" and self.loss_check == "losses":
            raise RequestError(
                "--work loop takes no --loss-check losses: its batches are drawn by each framework's loader"
            )
        if self.folder is not None:
            evaluated = clock.EVALUATED * self.rows
            if (images := len(open_source(f"folder:{self.folder}", "train"))) < evaluated:
                raise RequestError(f"--folder {self.folder} has {images} training images; {evaluated} are evaluated")
        if self.compare is not None and not self.compare.exists():
            raise RequestError(f"--compare {self.compare} does not exist")
        for path in (self.json, self.html):
            if path is not None:
                writable(path)

    @property
    def checked_rows(self) -> int:
        """Images per batch in the loss check."""
        return self.rows if self.loss_check_rows is None else self.loss_check_rows

    @property
    def sides(self) -> dict[str, Side]:
        """{arm: side}."""
        return {arm: parse_side(arm) for arm in self.arms}
