"""BiT's ResNetV2 in plain PyTorch, which loads the official `.npz`: the reference that the JAX side is compared with.

It is written from the paper (arXiv:1912.11370) and the file layout alone and shares nothing with `bit_jax`. The module
tree is the checkpoint: a parameter's name, with "/" for ".", is its key in the file without the leading `resnet/`.
"""

import json
import re
import zipfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from torch import Tensor, nn

GROUPS = 32
NORM_EPS = 1e-5
STANDARDIZE_EPS = 1e-10


class Constants(NamedTuple):
    """What is added to the variances of GroupNorm and of kernels."""

    norm_eps: float
    standardize_eps: float


class StdConv(nn.Module):
    """Convolution without bias, whose kernel, OIHW, is standardized for each output channel on every use."""

    def __init__(self, cin: int, cout: int, size: int, eps: float, stride: int = 1):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(cout, cin, size, size))
        self.eps, self.stride = eps, stride

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.kernel, dim=(1, 2, 3), keepdim=True, correction=0)
        standardized = (self.kernel - mean) / torch.sqrt(variance + self.eps)
        return F.conv2d(x, standardized, stride=self.stride, padding=self.kernel.shape[-1] // 2)


class GroupNorm(nn.Module):
    """GroupNorm that casts its input to the dtype of its parameters, for its statistics and its result."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.to(self.gamma.dtype), GROUPS, self.gamma, self.beta, self.eps)


class Projection(nn.Module):
    """The 1x1 convolution of a projected shortcut."""

    def __init__(self, cin: int, cout: int, stride: int, constants: Constants):
        super().__init__()
        self.standardized_conv2d = StdConv(cin, cout, 1, constants.standardize_eps, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.standardized_conv2d(x)


class PreActivation(nn.Module):
    """GroupNorm, ReLU and convolution. As in the checkpoint it also holds the unit's projection, which `Unit` applies
    to what `activate` returns."""

    def __init__(
        self, cin: int, cout: int, size: int, constants: Constants, stride: int = 1, proj: nn.Module | None = None
    ):
        super().__init__()
        self.group_norm = GroupNorm(cin, constants.norm_eps)
        self.standardized_conv2d = StdConv(cin, cout, size, constants.standardize_eps, stride)
        self.proj = proj

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(self.group_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.standardized_conv2d(self.activate(x))


class Unit(nn.Module):
    """Pre-activation bottleneck of three convolutions: 1x1, 3x3 with the stride, 1x1. A stage's first unit projects its
    shortcut."""

    def __init__(self, cin: int, mid: int, stride: int, constants: Constants, *, project: bool):
        super().__init__()
        proj = Projection(cin, 4 * mid, stride, constants) if project else None
        self.a = PreActivation(cin, mid, 1, constants, proj=proj)
        self.b = PreActivation(mid, mid, 3, constants, stride)
        self.c = PreActivation(mid, 4 * mid, 1, constants)

    def forward(self, x: Tensor) -> Tensor:
        active = self.a.activate(x)
        shortcut = x if self.a.proj is None else self.a.proj(active)
        return shortcut + self.c(self.b(self.a.standardized_conv2d(active)))


class RootBlock(nn.Module):
    """The 7x7 convolution of stride 2 and the max-pool before the first unit."""

    def __init__(self, cout: int, constants: Constants):
        super().__init__()
        self.standardized_conv2d = StdConv(3, cout, 7, constants.standardize_eps, 2)

    def forward(self, x: Tensor) -> Tensor:
        # pad with zeros: max_pool2d itself would pad with -inf, which the checkpoints were not trained with
        return F.max_pool2d(F.pad(self.standardized_conv2d(x), (1, 1, 1, 1)), 3, 2)


class HeadConv(nn.Module):
    """The classifier, a 1x1 convolution with bias."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(num_classes, channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.bias)


class ResNetV2(nn.Module):
    """BiT, which maps images [batch, 3, height, width] in [-1, 1], of any size, to logits [batch, num_classes]."""

    def __init__(self, units: tuple[int, ...], root_channels: int, num_classes: int, constants: Constants):
        super().__init__()
        self.constants = constants
        self.root_block = RootBlock(root_channels, constants)
        cin = root_channels
        for stage, count in enumerate(units):
            mid = root_channels * 2**stage
            block = nn.Sequential()
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                block.add_module(f"unit{index + 1:02d}", Unit(cin, mid, stride, constants, project=index == 0))
                cin = 4 * mid
            self.add_module(f"block{stage + 1}", block)
        self.blocks = [f"block{stage + 1}" for stage in range(len(units))]
        self.group_norm = GroupNorm(cin, constants.norm_eps)
        self.head = nn.ModuleDict({"conv2d": HeadConv(cin, num_classes)})

    def forward(self, images: Tensor) -> Tensor:
        x = self.root_block(images)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        features = F.relu(self.group_norm(x)).mean(dim=(2, 3), keepdim=True)
        return self.head["conv2d"](features).flatten(1)


def load(path: str, *, norm_eps: float | None = None, standardize_eps: float | None = None) -> ResNetV2:
    """Loads the model of an official `.npz`, head included, in the file's dtype.

    Args:
        path: the file.
        norm_eps: see `Constants`; None: BiT's.
        standardize_eps: see `Constants`; None: the file's, which has it in its zip comment where it is not BiT's.

    Raises:
        RuntimeError: the file's names or shapes are not a BiT's; PyTorch's message lists them.
    """
    with np.load(path) as file:
        arrays = {official(key): file[key] for key in file.files}
    units = tuple(
        len({match[0] for key in arrays if (match := re.match(rf"block{stage}\.unit\d+", key))})
        for stage in range(1, 5)
    )
    root, head = arrays["root_block.standardized_conv2d.kernel"], arrays["head.conv2d.kernel"]
    constants = Constants(
        NORM_EPS if norm_eps is None else norm_eps,
        _standardize_eps(path) if standardize_eps is None else standardize_eps,
    )
    model = ResNetV2(units, root.shape[-1], head.shape[-1], constants)
    model.load_state_dict({name: torch.from_numpy(to_torch(array)) for name, array in arrays.items()}, assign=True)
    return model


def _standardize_eps(path: str) -> float:
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    return float(json.loads(comment)["standardize_eps"]) if b'"standardize_eps"' in comment else STANDARDIZE_EPS


def official(key: str) -> str:
    """Returns the name of the parameter with that key in the file. Some published files number their convolutions."""
    return re.sub(r"standardized_conv2d_\d+(?=/)", "standardized_conv2d", key.removeprefix("resnet/")).replace("/", ".")


def to_torch(array: np.ndarray) -> np.ndarray:
    """Turns HWIO into OIHW and leaves vectors as they are."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array
