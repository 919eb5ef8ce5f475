"""Exports a model to a file of the format that the file's name asks for, and checks it before it gets that name."""

import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from bit_jax.export import onnx_graph, saved_model, stablehlo
from bit_jax.export.check import Check, Format, check
from bit_jax.export.source import Source
from input_pipeline.errors import RequestError

FORMATS: dict[str, Format] = {".stablehlo": stablehlo, ".onnx": onnx_graph, ".savedmodel": saved_model}


class NotTheModel(Exception):
    """An exported file computes something else than the model."""


def export(source: Source, target: Path, *, beside: bool = False, checked: bool = True) -> Check | None:
    """Writes the model in float32, as `target`'s suffix says, and returns how far it is from float64.

    Args:
        source: the model.
        target: a .stablehlo or .onnx file, which is replaced, or a .savedmodel directory, which must not exist.
        beside: whether the weights go into a file beside: `target` with ".npz" or ".data".
        checked: whether the file is run before it gets its name; None is returned where it is not.

    Raises:
        RequestError: a package is missing, or the target cannot be written.
        NotTheModel: the file is wrong; nothing of it remains.
    """
    made = FORMATS[target.suffix]
    if target.is_dir():
        raise RequestError(f"{target} exists and is a directory; move it away, or name another target")
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
            raise NotTheModel(f"{target} is not written, as it is not the model: {result}")
        for path in sorted((folder / "out").iterdir(), reverse=True):  # the weights beside first, then what needs them
            os.replace(path, target.parent / path.name)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)
