"""Reads state dicts that `torch.save` wrote, and writes them: the one module of this package that imports PyTorch.

It does so when such a file is read or written, and not before. No code in a file is executed (`weights_only=True`).
"""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bit_jax.formats.names import ROOTS
from bit_jax.formats.official import AGAIN, SPELLED, WeightsError, cannot_read, check_sizes, listed
from bit_jax.formats.states import named_state_dicts, unwrapped
from input_pipeline.errors import RequestError

INSTALL = "`pip install torch` (or bit-jax[parity]); safetensors files do without it"


def read(path: Path) -> dict[str, Any]:
    """Returns {name: tensor} of the one BiT in a file. Names lose what DataParallel, torch.compile or an enclosing
    module put before them; an optimizer's state and whatever else lies beside it is left alone.

    Raises:
        WeightsError: the file is damaged, holds Python objects other than tensors in containers, no state dict of a
            BiT, or several that differ, such as an average beside the weights.
        RequestError: PyTorch is not installed, or the file cannot be read.
    """
    content = _content(path)
    found = {}
    for name, state in named_state_dicts(content):
        plain = unwrapped(state, ROOTS)
        if ROOTS & plain.keys():
            found[name] = plain
    if not found:
        raise WeightsError(
            f"{path} holds no state dict of a BiT in the names of the original code, timm or Hugging Face: it is "
            f"{_described(content)}"
        )
    for state in found.values():
        _check_tensors(path, state)
    names = list(found)
    places = listed([name or "the outermost dict" for name in names])
    for name in names[1:]:
        if not _same(found[names[0]], found[name]):
            raise WeightsError(
                f"{path} holds {len(found)} state dicts of a BiT, and they differ ({places}), "
                "as of an average beside the weights; save the one that is meant alone"
            )
    return found[names[0]]


def arrays(tensors: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array); bfloat16 comes as float32, which holds all its values."""
    torch = _torch("reading")
    for name, tensor in tensors.items():
        yield name, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().contiguous().numpy()


def write(file: BinaryIO, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as `torch.save(model.state_dict(), file)` does.

    Raises:
        RequestError: PyTorch is not installed.
        OSError: the file cannot be written.
    """
    torch = require()
    try:
        torch.save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}, file)
    except RuntimeError as error:  # of PyTorch's zip writer, which does not say why
        raise OSError(f"PyTorch's writer failed ({_sentence(error)})") from None


def require() -> Any:
    """Raises RequestError where PyTorch, which writing needs, is not installed."""
    return _torch("writing a PyTorch file")


def _torch(task: str) -> Any:
    try:
        import torch
    except ImportError:
        raise RequestError(f"{task} needs PyTorch, which is not installed: {INSTALL}") from None
    return torch


def _content(path: Path) -> Any:
    torch = _torch(f"reading {path}, a PyTorch file,")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                check_sizes(archive.infolist(), path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except WeightsError:
        raise
    except OSError as error:
        if error.strerror:
            raise cannot_read(path, error) from None
        raise WeightsError(f"{path} is damaged ({_sentence(error)}); {AGAIN}") from None
    except MemoryError as error:
        raise cannot_read(path, error) from None
    except Exception as error:  # torch.load raises what its unpickler and zip reader raise
        if blocked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise WeightsError(
                f"{path} holds the Python object {blocked[1]}, which is not loaded for safety; save "
                "model.state_dict() alone"
            ) from None
        raise WeightsError(f"{path} is a damaged PyTorch file ({_sentence(error)}); {AGAIN}") from None


def _check_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Raises WeightsError where a tensor is not one of floats, or says to be larger than the file."""
    torch, problems, size = _torch("reading"), [], path.stat().st_size
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            problems.append(f"{name} (a tensor without plain memory)")
        elif tensor.dtype not in floats:
            problems.append(f"{name} ({tensor.dtype})")
        elif tensor.numel() * tensor.element_size() > size:
            problems.append(f"{name} ({tensor.numel():,} numbers in a file of {size:,} bytes)")
    if problems:
        raise WeightsError(f"{path} holds what is no tensor of floats: {listed(problems)}", extra=problems)


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    torch = _torch("reading")
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict with {listed([str(key) for key in content])}"
    return f"a {type(content).__name__}"


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:SPELLED]
