"""What a comparison is told; every default stands here once."""

import dataclasses
import re
from typing import Annotated, Literal

import tyro

from input_pipeline.errors import RequestError
from input_pipeline.flags import UserPath


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags that all rungs share."""

    weights: str = "embedded"
    """A published name, the path of an .npz, `embedded`, or random:R50x1 for random weights in that architecture."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """What is judged against float64 once float64 itself agrees. fp16: gradients are of the scaled loss, as in
    training. fp64: float64 alone."""
    reference: str = "torch"
    """torch[:devices=N,compile,channels_last,hugepages], or jax[:devices=N,fsdp=N,microbatches=N,remat=norm|unit,tuned,
    hugepages,flags=NAME=VALUE+NAME=VALUE], with flags of XLA."""
    candidate: str = "jax"
    """As --reference; on a CPU the devices are virtual."""
    torch_model: str | None = None
    """package.module:factory in place of the PyTorch reference; it is called with the .npz path and returns an
    nn.Module that maps NCHW images to logits."""
    torch_weights: UserPath | None = None
    """A state dict that is then loaded into that model."""

    size: str = "64"
    """Of the images the model is given: 224, or 97x131 for height x width."""
    rows: int = 8
    """Images a batch."""
    batches: int = 3
    """Batches of gradients; each array's best one counts against float64."""
    disturbances: int = 3
    """Float64 runs, disturbed as much as rounding disturbs, that tell which error to expect. More are fairer to arrays
    of few values."""
    seed: int = 0
    """Of pictures, batches and disturbances."""
    images: tuple[UserPath, ...] = ()
    """Image files for the pixels rung; none: a few are drawn, one of each kind."""

    dataset: str = "digits"
    """For curve and accuracy, as train.py's: digits, folder:PATH, idx:DIRECTORY, or a tfds name."""
    data_dir: UserPath | None = None
    """Where tfds keeps its datasets."""
    train_split: str = "train"
    eval_split: str = "test"
    limit: int | None = None
    """Evaluate only so many examples."""
    eval_size: int | None = None
    """Side of evaluation's images; none: what the weights were trained with, else --size."""
    margin: float = 0.1
    """Within how many percentage points two accuracies count as the same."""

    steps: int = 10
    """Of the curve."""
    base_lr: float = 0.003
    momentum: float = 0.9
    warmup_steps: int = 4
    decay_steps: tuple[int, ...] = (7,)

    run: UserPath | None = None
    """Folder that keeps the report and the logits; none: runs/parity/ and the time."""
    json: UserPath | None = None
    """Also write the report here."""
    html: UserPath | None = None
    """Also write the page here."""
    junit: UserPath | None = None
    """Write JUnit XML here, a test case an array."""
    fail_fast: bool = False
    """End a rung at its first array that differs."""

    fault: Annotated[str | None, tyro.conf.Suppress] = None  # injected on one side, see `faults.py`

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", self.size):
            raise RequestError(f"--size {self.size} is neither a number nor HEIGHTxWIDTH")
        counts = {"--rows": self.rows, "--batches": self.batches, "--disturbances": self.disturbances}
        counts |= {"--steps": self.steps, "--limit": self.limit, "--eval-size": self.eval_size}
        for flag, value in counts.items():
            if value is not None and value < 1:
                raise RequestError(f"{flag} {value} must be at least 1")
        if self.rows % 2:
            raise RequestError(f"--rows {self.rows} must be even: mixup pairs neighbours")
        if self.margin <= 0 or self.base_lr <= 0:
            raise RequestError(f"--margin {self.margin} and --base-lr {self.base_lr} must be greater than 0")
        if self.torch_weights is not None and not self.torch_weights.exists():
            raise RequestError(f"--torch-weights {self.torch_weights} does not exist")

    @property
    def height_width(self) -> tuple[int, int]:
        height, _, width = self.size.partition("x")
        return int(height), int(width or height)

    @property
    def schedule(self) -> dict:
        return {
            "base_lr": self.base_lr,
            "warmup_steps": self.warmup_steps,
            "decay_steps": list(self.decay_steps),
            "steps": self.steps,
        }
