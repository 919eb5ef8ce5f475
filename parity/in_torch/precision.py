"""The precisions fp32, tf32, bf16, fp16 and fp64 in PyTorch; the counterpart of `bit_jax/model/precision.py`."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from bit_jax.model import probe
from parity.in_torch.arrays import to_numpy

FIRST_SCALE = 2.0**16  # loss scale of the first step; the default of PyTorch's GradScaler


@dataclasses.dataclass(frozen=True)
class Precision:
    """A precision.

    Attributes:
        name: name of the precision.
        dtype: dtype of products, and of activations between layers.
        param_dtype: dtype of parameters, images and the loss.
    """

    name: str
    dtype: torch.dtype
    param_dtype: torch.dtype = torch.float32

    @property
    def autocasts(self) -> bool:
        """Whether torch.autocast has to narrow the operands of products."""
        return self.dtype != self.param_dtype

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled; without that, float16 would lose small gradients."""
        return self.dtype == torch.float16

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns a context in which models multiply in `dtype`."""
        return torch.autocast(device.type, self.dtype if self.autocasts else None, enabled=self.autocasts)


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32),
    "tf32": Precision("tf32", torch.float32),
    "bf16": Precision("bf16", torch.bfloat16),
    "fp16": Precision("fp16", torch.float16),
    "fp64": Precision("fp64", torch.float64, torch.float64),
}


def choose(name: str) -> Precision:
    """Returns the named precision, after it has set for the process whether float32 products are IEEE or TF32.

    Each backend is set by itself: in PyTorch 2.11 cuDNN's convolutions stay in TF32, their default, when
    `torch.backends.fp32_precision` alone is set. The older setting is set alike, because PyTorch exports no model in a
    process where the two differ.
    """
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    for backend in _float32_backends().values():
        backend.fp32_precision = "tf32" if name == "tf32" else "ieee"
    return PRECISIONS[name]


def float32_settings() -> dict[str, str]:
    """Returns {setting: `ieee` or `tf32`} of PyTorch's settings for float32 products."""
    return {f"{name}.fp32_precision": backend.fp32_precision for name, backend in _float32_backends().items()}


def products(precision: Precision, device: torch.device) -> tuple[str, str]:
    """Returns the precisions in which the device really computes a matrix product and a convolution."""
    left, right = (torch.from_numpy(operand).to(device, precision.param_dtype) for operand in probe.operands())
    with precision.autocast(device):
        matrix = left @ right
        convolved = F.conv2d(left.T[None, :, :, None], right.T[:, :, None, None])[0, :, :, 0].T
    return probe.multiplied_in(to_numpy(matrix)), probe.multiplied_in(to_numpy(convolved))


def _float32_backends() -> dict[str, Any]:
    """Returns {name: backend} of PyTorch's backends with a setting `fp32_precision`."""
    backends: Any = torch.backends
    return {
        "torch.backends": backends,
        "torch.backends.cuda.matmul": backends.cuda.matmul,
        "torch.backends.cudnn": backends.cudnn,
        "torch.backends.cudnn.conv": backends.cudnn.conv,
    }
