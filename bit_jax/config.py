"""The flags of a training run as frozen dataclasses, each default written once, and the presets of `train.py`.

Where a recipe field is None, BiT-HyperRule chooses its value from the dataset (see `hyperrule.py`). `--help` shows the
fields' docstrings with their line breaks, so each line of one is a whole sentence or clause.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bit_jax.model.architecture import Remat
from input_pipeline.errors import RequestError
from input_pipeline.flags import Place, UserPath, require_positive

AUTO = "auto"  # the mesh that is chosen by the devices' memory
EMBEDDED = "embedded"  # --model's name for the small model under bit_jax/assets/


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model to train."""

    model: str = EMBEDDED
    """Model to train: a published name (`python -m bit_jax.zoo list`), the path of weights, or `embedded`.
    Weights are an official .npz, or files of the original PyTorch code, of timm or of Hugging Face (docs/weights.md).
    hf:OWNER/NAME fetches a model of the Hugging Face Hub.
    With --init random also an architecture: R50x1, R152x4, R14x0.5."""
    init: Literal["checkpoint", "random"] = "checkpoint"
    """Initial parameters: the file's weights with a new head of zeros, or random ones in the same architecture."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision of matrix products and convolutions.
    Parameters, statistics, loss and updates are float32, or float64 with fp64."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The examples to train on and to evaluate on."""

    dataset: str = "digits"
    """Dataset: digits, synthetic, folder:PATH (PATH/SPLIT/CLASS/IMAGE), idx:DIRECTORY (MNIST's file format),
    or a tfds name prepared as array_record, such as imagenet2012 or cifar10:3.0.2.
    features:DIRECTORY trains the head alone on DIRECTORY/SPLIT.npz, which predict --features wrote of --model."""
    data_dir: UserPath | None = None
    """Directory with the prepared tfds datasets. None: tfds's default directory."""
    train_split: str = "train"
    """Split to train on, or a slice of one, such as train[:98%]."""
    eval_split: str = "test"
    """Split to evaluate on, or a slice of one, such as train[98%:]."""
    examples_per_class: int | None = None
    """Number of training examples of each class, chosen by the seed, for few-shot training. None: all examples."""
    resize: Literal["pillow", "tf"] = "pillow"
    """Resizing method: `pillow` is antialiased, as in BiT's PyTorch code;
    `tf` uses the four nearest pixels, as in BiT's TensorFlow code."""
    resize_to: int | None = None
    """Side in pixels of the square that training images are resized to before cropping.
    None: BiT-HyperRule chooses 160 if the median image has fewer than 96x96 pixels and 512 otherwise;
    where --crop is given, in the same proportion to it (5:4 or 16:15)."""
    crop: int | None = None
    """Side in pixels of the square that the model sees in training and evaluation.
    None: BiT-HyperRule chooses 128 if the median image has fewer than 96x96 pixels and 480 otherwise."""
    flip: tyro.conf.FlagConversionOff[bool] = True
    """Mirror half of the training images, chosen at random; turn it off where left and right differ in meaning."""
    global_batch: int = 512
    """Training examples per step, over all devices of all hosts."""
    batch_per_device: int | None = None
    """Training examples per step and device; it replaces --global-batch. None: --global-batch decides.
    A run that goes on with other devices keeps its global batch; each device takes more or fewer examples then,
    in parts of at most so many."""
    skip_damaged: bool = False
    """Use the next example in place of a training image that cannot be decoded, instead of ending the run."""
    input_threads: int | None = None
    """Threads that read, decode and resize images. None: one per core, or two where no image has to be decoded."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """SGD (v = momentum v + gradient, p -= lr v) with linear warm-up and a tenfold decay after each decay step."""

    base_lr: float = 0.003
    """Learning rate between warm-up and the first decay. BiT uses 0.003 for batches of 512."""
    momentum: float = 0.9
    """Momentum of SGD, at least 0 and below 1."""
    mixup: float | None = None
    """Alpha of mixup's Beta distribution; 0 turns mixup off.
    None: BiT-HyperRule chooses 0 for fewer than 20,000 training examples and 0.1 otherwise."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0 to --base-lr.
    None: BiT-HyperRule chooses them from the number of training examples and --steps."""
    decay_steps: tuple[int, ...] | None = None
    """Steps after each of which the learning rate is divided by 10.
    None: BiT-HyperRule chooses them from the number of training examples and --steps."""
    steps: int | None = None
    """Number of training steps.
    None: BiT-HyperRule chooses 500 below 20,000 training examples, 10,000 below 500,000, else 20,000."""


@dataclasses.dataclass(frozen=True)
class Additions:
    """Additions to BiT's recipe, which has none of them. docs/fine_tuning.md has the formulas, and what proves them.

    Raises:
        RequestError: a number is out of its range, or --train is no regular expression.
    """

    weight_decay: float = 0.0
    """Weight decay of the kernels of convolutions and head, not of biases and of GroupNorm's parameters; 0 is none.
    A weight-standardized kernel computes the same at any length, so that there it only changes the effective rate."""
    weight_decay_kind: Literal["coupled", "decoupled"] = "coupled"
    """coupled: it is added to the gradient before the momentum, as in torch.optim.SGD(weight_decay=).
    decoupled: p -= lr weight_decay p beside the momentum's step, as AdamW does (SGDW of arXiv:1711.05101)."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; a longer one is scaled to it, as by torch.nn.utils.clip_grad_norm_.
    The norm is over all devices, parts of a batch and trained parameters, before weight decay. None: no clipping."""
    label_smoothing: float = 0.0
    """Share of every target that is spread evenly over all classes, as in torch.nn.CrossEntropyLoss; 0 is none.
    Evaluation's loss is not smoothed."""
    schedule: Literal["staircase", "cosine"] = "staircase"
    """Learning rate after the warm-up: BiT's staircase of --decay-steps,
    or half a cosine from --base-lr to 0 at --steps, for which --decay-steps do not matter."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, such as 0.999, updated after every step.
    Evaluations and final.npz are then of the average; checkpoints hold both. None: no average."""
    crop_style: Literal["bit", "inception"] = "bit"
    """Training crop: bit resizes to --resize-to and crops a square of --crop pixels;
    inception resizes a random 8 to 100 % of the image's area, of a ratio of 3:4 to 4:3, to --crop pixels,
    as torchvision's RandomResizedCrop does."""
    train: str | None = None
    """Regular expression of the parameters to train, matched against whole parts of their official paths:
    head, or 'block4|head', or 'group_norm|head'. The new head must be among them: being zero, it lets no gradient pass.
    The others get no gradient, momentum or update. None: all of them train."""

    def __post_init__(self):
        if not 0 <= self.weight_decay < math.inf:
            raise RequestError(f"--weight-decay {self.weight_decay} must be a number from 0")
        if self.weight_decay_kind != "coupled" and not self.weight_decay:
            raise RequestError(
                f"--weight-decay-kind {self.weight_decay_kind} changes nothing without --weight-decay; add that, as in "
                "--weight-decay 1e-4"
            )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise RequestError(
                f"--clip-norm {self.clip_norm} must be a finite number above 0; leave it out to clip nothing"
            )
        if not 0 <= self.label_smoothing < 1:
            raise RequestError(f"--label-smoothing {self.label_smoothing} must be at least 0 and below 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise RequestError(f"--ema {self.ema} must be between 0 and 1, such as 0.999; leave it out for no average")
        try:
            re.compile(self.train or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise RequestError(f"--train {self.train!r} is no regular expression: {error}") from None

    def changed(self) -> dict[str, Any]:
        """Returns {field: value} of those that are not off."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


NO_ADDITIONS = Additions()


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """Devices, hosts and memory; none of these flags changes what is computed."""

    mesh: str = ""
    """Device mesh, such as data=2,fsdp=8. Batches are split over all devices;
    parameters, gradients and momentum are split over fsdp, for models that one device cannot hold.
    A run that goes on with other devices keeps fsdp, and data is chosen anew.
    auto: fsdp is the smallest with which a step fits into the devices' memory, which its compiled program says.
    Empty: the devices are data-parallel, and each holds all parameters."""
    remat: Remat = "none"
    """Activations that the backward pass recomputes to save memory:
    none; norm: those of GroupNorm and ReLU, which repeats no convolution; unit: those of whole residual units."""
    microbatches: int = 1
    """Parts of a step's batch that are computed one after the other to save memory.
    The gradient is that of the whole batch."""
    coordinator: str = ""
    """ADDRESS:PORT of host 0, for a run on several hosts, which all get the same command.
    Leave it out under SLURM (srun) and Open MPI (mpirun) and in Kubernetes indexed jobs."""
    hosts: int | None = None
    """Number of hosts in the run, with --coordinator. None: as many as the scheduler starts, or one."""
    host: int | None = None
    """Index of this host, starting at 0, with --coordinator. None: the scheduler's index."""
    start_timeout: int = 300
    """Seconds that the hosts wait for each other at the start."""
    host_timeout: int = 60
    """Seconds without a sign of life after which a host is taken for dead and the run ends."""
    doctor: tyro.conf.FlagCreatePairsOff[bool] = False
    """Do not train: compare versions, configuration, data and devices of all hosts,
    and measure the links between them."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Results, evaluations and checkpoints."""

    workdir: Place
    """Directory that receives config.json, metrics.jsonl, result.json, checkpoints/ and final.npz, or the URL of one in
    an object store, such as s3://BUCKET/RUN. A run that is already there is continued."""
    seed: int = 0
    """Seed of example order, augmentation, mixup, few-shot choice and random initialization."""
    eval_every: int | Literal["epoch"] | None = None
    """Steps between evaluations, or `epoch` for one after each epoch. Every run is also evaluated at its end.
    None: only at its end."""
    eval_at_start: tyro.conf.FlagConversionOff[bool] = False
    """Evaluate before the first step, too."""
    target_acc1: float | None = None
    """Top-1 accuracy, between 0 and 1, at which training stops once an evaluation reaches it. None: train all steps."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    watch_every: int | None = None
    """Steps between two measurements of gradient norm, update-to-weight ratio, largest activation and dead ReLUs,
    by a program of its own that takes about a step's time and changes nothing; docs/watching.md explains the numbers.
    Every 120 steps it costs about 1 % of the time.
    None: none are measured."""
    check_replicas: tyro.conf.FlagConversionOff[bool] = True
    """Compare the copies of parameters and momentum on all devices before each checkpoint, bit by bit.
    If a device's copy differs, the run ends, names the device, and saves nothing."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; a run that was killed loses at most these."""
    checkpoint_minutes: float | None = None
    """Minutes after a checkpoint after which another one is due, besides those of --checkpoint-every.
    None: only --checkpoint-every decides."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, at least 2: one is whole while another is written."""
    local_checkpoints: UserPath | None = None
    """Directory for frequent copies of the training state, which every host writes on its own disk or in its memory:
    /dev/shm/NAME, or a folder of a fast disk. A run that was killed continues from them. With --local-every."""
    local_every: int | None = None
    """Steps between two local copies; a run that was killed loses at most these, as long as the hosts have them."""
    profile: int = 0
    """Number of steps, after the first few, to trace into WORKDIR/profile, for TensorBoard and for a table by
    kind of work, which `python -m bit_jax.profile WORKDIR` shows again."""
    flagperf_compat: Annotated[
        tuple[Literal["accuracy", "schedule", "p_core"], ...], tyro.conf.arg(metavar="SWITCH...")
    ] = ()
    """FlagPerf's own definitions, for comparisons with figures that were taken by them; see docs/flagperf.md.
    accuracy: report the accuracy of the first device's share of the examples, too.
    schedule: begin the learning rate's schedule, warm-up included, anew with every epoch; this changes the training.
    p_core: report images/s over the time in which steps were handed to the devices, without waiting for them, too."""
    stall_timeout: float = 1800.0
    """Seconds without any progress after which the run ends with exit code 1, because it hangs; 0: it never does.
    A step, a batch of an evaluation and a part of a checkpoint are progress, on any host.
    Before the first step, where programs are compiled, it waits for at least an hour."""
    deterministic: tyro.conf.FlagCreatePairsOff[bool] = False
    """Make a repeated run on GPUs end with the same bytes, even if it was killed and continued.
    Steps may take longer. CPUs always do so."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All flags of a run.

    Raises:
        RequestError: a number is out of its range.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    scale: ScaleConfig = ScaleConfig()
    additions: Additions = NO_ADDITIONS

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
            "--watch-every": self.run.watch_every,
            "--checkpoint-every": self.run.checkpoint_every,
            "--checkpoint-minutes": self.run.checkpoint_minutes,
            "--local-every": self.run.local_every,
            "--microbatches": self.scale.microbatches,
            "--hosts": self.scale.hosts,
            "--start-timeout": self.scale.start_timeout,
            "--host-timeout": self.scale.host_timeout,
        }
        require_positive(positive)
        not_negative = {
            "--seed": self.run.seed,
            "--warmup-steps": self.optimizer.warmup_steps,
            "--profile": self.run.profile,
            "--stall-timeout": self.run.stall_timeout,
        }
        for flag, value in not_negative.items():
            if value is not None and value < 0:
                raise RequestError(f"{flag} {value} must not be negative")
        if self.run.keep_checkpoints < 2:
            raise RequestError(f"--keep-checkpoints {self.run.keep_checkpoints} must be at least 2")
        if self.run.local_every is not None and self.run.local_checkpoints is None:
            raise RequestError(
                f"--local-every {self.run.local_every} needs a directory for the copies; add --local-checkpoints DIR, "
                "such as /dev/shm/bit"
            )
        if self.run.local_checkpoints is not None and self.run.local_every is None:
            raise RequestError(
                f"--local-checkpoints {self.run.local_checkpoints} needs to know how often; add --local-every STEPS, "
                "such as 20"
            )
        if not 0 <= self.optimizer.momentum < 1:
            raise RequestError(f"--momentum {self.optimizer.momentum} must be at least 0 and below 1")
        if "schedule" in self.run.flagperf_compat and self.additions.schedule == "cosine":
            raise RequestError(
                "--flagperf-compat schedule restarts FlagPerf's staircase, and --schedule cosine is another schedule; "
                "leave out one of them"
            )
        if self.optimizer.mixup is not None and self.optimizer.mixup < 0:
            raise RequestError(f"--mixup {self.optimizer.mixup} must not be negative")


# A continued run may change these fields, and all of `scale`: they do not change the parameters that it ends with.
_FREE_TO_CHANGE = {
    "data.data_dir",
    "data.skip_damaged",  # a run that met no damaged image yet computed the same either way
    "data.input_threads",
    "run.workdir",
    "run.eval_every",
    "run.eval_at_start",
    "run.log_every",
    "run.watch_every",
    "run.check_replicas",
    "run.checkpoint_every",
    "run.checkpoint_minutes",
    "run.keep_checkpoints",
    "run.local_checkpoints",
    "run.local_every",
    "run.profile",
    "run.stall_timeout",
    "run.flagperf_compat",  # what `schedule` changes is compared with the recipe
}


# A host has these for itself; all others decide what it computes, or when it exchanges what with the other hosts.
_OF_A_HOST = {
    "data.data_dir",
    "data.input_threads",
    "run.workdir",
    "run.local_checkpoints",
    "scale.coordinator",
    "scale.hosts",
    "scale.host",
    "scale.start_timeout",
    "scale.host_timeout",
}


def identity(cfg: Config) -> dict[str, object]:
    """Returns {"section.field": value} for every field that decides what the run computes, as JSON types.

    Additions that are off are left out, so that a run from before there was one is continued.
    """
    kept = {key: value for key, value in _fields(cfg).items() if not key.startswith(("scale.", "additions."))}
    kept |= {f"additions.{name}": value for name, value in cfg.additions.changed().items()}
    return {key: _listed(value) for key, value in kept.items() if key not in _FREE_TO_CHANGE}


def of_all_hosts(cfg: Config) -> dict[str, object]:
    """Returns {flag: value} for every flag that has to be the same on all hosts of a run, as JSON types."""
    return {
        "--" + key.partition(".")[2].replace("_", "-"): _listed(value)
        for key, value in _fields(cfg).items()
        if key not in _OF_A_HOST
    }


def _fields(cfg: Config) -> dict[str, object]:
    """Returns {"section.field": value} of all fields."""
    return {
        f"{section.name}.{name}": value
        for section in dataclasses.fields(cfg)
        for name, value in dataclasses.asdict(getattr(cfg, section.name)).items()
    }


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


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
