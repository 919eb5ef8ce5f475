"""Exports a model to a file of the format that the file's name asks for, and checks it before it gets that name."""

import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from bit_jax.export import onnx_graph, saved_model, stablehlo
from bit_jax.export.check import Check, Format, check
from bit_jax.export.source import Source
from input_pipeline.errors import RequestError, RunFailed

FORMATS: dict[str, Format] = {".stablehlo": stablehlo, ".onnx": onnx_graph, ".savedmodel": saved_model}
PROGRAMS = {".stablehlo": "StableHLO", ".onnx": "ONNX", ".savedmodel": "a TensorFlow SavedModel"}
BESIDE = (".stablehlo", ".onnx")  # whose weights may lie in a file beside


def export(source: Source, target: Path, *, beside: bool = False, checked: bool = True) -> Check | None:
    """Writes the model in float32, as `target`'s suffix says, and returns how far it is from float64.

    Args:
        source: the model.
        target: a .stablehlo or .onnx file or a .savedmodel directory; what has that name is replaced.
        beside: whether the weights go into a file beside: `target` with ".npz" or ".data".
        checked: whether the file is run before it gets its name; None is returned where it is not.

    Raises:
        RequestError: a package is missing, or the target cannot be written.
        RunFailed: the file is not the model; nothing of it remains.
    """
    made = FORMATS[target.suffix]
    # in a directory beside the target, so that what is complete needs only to be renamed
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir()
    except OSError as error:
        raise RequestError(f"cannot write {target}: {error.strerror}; name another target") from None
    try:
        (folder / "out").mkdir()
        written = folder / "out" / target.name
        made.write(source, written, np.dtype(np.float32), beside=beside)
        result = check(source, written, made, folder) if checked else None
        if result is not None and not result.holds:
            raise RunFailed(f"{target} is not written, as it is not the model: {result}")
        if target.is_dir():  # a directory with something in it cannot be replaced in one step
            os.rename(target, folder / "old")
        for path in sorted((folder / "out").iterdir(), reverse=True):  # the weights beside first, then what needs them
            _sync(path)
            os.replace(path, target.parent / path.name)
        return result
    except OSError as error:
        raise RequestError(f"cannot write {target}: {error.strerror}; mend that and start again") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Brings a file, or the files of a directory, to disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
