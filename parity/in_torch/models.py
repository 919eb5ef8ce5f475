"""Loads other people's PyTorch models, `--torch-model` and `--torch-weights`, and checks that they return logits."""

import importlib
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bit_jax.formats.states import WRAPPERS, named_state_dicts, unwrapped
from input_pipeline.errors import RequestError
from input_pipeline.terminal import printable
from parity.in_torch import resnetv2
from parity.sides.side import Side
from parity.sides.tasks import UNKNOWN

LISTED = 4  # names that a message spells out


def build(side: Side, weight_file: str) -> nn.Module:
    """Builds the side's model, the reference unless the side names a factory, and loads the side's state dict if it has
    one.

    Raises:
        RequestError: there is no such factory, it fails, or the state dict is not the model's.
    """
    if side.model is None:
        model: nn.Module = resnetv2.load(weight_file, norm_eps=side.norm_eps, standardize_eps=side.standardize_eps)
    else:
        model = _made(side.model, weight_file)
        model.register_forward_hook(lambda module, args, output: logits_of(output))
    if side.state_dict is not None:
        fill(model, Path(side.state_dict))
    return model.eval()


def logits_of(output: Any) -> Tensor:
    """Returns the logits in a model's output: a tensor, an object or dict with `logits`, or a tuple that begins with
    them.

    Raises:
        RequestError: the output is something else.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if isinstance(logits, Tensor):
        return logits
    kind = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        kind += f" with {', '.join(printable(key) for key in list(output)[:LISTED]) or 'nothing'}"
    raise RequestError(
        f"--torch-model's module returns {kind}, in which there are no logits; return a tensor [batch, classes], "
        "something with `logits`, or a tuple that begins with them"
    )


def check(model: nn.Module, name: str, images: Tensor, classes: int) -> None:
    """Calls a model once, so that a model that does not work is refused before anything is compared.

    Raises:
        RequestError: the model fails, or its logits are not [batch, classes].
    """
    try:
        with torch.no_grad():
            logits = model(images)
    except RequestError:
        raise
    except Exception as error:  # somebody else's code may raise anything
        raise RequestError(f"--torch-model {name} fails on images {_shape(images)}: {_sentence(error)}") from None
    if tuple(logits.shape) != (len(images), classes):
        raise RequestError(
            f"--torch-model {name} returns logits of shape {_shape(logits)} for images {_shape(images)}; "
            f"[{len(images)}, {classes}] is wanted: a row an image, a column a class of the weights' head"
        )


def fill(model: nn.Module, path: Path) -> None:
    """Loads a file's state dict into the model. It may lie in nested dicts, and be one of a model that was wrapped.

    Raises:
        RequestError: the file cannot be read, holds no state dict of this model, or holds several that differ.
    """
    expected = model.state_dict()
    content = _loaded(path)
    names = {WRAPPERS.sub("", name): name for name in expected}
    candidates = [unwrapped(state, names) for _, state in named_state_dicts(content)]
    best = max(candidates, key=lambda state: len(names.keys() & state.keys()), default={})
    if not names.keys() & best.keys():
        raise RequestError(f"--torch-weights {path} holds no state dict of this model: it is {_described(content)}")
    whole = [state for state in candidates if names.keys() <= state.keys()]
    if any(not _same(state, whole[0], names) for state in whole[1:]):
        raise RequestError(
            f"--torch-weights {path} holds {len(whole)} state dicts of this model that differ, as of an average beside "
            f"the weights ({_described(content)}); save the one that is meant alone"
        )
    missing, unexpected = (sorted(a.keys() - b.keys()) for a, b in ((names, best), (best, names)))
    misshapen = [
        f"{name} {_shape(best[name])} for {_shape(expected[names[name]])}"
        for name in names.keys() & best.keys()
        if best[name].shape != expected[names[name]].shape
    ]
    if missing or unexpected or misshapen:
        raise RequestError(
            f"--torch-weights {path} is not this model's state dict: missing {_listed(missing)}; unexpected "
            f"{_listed(unexpected)}" + (f"; of another shape {_listed(sorted(misshapen))}" if misshapen else "")
        )
    model.load_state_dict({names[name]: tensor for name, tensor in best.items()}, strict=True)


def checkpoint(path: str) -> dict[str, np.ndarray]:
    """Reads {key: array} of a weight file; its convolutions lose the numbers in their keys."""
    with np.load(path) as file:
        return {f"resnet/{resnetv2.official(key).replace('.', '/')}": file[key] for key in file.files}


def constants(model: nn.Module) -> tuple[Any, Any, Any]:
    """Returns eps of GroupNorm, eps of weight standardization and the number of groups, as the model's modules have
    them."""
    if isinstance(model, resnetv2.ResNetV2):
        return model.constants.norm_eps, model.constants.standardize_eps, resnetv2.GROUPS
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d) and hasattr(module, "eps")]
    return _attribute(norms, "eps"), _attribute(convolutions, "eps"), _attribute(norms, "num_groups")


def _attribute(modules: list, name: str) -> Any:
    """Returns the value that all modules have, a list of all values if they differ, or `UNKNOWN` without modules."""
    values = sorted({getattr(module, name) for module in modules})
    return values[0] if len(values) == 1 else values or UNKNOWN


def _made(name: str, weight_file: str) -> nn.Module:
    factory = _factory(name)
    try:
        model = factory(weight_file)
    except Exception as error:  # somebody else's code may raise anything
        raise RequestError(f"--torch-model {name} fails when it is given {weight_file}: {_sentence(error)}") from None
    if not isinstance(model, nn.Module):
        raise RequestError(f"--torch-model {name} returned a {type(model).__name__}, not an nn.Module")
    return model


def _factory(name: str) -> Callable[[str], Any]:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"--torch-model {name} is not to be had as package.module:factory ({error})") from None


def _loaded(path: Path) -> Any:
    """Returns the content of a checkpoint; no code in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its unpickler and zip reader raise
        raise RequestError(f"--torch-weights {path} {_unreadable(path, error)}") from None


def _unreadable(path: Path, error: Exception) -> str:
    """Returns a clause that says why a file is no checkpoint."""
    wanted = "give a file that torch.save(model.state_dict(), path) wrote"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror}); {wanted}"
    if blocked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"holds the Python object {blocked[1]}, which is not loaded for safety; {wanted}"
    with open(path, "rb") as file:
        head = file.read(9)
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    kinds = {
        "is empty": not head,
        "is a safetensors file": head[8:] == b"{",
        "is an .npz file, as --weights takes": any(name.endswith(".npy") for name in names),
        "is a TorchScript archive": any("/code/" in name for name in names),
    }
    reason = next((kind for kind, applies in kinds.items() if applies), None)
    return f"{reason or f'is no PyTorch checkpoint ({_sentence(error)})'}; {wanted}"


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], names: Mapping[str, str]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in names)


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict with {_listed([str(key) for key in content])}"
    return f"a {type(content).__name__}"


def _listed(names: list[str]) -> str:
    """Returns the number of names and the first `LISTED` of them."""
    if not names:
        return "0"
    more = ", ..." if len(names) > LISTED else ""
    return f"{len(names):,} ({', '.join(printable(name) for name in names[:LISTED])}{more})"


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"
