"""This is the case to plan for: a model, its recipe, and the GPUs that it would train on."""

import dataclasses

from bit_jax.compiled.gpus import Accelerator, accelerator
from bit_jax.config import FLAGPERF, Config, ScaleConfig
from bit_jax.model.architecture import Architecture, Remat
from bit_jax.published import catalogue
from bit_jax.training import hyperrule
from input_pipeline.errors import RequestError
from input_pipeline.flags import require_positive, typed

IMAGENET_EXAMPLES, IMAGENET_AREA = 1_281_167, 400 * 350


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile. Defaults are FlagPerf's case on one device."""

    model: str = "BiT-M-R152x2"
    """A published name, or an architecture such as R50x1, R152x4 or R14x0.5; no file is read."""
    device: str = "a100-40g"
    """The GPU: a100-40g, a100-80g or h100-80g."""
    hosts: int = 1
    """Number of hosts."""
    devices: int = 1
    """Number of GPUs on each host."""
    mesh: str = ""
    """The split of the work over the GPUs, as train.py takes it: data=2,fsdp=8. Empty: every GPU has all parameters."""
    precision: str = "fp32"
    """Precision of the products: fp32, tf32, bf16 or fp16."""
    batch_per_device: int = 16
    """Number of images on each GPU in a step; an even number."""
    remat: Remat = "none"
    """Recomputation in the backward pass, as train.py takes it: norm takes less memory, unit least of all."""
    microbatches: int = 1
    """Number of passes that a step takes its batch in, one after the other; more take less memory."""
    crop: int = 480
    """Side of the images, in pixels."""
    classes: int = 1000
    """Number of classes of the head."""
    network_gbps: float = 200.0
    """Bandwidth of each host's link to the others, in Gbit/s."""

    def check(self) -> None:
        """Raises RequestError for a number or name that cannot be."""
        counts = ("hosts", "devices", "batch_per_device", "microbatches", "crop", "classes", "network_gbps")
        require_positive(typed(self, *counts))
        if self.batch_per_device % 2:
            raise RequestError(f"--batch-per-device {self.batch_per_device} must be even: mixup pairs neighbours")
        precisions = self.gpu.flops
        if self.precision not in precisions:
            raise RequestError(f"--precision {self.precision} is not planned for; there are {', '.join(precisions)}")

    @property
    def gpu(self) -> Accelerator:
        """Raises RequestError for an unknown `device`."""
        return accelerator(self.device)

    def architecture(self) -> Architecture:
        """Raises RequestError where `model` is neither a published name nor an architecture."""
        name = published.architecture if (published := catalogue.lookup(self.model)) else self.model
        if not Architecture.is_name(name):
            raise RequestError(f"unknown --model {self.model!r}; write a published name or R<depth>x<width>")
        return Architecture.parse(name, self.classes)

    def config(self) -> Config:
        """Returns FlagPerf's configuration, changed to what is asked for."""
        return dataclasses.replace(
            FLAGPERF,
            model=dataclasses.replace(FLAGPERF.model, model=self.model, precision=self.precision),
            data=dataclasses.replace(FLAGPERF.data, crop=self.crop, batch_per_device=self.batch_per_device),
            scale=ScaleConfig(self.mesh, self.remat, self.microbatches),
        )

    def recipe(self) -> hyperrule.Recipe:
        """Returns the recipe that `train.py` would follow on ImageNet-1k."""
        return hyperrule.recipe(self.config(), train_examples=IMAGENET_EXAMPLES, native_area=IMAGENET_AREA)
