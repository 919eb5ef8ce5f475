"""Every default, once: what a run is told, as frozen dataclasses, and the presets that `train.py` offers.

A field that is None is decided by BiT-HyperRule from the dataset (see `hyperrule.py`).
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from bit_jax.model.resnetv2 import Remat
from input_pipeline.errors import RequestError
from input_pipeline.flags import UserPath

EMBEDDED = "embedded"  # --model's name for the small model under bit_jax/assets/


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: str = EMBEDDED
    """A published name (`python -m bit_jax.zoo list`), the path of an .npz, or `embedded`. With `--init random`
    also an architecture: R50x1, R152x4, R14x0.5."""
    init: Literal["checkpoint", "random"] = "checkpoint"
    """Start from the file's weights with a new head of zeros, or from scratch in the same architecture."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """Of the products; parameters, statistics, loss and updates are float32 or wider in all of them."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What it is trained on."""

    dataset: str = "digits"
    """digits, folder:PATH (PATH/SPLIT/CLASS/IMAGE), idx:DIRECTORY (MNIST's file format), synthetic, or a tfds name
    prepared as array_record, such as imagenet2012 or cifar10:3.0.2."""
    data_dir: UserPath | None = None
    """Where tfds keeps its datasets."""
    train_split: str = "train"
    """A split, or a slice of one, such as train[:98%]."""
    eval_split: str = "test"
    examples_per_class: int | None = None
    """Few-shot: train on this many examples of each class, chosen by the seed."""
    resize: Literal["pillow", "tf"] = "pillow"
    """How: pillow, antialiased, as BiT's PyTorch code, or tf, from the four nearest pixels, as its TensorFlow code."""
    resize_to: int | None = None
    """Training images are resized to this square before cropping. None: BiT-HyperRule."""
    crop: int | None = None
    """Side of the square the model sees, in training and evaluation. None: BiT-HyperRule."""
    flip: tyro.conf.FlagConversionOff[bool] = True
    """Mirror half of the training images."""
    global_batch: int = 512
    """Training examples a step, over all devices of all hosts."""
    batch_per_device: int | None = None
    """Sets the global batch as this many a device; wins over --global-batch."""
    skip_damaged: bool = False
    """Show the next example in place of a training image that cannot be decoded, instead of ending the run."""
    input_threads: int | None = None
    """That read, decode and resize. None: one a core, and two where nothing has to be decoded."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """SGD, v = momentum v + gradient, p -= lr v; linear warm-up, then a tenth once each decay step is passed."""

    base_lr: float = 0.003
    momentum: float = 0.9
    mixup: float | None = None
    """Alpha of the Beta distribution; 0 turns mixup off. None: BiT-HyperRule."""
    warmup_steps: int | None = None
    """None: BiT-HyperRule, as with the two below."""
    decay_steps: tuple[int, ...] | None = None
    steps: int | None = None
    """Train for this many steps."""


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """How the work is spread and what is kept in memory; none of it changes what is computed."""

    mesh: str = ""
    """data=2,fsdp=8: batches are split over all devices, parameters, gradients and momentum over fsdp. Empty: all
    devices data-parallel, each with all parameters."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it: nothing; norm, GroupNorm and ReLU, which repeats no
    convolution; unit, whole residual units."""
    microbatches: int = 1
    """Passes that a step's batch is taken in, one after the other; the gradient is that of the whole batch."""
    coordinator: str = ""
    """Several hosts, all started with the same command: host 0's ADDRESS:PORT. Not needed under SLURM (srun), Open MPI
    (mpirun) and in a Kubernetes indexed job."""
    hosts: int | None = None
    host: int | None = None
    """This one's number, from 0."""
    start_timeout: int = 300
    """Seconds that hosts wait for each other at the start."""
    host_timeout: int = 60
    """Seconds without a sign of life after which a host is taken for dead."""
    doctor: tyro.conf.FlagCreatePairsOff[bool] = False
    """Instead of training, compare versions, configuration, data and devices of all hosts, and measure the links
    between them."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where the results go, and when to look at them."""

    workdir: UserPath
    """Receives config.json, metrics.jsonl, result.json, checkpoints/ and final.npz. A run found here is continued."""
    seed: int = 0
    """Of example order, augmentation, mixup, few-shot choice and random initialization."""
    eval_every: int | Literal["epoch"] | None = None
    """Evaluate every so many steps, or after each epoch; always at the end."""
    eval_at_start: tyro.conf.FlagConversionOff[bool] = False
    target_acc1: float | None = None
    """Stop once an evaluation reaches this top-1 accuracy."""
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    """At least 2: one is whole while another is written."""
    profile: int = 0
    """Trace so many steps, after the first few, into WORKDIR/profile: for TensorBoard, and as a table by kind of work,
    which `python -m bit_jax.profile WORKDIR` shows again."""
    deterministic: tyro.conf.FlagCreatePairsOff[bool] = False
    """On GPUs, end with the same bytes each time the same run is made, also where it was killed and continued. Steps
    may take longer. CPUs do so without this flag, which changes nothing there."""


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    scale: ScaleConfig = ScaleConfig()

    def __post_init__(self):
        positive = {
            "--global-batch": self.data.global_batch,
            "--batch-per-device": self.data.batch_per_device,
            "--examples-per-class": self.data.examples_per_class,
            "--resize-to": self.data.resize_to,
            "--crop": self.data.crop,
            "--input-threads": self.data.input_threads,
            "--steps": self.optimizer.steps,
            "--base-lr": self.optimizer.base_lr,
            "--eval-every": None if self.run.eval_every == "epoch" else self.run.eval_every,
            "--log-every": self.run.log_every,
            "--checkpoint-every": self.run.checkpoint_every,
            "--microbatches": self.scale.microbatches,
            "--hosts": self.scale.hosts,
            "--start-timeout": self.scale.start_timeout,
            "--host-timeout": self.scale.host_timeout,
        }
        for flag, value in positive.items():
            if value is not None and value <= 0:
                raise RequestError(f"{flag} {value} must be greater than 0")
        not_negative = {
            "--seed": self.run.seed,
            "--warmup-steps": self.optimizer.warmup_steps,
            "--profile": self.run.profile,
        }
        for flag, value in not_negative.items():
            if value is not None and value < 0:
                raise RequestError(f"{flag} {value} must not be negative")
        if self.run.keep_checkpoints < 2:
            raise RequestError(f"--keep-checkpoints {self.run.keep_checkpoints} must be at least 2")
        if not 0 <= self.optimizer.momentum < 1:
            raise RequestError(f"--momentum {self.optimizer.momentum} must be at least 0 and below 1")
        if self.optimizer.mixup is not None and self.optimizer.mixup < 0:
            raise RequestError(f"--mixup {self.optimizer.mixup} must not be negative")


# what changes nothing about the parameters a run ends with may differ when it is continued; all of `scale` too
_FREE_TO_CHANGE = {
    "data.data_dir",
    "data.skip_damaged",  # a run that met no damaged image yet computed the same either way
    "data.input_threads",
    "run.workdir",
    "run.eval_every",
    "run.eval_at_start",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.profile",
}


def identity(cfg: Config) -> dict[str, object]:
    """{"section.field": value} of everything that decides what the run computes, as JSON types."""
    flat = {
        f"{section.name}.{name}": value
        for section in dataclasses.fields(cfg)
        for name, value in dataclasses.asdict(getattr(cfg, section.name)).items()
        if section.name != "scale"
    }
    kept = {key: value for key, value in flat.items() if key not in _FREE_TO_CHANGE}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


_UNSET: Path = tyro.MISSING  # the command line requires a workdir

DIGITS = Config(
    ModelConfig(model=EMBEDDED),
    DataConfig(dataset="digits", resize_to=54, crop=48, flip=False, global_batch=64),
    OptimizerConfig(base_lr=0.01, mixup=0.0, warmup_steps=20, decay_steps=(120, 160), steps=200),
    RunConfig(workdir=_UNSET, eval_every=100, log_every=20, checkpoint_every=100),
)
HYPERRULE = Config(
    ModelConfig(model="BiT-M-R50x1"),
    DataConfig(dataset="cifar10"),
    OptimizerConfig(),
    RunConfig(workdir=_UNSET),
)
FLAGPERF = Config(
    ModelConfig(model="BiT-M-R152x2"),
    DataConfig(dataset="imagenet2012", eval_split="validation", resize_to=512, crop=480, batch_per_device=16),
    OptimizerConfig(mixup=0.1, warmup_steps=500, decay_steps=(3000, 6000, 9000, 10000), steps=40000),
    RunConfig(workdir=_UNSET, eval_every="epoch", eval_at_start=True, target_acc1=0.83),
)
PRESETS = {
    "digits": ("Fine-tune the embedded model on scikit-learn's scanned digits: a minute on two cores.", DIGITS),
    "hyperrule": ("BiT-HyperRule: schedule, resolution and mixup follow from the dataset. Batch 512.", HYPERRULE),
    "flagperf": ("FlagPerf's bigtransfer case: BiT-M-R152x2 on ImageNet-1k, 16 a device, until acc1 0.83.", FLAGPERF),
}
