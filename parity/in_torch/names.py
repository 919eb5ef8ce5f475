"""Pairs a PyTorch BiT's parameters with the checkpoint's arrays.

A parameter is recognized by its name, if that is the name in the reference, in the original code, in timm or in
Hugging Face, and otherwise by its values.
"""

import re
from collections import defaultdict

import numpy as np
import torch
from torch import nn

from bit_jax.formats.names import PEERS
from input_pipeline.errors import RequestError
from parity.in_torch import units
from parity.in_torch.arrays import HEAD_KERNEL, to_official

LISTED = 6  # names that a message spells out


def official_keys(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Returns {parameter name: key in the checkpoint}; every parameter and every key occurs once.

    Args:
        model: a BiT with the checkpoint's weights. If it has an attribute `official_keys`, its pairs are taken.
        arrays: the checkpoint's {key: array}; its convolutions have no numbers in their keys.

    Raises:
        RequestError: parameters and keys do not pair up, or a pair differs in shape.
    """
    parameters = dict(model.named_parameters())
    declared = getattr(model, "official_keys", None)
    keys = dict(declared) if declared else {name: key for name in parameters if (key := by_name(name)) in arrays}
    if set(keys.values()) != set(arrays):
        keys |= _by_content(
            {name: parameter for name, parameter in parameters.items() if name not in keys},
            {key: array for key, array in arrays.items() if key not in set(keys.values())},
        )
    unknown = sorted(set(parameters) - set(keys))
    unfilled = sorted(set(arrays) - set(keys.values()))
    if unknown or unfilled or len(set(keys.values())) != len(keys):
        raise RequestError(
            f"the torch model's parameters do not pair up with the checkpoint's arrays: {len(unknown)} unknown "
            f"({', '.join(unknown[:LISTED]) or 'none'}), {len(unfilled)} arrays without one "
            f"({', '.join(unfilled[:LISTED]) or 'none'}); give the model an attribute `official_keys`, "
            "{parameter name: key in the file}"
        )
    for name, key in keys.items():
        shape = to_official(parameters[name].detach().numpy(force=True), key).shape
        if shape != arrays[key].shape:
            raise RequestError(f"the torch model's {name} is {shape}, the checkpoint's {key} {arrays[key].shape}")
    return keys


def by_name(name: str) -> str | None:
    """Returns the key of a parameter named as in the reference, the original code, timm or Hugging Face; None for
    another name."""
    if re.match(r"(root_block|block\d|group_norm|head\.conv2d)\.", name):
        return f"resnet/{name.replace('.', '/')}"
    # a port may keep a convolution within a module of its own, or a projection without one
    spellings = (name, name.replace(".conv.", "."), name.replace(".downsample.weight", ".downsample.conv.weight"))
    found = (peer.official(spelling) for spelling in spellings for peer in PEERS.values())
    return next((key for key in found if key), None)


def _by_content(parameters: dict[str, nn.Parameter], arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Pairs parameters with arrays of the same values. If several have the same values, they pair up in the order of
    computation."""
    keys_of: dict[bytes, list[str]] = defaultdict(list)
    # "~" sorts the last norm and the head behind every unit
    for key in sorted(arrays, key=lambda key: (units.order(units.site_of(key) or "~"), key)):
        keys_of[_fingerprint(arrays[key])].append(key)
    pairs = {}
    for name, parameter in parameters.items():
        array = parameter.detach().to(torch.float32).numpy(force=True)
        key = HEAD_KERNEL if array.ndim == 2 else ""  # only a dense head has two axes
        if same := keys_of.get(_fingerprint(to_official(array, key))):
            pairs[name] = same.pop(0)
    return pairs


def _fingerprint(array: np.ndarray) -> bytes:
    return repr(array.shape).encode() + np.ascontiguousarray(array, np.float32).tobytes()
