"""Turns PyTorch's tensors into arrays as the checkpoint has them: images NHWC, kernels HWIO."""

import numpy as np
import torch
from torch import Tensor

HEAD_KERNEL = "resnet/head/conv2d/kernel"


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Returns the tensor's values; bfloat16, which NumPy does not have, becomes float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)


def to_nhwc(tensor: Tensor) -> np.ndarray:
    """Turns NCHW into NHWC and CHW into HWC; tensors with other numbers of axes stay as they are."""
    array = to_numpy(tensor)
    if array.ndim == 3:
        return np.ascontiguousarray(array.transpose(1, 2, 0))
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array


def to_official(array: np.ndarray, key: str) -> np.ndarray:
    """Turns a parameter from OIHW into HWIO, and a dense head into the 1x1 convolution that the checkpoint has.

    Args:
        array: the parameter in PyTorch's layout.
        key: key of the parameter in the checkpoint.
    """
    if key == HEAD_KERNEL and array.ndim == 2:
        array = array[:, :, None, None]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
