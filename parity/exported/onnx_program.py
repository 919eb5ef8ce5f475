"""An ONNX file in onnxruntime. The package onnx reads who exported it, and where its weights lie."""

import platform
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.errors import RequestError
from parity.exported.program import Images, sentence, sha256, the_logits

try:
    import onnx
    import onnxruntime
except ImportError as error:
    raise RequestError(
        f"a side onnx:FILE needs onnx and onnxruntime, and {error.name} is not installed; "
        "pip install 'bit-jax[onnx]', or: pip install onnx onnxruntime"
    ) from None

DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


class OnnxProgram:
    """A `Program` of an ONNX file.

    Args:
        path: the file.
        precision: precision that is asked for; tf32 allows it on NVIDIA's GPUs, and fp64 runs on the CPU.

    Raises:
        RequestError: the file is no ONNX model that onnxruntime can run, or it takes no images.
    """

    def __init__(self, path: Path, precision: str):
        self.path, self.name = path, f"onnx:{path}"
        onnxruntime.set_default_logger_severity(3)  # errors
        try:
            self._model = onnx.load(path, load_external_data=False)
            self._session = onnxruntime.InferenceSession(path, providers=_providers(precision))
        except Exception as error:  # either raises exceptions of its own making
            raise RequestError(f"{self.name} is no ONNX model that onnxruntime can run ({sentence(error)})") from None
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1:
            names = ", ".join(each.name for each in inputs[:4])
            raise RequestError(f"{self.name} has {len(inputs)} inputs ({names}); export a function of the images alone")
        kind = str(inputs[0].type)
        self.images = Images.of(_sizes(inputs[0].shape), DTYPES.get(kind, kind), self.name)
        self._input, self._output = inputs[0].name, outputs[the_logits([each.name for each in outputs], self.name)]
        self.classes = (_sizes(self._output.shape) or [None])[-1]

    def described(self) -> dict[str, Any]:
        model = self._model
        files = [self.path, *self._weight_files()]
        return {
            "framework": "onnxruntime",
            "versions": {
                "python": platform.python_version(),
                "onnxruntime": onnxruntime.__version__,
                "onnx": onnx.__version__,
                "numpy": np.__version__,
            },
            "device": ", ".join(self._session.get_providers()),
            "exported by": f"{model.producer_name} {model.producer_version}".strip() or "unknown",
            "format": {
                "ONNX IR": model.ir_version,
                "opset": ", ".join(f"{each.domain or 'ai.onnx'} {each.version}" for each in model.opset_import),
            },
            "file": ", ".join(path.name for path in files),
            "file sha256": sha256(files),
        }

    def logits(self, images: np.ndarray) -> np.ndarray:
        batches = self.images.batches(images, self.images.dtype)
        try:
            answers = [self._session.run([self._output.name], {self._input: batch})[0] for batch in batches]
        except Exception as error:  # onnxruntime raises exceptions of its own making
            raise RequestError(f"{self.name} fails on images {batches[0].shape}: {sentence(error)}") from None
        return np.concatenate([np.asarray(answer) for answer in answers])

    def _weight_files(self) -> list[Path]:
        """Returns the files beside this one that hold its weights, as those of large models do."""
        places = {
            entry.value
            for tensor in self._model.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        }
        return [self.path.parent / place for place in sorted(places)]


def _sizes(shape: list[Any]) -> list[int | None]:
    """Returns the sizes of a shape; those with a name, or with none, are open."""
    return [size if isinstance(size, int) else None for size in shape]


def _providers(precision: str) -> list[Any]:
    """Returns the execution providers to use. On NVIDIA's GPUs float32 products would be TF32 by default."""
    providers: list[Any] = ["CPUExecutionProvider"]
    if precision != "fp64" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "1" if precision == "tf32" else "0"}))
    return providers
