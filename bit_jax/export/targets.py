"""Exports a model to a file of the format that the file's name asks for, and checks it before it gets that name."""

from pathlib import Path

import numpy as np

from bit_jax.export import onnx_graph, saved_model, stablehlo
from bit_jax.export.check import Check, Format, check
from bit_jax.export.source import Source
from input_pipeline.errors import RunFailed
from input_pipeline.files import replacing_path

FORMATS: dict[str, Format] = {".stablehlo": stablehlo, ".onnx": onnx_graph, ".savedmodel": saved_model}
PROGRAMS = {".stablehlo": "StableHLO", ".onnx": "ONNX", ".savedmodel": "a TensorFlow SavedModel"}
# whose weights may lie in a file beside, and what that adds to the program's name
BESIDE = {".stablehlo": stablehlo.BESIDE, ".onnx": onnx_graph.BESIDE}
CONTENTS = {".savedmodel": saved_model.CONTENTS}  # names in a program that is a directory


def export(source: Source, target: Path, *, beside: bool = False, checked: bool = True) -> Check | None:
    """Writes the model in float32, as `target`'s suffix says, and returns how far it is from float64.

    Args:
        source: the model.
        target: a .stablehlo or .onnx file or a .savedmodel directory; what has that name is replaced, and so is what
            has the name of the file beside.
        beside: whether the weights go into a file beside: `target` with ".npz" or ".data".
        checked: whether the file is run before it gets its name; None is returned where it is not.

    Raises:
        RequestError: a package is missing, or the target cannot be written.
        RunFailed: the file is not the model; nothing of it remains.
    """
    made = FORMATS[target.suffix]
    made.require(checked=checked)
    with replacing_path(target) as written:
        made.write(source, written, np.dtype(np.float32), beside=beside)
        result = check(source, written, made, beside=beside) if checked else None
        if result is not None and not result.holds:
            raise RunFailed(f"{target} is not written, as it is not the model: {result}")
    return result
