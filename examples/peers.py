"""BiTs of timm and Hugging Face, for `python -m parity --torch-model examples.peers:timm_bit`; docs/parity_peers.md.

A factory is given the path of an official `.npz` and returns the model with the weights in it.
"""

import re

import numpy as np
import torch
from torch import nn

HEAD_BIAS = "resnet/head/conv2d/bias"
# parts of Hugging Face's names -> parts of the file's keys
TO_OFFICIAL = {
    r"^bit\.embedder\.convolution\.weight": "resnet/root_block/standardized_conv2d/kernel",
    r"^bit\.norm\.weight": "resnet/group_norm/gamma",
    r"^bit\.norm\.bias": "resnet/group_norm/beta",
    r"^classifier\.1\.weight": "resnet/head/conv2d/kernel",
    r"^classifier\.1\.bias": HEAD_BIAS,
    r"\.downsample\.conv\.weight": "/a/proj/standardized_conv2d/kernel",
    r"\.conv(\d)\.weight": lambda match: f"/{' abc'[int(match[1])]}/standardized_conv2d/kernel",
    r"\.norm(\d)\.weight": lambda match: f"/{' abc'[int(match[1])]}/group_norm/gamma",
    r"\.norm(\d)\.bias": lambda match: f"/{' abc'[int(match[1])]}/group_norm/beta",
    r"^bit\.encoder\.stages\.(\d)\.layers\.(\d+)": (
        lambda match: f"resnet/block{int(match[1]) + 1}/unit{int(match[2]) + 1:02d}"
    ),
}


def timm_bit(path: str) -> nn.Module:
    """timm's `resnetv2_50x1_bit`."""
    import timm

    # timm leaves the head out, without a word, where num_classes is not the file's
    classes = np.load(path)[HEAD_BIAS].shape[0]
    return timm.create_model("resnetv2_50x1_bit", num_classes=classes, checkpoint_path=path)


def hugging_face_bit(path: str) -> nn.Module:
    """Hugging Face's `BitForImageClassification`, of the depth and width that the file has."""
    from transformers import BitConfig, BitForImageClassification

    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    units = [len({key.split("/")[2] for key in arrays if f"/block{stage}/" in key}) for stage in range(1, 5)]
    root = arrays["resnet/root_block/standardized_conv2d/kernel"].shape[-1]
    widths = [4 * root * 2**stage for stage in range(4)]
    classes = len(arrays[HEAD_BIAS])
    config = BitConfig(depths=units, embedding_size=root, hidden_sizes=widths, num_labels=classes)
    model = BitForImageClassification(config)
    state = {name: arrays[official_key(name)] for name in model.state_dict()}
    model.load_state_dict({name: torch.from_numpy(to_torch(name, array)) for name, array in state.items()})
    return model


def official_key(name: str) -> str:
    """Returns the file's key of a parameter with Hugging Face's name."""
    for pattern, part in TO_OFFICIAL.items():
        name = re.sub(pattern, part, name)
    return name


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Turns kernels from HWIO into OIHW, and the head's into a dense layer's [classes, channels]."""
    if array.ndim == 4:
        array = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    return array[:, :, 0, 0] if name.startswith("classifier") and array.ndim == 4 else array
