"""BiT's ResNetV2 in plain PyTorch, loading the official `.npz`: the reference that the JAX side is held against.

Written from the paper (arXiv:1912.11370) and the file layout alone; nothing here is shared with `bit_jax`. The module
tree is the checkpoint: a parameter's name, with "/" for ".", is its key in the file without the leading `resnet/`.
"""

import re

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from torch import Tensor, nn

GROUPS = 32
NORM_EPS = 1e-5
STANDARDIZE_EPS = 1e-10


class StdConv(nn.Module):
    """Convolution without bias; the kernel, OIHW, is standardized over its inputs on every use."""

    def __init__(self, cin: int, cout: int, size: int, stride: int = 1):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(cout, cin, size, size))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.kernel, dim=(1, 2, 3), keepdim=True, correction=0)
        standardized = (self.kernel - mean) / torch.sqrt(variance + STANDARDIZE_EPS)
        return F.conv2d(x, standardized, stride=self.stride, padding=self.kernel.shape[-1] // 2)


class GroupNorm(nn.Module):
    """Statistics and result in the parameters' dtype, whatever the input's."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.to(self.gamma.dtype), GROUPS, self.gamma, self.beta, NORM_EPS)


class Projection(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.standardized_conv2d = StdConv(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.standardized_conv2d(x)


class PreActivation(nn.Module):
    """GroupNorm, ReLU, convolution; apart, because the unit's projection, kept here as in the file, starts between."""

    def __init__(self, cin: int, cout: int, size: int, stride: int = 1, proj: nn.Module | None = None):
        super().__init__()
        self.group_norm = GroupNorm(cin)
        self.standardized_conv2d = StdConv(cin, cout, size, stride)
        self.proj = proj

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(self.group_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.standardized_conv2d(self.activate(x))


class Unit(nn.Module):
    """Pre-activation bottleneck: 1x1, 3x3 with the stride, 1x1; the shortcut of a stage's first unit is projected."""

    def __init__(self, cin: int, mid: int, stride: int, project: bool):
        super().__init__()
        self.a = PreActivation(cin, mid, 1, proj=Projection(cin, 4 * mid, stride) if project else None)
        self.b = PreActivation(mid, mid, 3, stride)
        self.c = PreActivation(mid, 4 * mid, 1)

    def forward(self, x: Tensor) -> Tensor:
        active = self.a.activate(x)
        shortcut = x if self.a.proj is None else self.a.proj(active)
        return shortcut + self.c(self.b(self.a.standardized_conv2d(active)))


class RootBlock(nn.Module):
    def __init__(self, cout: int):
        super().__init__()
        self.standardized_conv2d = StdConv(3, cout, 7, 2)

    def forward(self, x: Tensor) -> Tensor:
        # padded with zeros by hand: the pool's own padding is -inf, which the checkpoints were not trained with
        return F.max_pool2d(F.pad(self.standardized_conv2d(x), (1, 1, 1, 1)), 3, 2)


class HeadConv(nn.Module):
    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(num_classes, channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.bias)


class ResNetV2(nn.Module):
    """Images [batch, 3, height, width] in [-1, 1], of any size -> logits [batch, num_classes]."""

    def __init__(self, units: tuple[int, ...], root_channels: int, num_classes: int):
        super().__init__()
        self.root_block = RootBlock(root_channels)
        cin = root_channels
        for stage, count in enumerate(units):
            mid = root_channels * 2**stage
            block = nn.Sequential()
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                block.add_module(f"unit{index + 1:02d}", Unit(cin, mid, stride, project=index == 0))
                cin = 4 * mid
            self.add_module(f"block{stage + 1}", block)
        self.blocks = [f"block{stage + 1}" for stage in range(len(units))]
        self.group_norm = GroupNorm(cin)
        self.head = nn.ModuleDict({"conv2d": HeadConv(cin, num_classes)})

    def forward(self, images: Tensor) -> Tensor:
        x = self.root_block(images)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        features = F.relu(self.group_norm(x)).mean(dim=(2, 3), keepdim=True)
        return self.head["conv2d"](features).flatten(1)


def load(path: str) -> ResNetV2:
    """The model of an official `.npz`, head included, in the file's own dtype.

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
    model = ResNetV2(units, root.shape[-1], head.shape[-1])
    model.load_state_dict({name: torch.from_numpy(to_torch(array)) for name, array in arrays.items()}, assign=True)
    return model


def official(key: str) -> str:
    """Key in the file -> parameter name here. Some published files number their convolutions."""
    return re.sub(r"standardized_conv2d_\d+(?=/)", "standardized_conv2d", key.removeprefix("resnet/")).replace("/", ".")


def to_torch(array: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW; vectors as they are."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array
