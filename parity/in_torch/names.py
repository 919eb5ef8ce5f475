"""Matching a PyTorch BiT's parameters with the checkpoint's arrays, and its modules with BiT's units.

Parameters are told by their names where they are spelled as here, in the original code or in timm, and by their
contents otherwise. Units need no names: a unit is the outermost module that holds its parameters and no others.
"""

import re
from collections import defaultdict

import numpy as np
import torch
from torch import nn

from input_pipeline.errors import RequestError

HEAD_KERNEL = "resnet/head/conv2d/kernel"
LISTED = 6


def official_keys(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """{parameter name: key in the file}, one to one.

    Args:
        model: a BiT with the file's weights; its attribute `official_keys`, if it has one, is believed.
        arrays: the file's, under plain official keys.

    Raises:
        RequestError: parameters and keys do not pair up.
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
    """The official key of a parameter named as in the reference, the original code or timm; None for another name."""
    if re.match(r"(root_block|block\d|group_norm|head\.conv2d)\.", name):
        return f"resnet/{name.replace('.', '/')}"
    fixed = {
        r"(root|stem)\.conv\.weight": "root_block/standardized_conv2d/kernel",
        r"(head\.gn|norm)\.weight": "group_norm/gamma",
        r"(head\.gn|norm)\.bias": "group_norm/beta",
        r"head\.(conv|fc)\.weight": "head/conv2d/kernel",
        r"head\.(conv|fc)\.bias": "head/conv2d/bias",
    }
    for pattern, key in fixed.items():
        if re.fullmatch(pattern, name):
            return f"resnet/{key}"
    original = re.fullmatch(r"body\.block(\d)\.unit(\d+)\.(\w+)\.(?:conv\.)?(weight|bias)", name)
    timm = re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(\w+)\.(?:conv\.)?(weight|bias)", name)
    match = original or timm
    if match is None:
        return None
    first = 0 if original else 1  # timm counts from 0
    unit = f"resnet/block{int(match[1]) + first}/unit{int(match[2]) + first:02d}"
    if match[3] == "downsample":
        return f"{unit}/a/proj/standardized_conv2d/kernel"
    layer = re.fullmatch(r"(conv|gn|norm)([123])", match[3])
    if layer is None:
        return None
    part = f"{unit}/{' abc'[int(layer[2])]}"
    if layer[1] == "conv":
        return f"{part}/standardized_conv2d/kernel"
    return f"{part}/group_norm/{'gamma' if match[4] == 'weight' else 'beta'}"


def units(model: nn.Module, keys: dict[str, str]) -> dict[str, nn.Module]:
    """{site: module} for root_block, block1/unit01 and so on, as far as the model has a module for them."""
    wanted = defaultdict(set)
    for name, key in keys.items():
        if site := site_of(key):
            wanted[site].add(name)
    held = {
        prefix: {name for name in keys if name.startswith(f"{prefix}.")}
        for prefix, _ in model.named_modules()
        if prefix
    }
    found = {}
    for site in sites(keys):
        prefix = next((prefix for prefix, names in held.items() if names == wanted[site]), None)
        if prefix is not None:
            found[site] = model.get_submodule(prefix)
    return found


def sites(keys: dict[str, str]) -> list[str]:
    """Names of all units, from the root on."""
    return sorted({site for key in keys.values() if (site := site_of(key))}, key=_depth)


def site_of(key: str) -> str | None:
    """The unit that an array belongs to; None for the last norm and the head."""
    match = re.match(r"resnet/(root_block|block\d/unit\d+)/", key)
    return match[1] if match else None


def to_official(array: np.ndarray, key: str) -> np.ndarray:
    """OIHW -> HWIO; a dense head -> the 1x1 convolution that the file keeps."""
    if key == HEAD_KERNEL and array.ndim == 2:
        array = array[:, :, None, None]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def to_torch(array: np.ndarray) -> np.ndarray:
    """The other way, but for a dense head's shape."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def _by_content(parameters: dict[str, nn.Parameter], arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Pairs what has the same values; values that several share pair up in order."""
    places: dict[bytes, list[str]] = defaultdict(list)
    for key in sorted(arrays, key=lambda key: (_depth(site_of(key) or "~"), key)):
        places[_fingerprint(arrays[key])].append(key)
    pairs = {}
    for name, parameter in parameters.items():
        array = parameter.detach().to(torch.float32).numpy(force=True)
        kind = HEAD_KERNEL if array.ndim == 2 else ""
        same = places.get(_fingerprint(to_official(array, kind)), [])
        if same:
            pairs[name] = same.pop(0)
    return pairs


def _fingerprint(array: np.ndarray) -> bytes:
    return repr(array.shape).encode() + np.ascontiguousarray(array, np.float32).tobytes()


def _depth(site: str) -> tuple[bool, str]:
    return (site != "root_block", site)
