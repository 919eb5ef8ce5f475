"""BiTs by other hands, for `--torch-model`: other names, another order, other faults."""

import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bit_jax.conversion.libraries import with_torchvision


class Conv(nn.Conv2d):
    """Standardized by batch_norm's statistics, as timm does."""

    eps = 1e-10

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        kernel = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)
        return F.conv2d(x, kernel, None, self.stride, self.padding)


class Block(nn.Module):
    def __init__(self, cin, mid, stride, project):
        super().__init__()
        # the projection first: nothing may depend on the order of modules
        if project:
            self.shortcut = Conv(cin, 4 * mid, 1, stride, bias=False)
        self.third = Conv(mid, 4 * mid, 1, bias=False)
        self.second = Conv(mid, mid, 3, stride, 1, bias=False)
        self.first = Conv(cin, mid, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels) for channels in (cin, mid, mid))

    def forward(self, x):
        active = self.norms[0](x).relu()
        skip = self.shortcut(active) if hasattr(self, "shortcut") else x
        y = self.second(self.norms[1](self.first(active)).relu())
        return self.third(self.norms[2](y).relu()) + skip


class Stem(nn.Sequential):
    def __init__(self, cout):
        super().__init__(Conv(3, cout, 7, 2, 3, bias=False), nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2))


class Bit(nn.Module):
    def __init__(self, units, root, classes):
        super().__init__()
        self.begin = Stem(root)
        blocks, cin = [], root
        for stage, count in enumerate(units):
            for index in range(count):
                blocks.append(Block(cin, root * 2**stage, 2 if stage and not index else 1, index == 0))
                cin = 4 * root * 2**stage
        self.middle = nn.Sequential(*blocks)
        self.end = nn.GroupNorm(32, cin)
        self.classifier = nn.Linear(cin, classes)

    def forward(self, x):
        return self.classifier(self.end(self.middle(self.begin(x))).relu().mean((2, 3)))


def load(path):
    """Fills the model by hand; the ladder has to find out what is where."""
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    names = sorted({"/".join(key.split("/")[1:3]) for key in arrays if "/unit" in key})
    units = [sum(name.startswith(f"block{stage}/") for name in names) for stage in range(1, 5)]
    root, head = arrays["resnet/root_block/standardized_conv2d/kernel"], arrays["resnet/head/conv2d/kernel"]
    model = Bit(units, root.shape[-1], head.shape[-1])

    def kernel(module, key):
        module.weight = nn.Parameter(arrays[f"{key}/standardized_conv2d/kernel"].permute(3, 2, 0, 1).contiguous())

    def norm(module, key):
        module.weight = nn.Parameter(arrays[f"{key}/gamma"])
        module.bias = nn.Parameter(arrays[f"{key}/beta"])

    kernel(model.begin[0], "resnet/root_block")
    for block, name in zip(model.middle, names, strict=True):
        for part, module, normalization in zip(
            "abc", (block.first, block.second, block.third), block.norms, strict=True
        ):
            kernel(module, f"resnet/{name}/{part}")
            norm(normalization, f"resnet/{name}/{part}/group_norm")
        if hasattr(block, "shortcut"):
            kernel(block.shortcut, f"resnet/{name}/a/proj")
    norm(model.end, "resnet/group_norm")
    model.classifier.weight = nn.Parameter(head[0, 0].T.contiguous())
    model.classifier.bias = nn.Parameter(arrays["resnet/head/conv2d/bias"])
    return model


def load_with_timms_eps(path):
    model = load(path)
    for module in model.modules():
        if isinstance(module, Conv):
            module.eps = 1e-8
    return model


def load_with_timms_eps_and_a_pool_of_its_own(path):
    """Besides the epsilon, the pool is padded with -inf, as PyTorch pads by itself."""
    model = load_with_timms_eps(path)
    model.begin[1], model.begin[2] = nn.Identity(), nn.MaxPool2d(3, 2, padding=1)
    return model


def load_with_several_eps(path):
    model = load(path)
    model.begin[0].eps = 1e-8
    return model


def load_something_else(path):
    return nn.Linear(3, 3)


class Answering(Bit):
    """What it returns is what another BiT's logits become by `answer`."""

    answer = staticmethod(lambda logits: logits)

    def forward(self, x):
        return self.answer(super().forward(x))


def _answering(path, answer):
    model = load(path)
    model.__class__ = Answering
    model.answer = answer
    return model


def _output(logits):
    return SimpleNamespace(logits=logits)


def load_with_an_output_object(path):
    return _answering(path, _output)


def load_without_logits(path):
    return _answering(path, lambda logits: {"features": logits})


def load_with_probabilities_first(path):
    return _answering(path, lambda logits: logits[:, :3])


def load_that_never_repeats(path):
    """The third block's output is disturbed in its last bits, in another way each time."""
    model = load(path)

    def disturb(module, inputs, output):
        seed = int.from_bytes(os.urandom(7))
        noise = torch.rand(output.shape, generator=torch.Generator().manual_seed(seed))
        return output * (1 + 1e-7 * noise.to(output))

    model.middle[2].register_forward_hook(disturb)
    return model


def timm_bit(path):
    """timm's own, also where the installed torchvision was built for another PyTorch."""
    from examples import peers

    with_torchvision(torch)
    return peers.timm_bit(path)


def hugging_face_bit(path):
    """Hugging Face's own, likewise."""
    from examples import peers

    with_torchvision(torch)
    return peers.hugging_face_bit(path)
