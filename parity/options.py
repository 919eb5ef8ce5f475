"""The flags of a comparison, each default written once.

`--help` shows the fields' docstrings with their line breaks, so each line of one is a whole sentence or clause.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal

import tyro

from bit_jax.config import NO_ADDITIONS, Additions
from input_pipeline.errors import RequestError
from input_pipeline.flags import UserPath, require_positive, typed
from parity.sides.side import ACCEPTABLE


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags that all rungs share."""

    weights: str = "embedded"
    """Weights to compare with: a published name, the path of an .npz, `embedded`,
    or random:R50x1 for random weights in that architecture."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision to judge against float64, once both sides agree in float64; fp64 compares in float64 alone.
    With fp16, gradients are those of the scaled loss, as in training."""
    reference: str = "torch"
    """Reference side: torch[:devices=N,compile,channels_last,deterministic,device64,hugepages]
    or jax[:devices=N,fsdp=N,microbatches=N,remat=norm|unit,tuned,probe,deterministic,device64,hugepages,
    flags=X=Y+...], where probe trains a head, with --train head, on features that were computed before,
    and flags are XLA's; or an exported model, onnx:FILE or stablehlo:FILE, which takes forward, loss and accuracy."""
    candidate: str = "jax"
    """Candidate side, written like --reference. On a CPU, JAX's devices are virtual."""
    torch_model: str | None = None
    """PyTorch model to compare in place of this project's, as package.module:factory.
    The factory is called with the .npz path and returns an nn.Module that maps NCHW images to logits."""
    torch_weights: UserPath | None = None
    """File with a state dict to load into the PyTorch model. None: the model keeps the parameters that it has."""
    accept: tuple[str, ...] = ()
    """Differences of the attestation to accept: 'standardization eps', 'group norm eps', or both.
    This project's own side then computes with the other side's value, and every page says so."""

    size: str = "64"
    """Side in pixels of the square images that the model is given, or 97x131 for height x width."""
    rows: int = 8
    """Images per batch; the number must be even."""
    batches: int = 3
    """Batches on which gradients are compared; against float64, each array's best batch counts."""
    disturbances: int = 3
    """Float64 runs with disturbances as large as rounding errors, which show what error to expect.
    More of them judge arrays of few values more fairly."""
    seed: int = 0
    """Seed of pictures, batches and disturbances."""
    images: tuple[UserPath, ...] = ()
    """Image files for the pixels rung. Without any, the rung draws a few, one of each kind."""

    dataset: str = "digits"
    """Dataset for the curve and accuracy rungs, as for train.py: digits, folder:PATH, idx:DIRECTORY, or a tfds name."""
    data_dir: UserPath | None = None
    """Directory with the prepared tfds datasets. None: tfds's default directory."""
    train_split: str = "train"
    """Split, or slice of one such as train[:98%], that the curve rung trains on."""
    eval_split: str = "test"
    """Split, or slice of one such as test[:10%], that the accuracy rung evaluates."""
    limit: int | None = None
    """Number of examples to evaluate, from the start of the split. None: all of them."""
    eval_size: int | None = None
    """Side in pixels of the square images in evaluation.
    None: the size that the weights were trained at, where their config.json says so, else --size."""
    margin: float = 0.1
    """Percentage points within which two accuracies count as the same."""

    steps: int = 10
    """Number of training steps in the curve rung."""
    base_lr: float = 0.003
    """Learning rate after warm-up, in the optimizer and curve rungs."""
    momentum: float = 0.9
    """Momentum of SGD in the optimizer and curve rungs."""
    warmup_steps: int = 4
    """Steps over which the learning rate rises linearly from 0 to --base-lr."""
    decay_steps: tuple[int, ...] = (7,)
    """Steps after each of which the learning rate is divided by 10."""

    run: UserPath | None = None
    """Folder that keeps the report and the logits. None: a folder below runs/parity/, named by the time."""
    json: UserPath | None = None
    """File to write the report to as JSON, too. None: only the run's folder has it."""
    html: UserPath | None = None
    """File to write the report to as a web page, too. None: only the run's folder has it."""
    junit: UserPath | None = None
    """File to write JUnit XML to, with one test case per array. None: no JUnit XML is written."""
    baseline: UserPath | None = None
    """File that keeps what runs used of their limits, and their times; it is made if there is none.
    The report then says of each rung whether it became better, worse or stayed the same.
    The exit code does not depend on it."""
    reproducer: UserPath | None = None
    """Folder to leave a reproducer of the first operation at fault in: scripts, inputs and programs,
    which need nothing of this project. It must not exist, or be empty. None: none is left."""
    fail_fast: bool = False
    """End a rung at the first array that differs."""

    additions: Additions = NO_ADDITIONS
    """Additions to BiT's recipe, as train.py takes them; both sides then compute with them."""

    # name of a fault that the self-test injects into one side, see `faults.py`
    fault: Annotated[str | None, tyro.conf.Suppress] = None

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
        if unknown := [entry for entry in self.accept if entry not in ACCEPTABLE]:
            known = " and ".join(repr(entry) for entry in ACCEPTABLE)
            raise RequestError(f"--accept {unknown[0]!r} cannot be put into this project's side; {known} can")
        require_positive(typed(self, "margin", "base_lr"))
        if self.torch_weights is not None and not self.torch_weights.exists():
            raise RequestError(f"--torch-weights {self.torch_weights} does not exist")

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, _, width = self.size.partition("x")
        return int(height), int(width or height)

    @property
    def schedule(self) -> dict[str, Any]:
        """Fields of a `Schedule`, as JSON's types."""
        cosine = self.additions.schedule == "cosine"
        fields = {
            "base_lr": self.base_lr,
            "warmup_steps": self.warmup_steps,
            "decay_steps": [] if cosine else list(self.decay_steps),
            "steps": self.steps,
        }
        return fields | ({"kind": "cosine"} if cosine else {})

    @property
    def added(self) -> dict[str, Any]:
        """The argument `additions` of the tasks that train; nothing if all of them are off."""
        return {"additions": changed} if (changed := self.additions.changed()) else {}
