"""BiTs of timm and Hugging Face, for `python -m parity --torch-model examples.peers:timm_bit`; docs/parity_peers.md.

A factory is given the path of an official `.npz` and returns the model with the weights in it.
"""

import numpy as np
import torch
from torch import nn

from bit_jax.formats.names import PEERS

HEAD_BIAS = "resnet/head/conv2d/bias"


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
    names = {name: PEERS["huggingface"].official(name) for name in model.state_dict()}
    state = {name: PEERS["huggingface"].array(key, arrays[key]) for name, key in names.items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model
