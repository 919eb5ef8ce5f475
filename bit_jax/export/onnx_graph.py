"""Writes the model as an ONNX graph, node by node, with the package `onnx` and without any framework.

docs/notebook.md compares it with what PyTorch's exporter and jax2onnx make of the model.
"""

import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bit_jax.export.source import Source
from bit_jax.model.architecture import GROUPS, HEAD_BIAS, HEAD_KERNEL, PREFIX, STANDARDIZED, Architecture
from bit_jax.model.layers import NORM_EPS
from input_pipeline.errors import RequestError

OPSET, IR = 17, 8  # nothing newer is needed, and whatever reads ONNX today reads these
IMAGES, LOGITS = "images", "logits"
BESIDE = ".data"  # what the file of the weights adds to the graph's name


@dataclasses.dataclass
class Graph:
    """Nodes and weights, in the order of computation.

    Attributes:
        weights: {official key: array}, kernels standardized and HWIO.
        dtype: of weights, images and logits.
    """

    weights: Mapping[str, np.ndarray]
    dtype: np.dtype
    nodes: list[Any] = dataclasses.field(default_factory=list)
    initializers: list[Any] = dataclasses.field(default_factory=list)

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node that is called after its one output, and returns that name."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def constants(self) -> None:
        """Adds what all layers share."""
        self.constant("scale of groups", np.ones(GROUPS, self.dtype))
        self.constant("shift of groups", np.zeros(GROUPS, self.dtype))
        self.constant("shape of groups", np.array([0, GROUPS, -1], np.int64))

    def std_conv(self, x: str, place: str, stride: int) -> str:
        """Convolution with the standardized kernel, padded by (size - 1) / 2 on each side."""
        key = f"{PREFIX}{place}/{STANDARDIZED}/kernel"
        kernel = self.weights[key].transpose(3, 2, 0, 1)
        name, pad = self.constant(f"{key}, standardized", kernel), (kernel.shape[-1] - 1) // 2
        return self.node("Conv", [x, name], f"{place}/conv", strides=[stride] * 2, pads=[pad] * 4)

    def group_norm_relu(self, x: str, place: str) -> str:
        """GroupNorm as the InstanceNormalization of groups, which runtimes have a kernel of their own for.

        onnxruntime expands GroupNormalization of opset 21 into many nodes, and its variance is E[x^2] - E[x]^2, which
        loses digits.
        """
        gamma, beta = (
            self.constant(f"{PREFIX}{place}/{name}", self.weights[f"{PREFIX}{place}/{name}"][:, None, None])
            for name in ("gamma", "beta")
        )
        shape = self.node("Shape", [x], f"{place}/shape")
        grouped = self.node("Reshape", [x, "shape of groups"], f"{place}/groups")
        inputs = [grouped, "scale of groups", "shift of groups"]
        normal = self.node("InstanceNormalization", inputs, f"{place}/normal", epsilon=NORM_EPS)
        scaled = self.node("Mul", [self.node("Reshape", [normal, shape], f"{place}/channels"), gamma], f"{place}/scale")
        return self.node("Relu", [self.node("Add", [scaled, beta], f"{place}/shift")], place)

    def root(self, images: str) -> str:
        x = self.std_conv(images, "root_block", 2)
        # zeros, not -inf, which MaxPool itself would pad with: the checkpoints were trained with a zero-padded pool
        pads = self.constant("root_block/pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
        zero = self.constant("root_block/zero", np.zeros((), self.dtype))
        x = self.node("Pad", [x, pads, zero], "root_block/pad")
        return self.node("MaxPool", [x], "root_block/pool", kernel_shape=[3, 3], strides=[2, 2])

    def unit(self, x: str, place: str, stride: int, *, project: bool) -> str:
        active = self.group_norm_relu(x, f"{place}/a/group_norm")
        shortcut = self.std_conv(active, f"{place}/a/proj", stride) if project else x
        y = self.std_conv(active, f"{place}/a", 1)
        y = self.std_conv(self.group_norm_relu(y, f"{place}/b/group_norm"), f"{place}/b", stride)
        y = self.std_conv(self.group_norm_relu(y, f"{place}/c/group_norm"), f"{place}/c", 1)
        return self.node("Add", [y, shortcut], f"{place}/sum")

    def head(self, x: str) -> str:
        means = self.node("GlobalAveragePool", [x], "means")
        features = self.node("Flatten", [means], "features")
        kernel = self.constant(HEAD_KERNEL, self.weights[HEAD_KERNEL][0, 0])
        return self.node("Gemm", [features, kernel, self.constant(HEAD_BIAS, self.weights[HEAD_BIAS])], LOGITS)


def build(architecture: Architecture, weights: Mapping[str, np.ndarray], dtype: np.dtype) -> Any:
    """Returns the `onnx.ModelProto` of images [batch, 3, height, width] in [-1, 1] -> logits [batch, classes].

    Batch, height and width are open.

    Args:
        architecture: what the weights are of.
        weights: what `Source.folded` returns.
        dtype: of the weights.
    """
    from onnx import helper

    graph = Graph(weights, dtype)
    graph.constants()
    x = graph.root(IMAGES)
    for stage, units in enumerate(architecture.units, start=1):
        for unit in range(1, units + 1):
            first = unit == 1
            x = graph.unit(x, f"block{stage}/unit{unit:02d}", 2 if first and stage > 1 else 1, project=first)
    graph.head(graph.group_norm_relu(x, "group_norm"))
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    images = helper.make_tensor_value_info(IMAGES, kind, ["batch", 3, "height", "width"])
    logits = helper.make_tensor_value_info(LOGITS, kind, ["batch", architecture.num_classes])
    made = helper.make_graph(graph.nodes, f"BiT {architecture.name}", [images], [logits], graph.initializers)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(made, opset_imports=[opset], ir_version=IR, producer_name="bit_jax")


def require(*, checked: bool) -> None:
    """Raises RequestError where onnx, or to run what is written onnxruntime, is not installed."""
    for name, remedy in (("onnx", ""), *((("onnxruntime", ", or add --no-check"),) if checked else ())):
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = f"an .onnx needs {error.name}, which is not installed; pip install 'bit-jax[onnx]'{remedy}"
            raise RequestError(missing) from None


def write(source: Source, path: Path, dtype: np.dtype, *, beside: bool) -> None:
    """Writes the graph of `build`, with kernels standardized.

    Args:
        source: the model.
        path: the file.
        dtype: of images, weights and logits.
        beside: whether the weights go into a file of their own, `path` with ".data", which has to stay beside it.

    Raises:
        RequestError: the weights do not fit into the file.
    """
    import onnx

    if not beside:
        source.require_room(dtype)
    model = build(source.architecture, source.folded(dtype), np.dtype(dtype))
    onnx.save(model, path, save_as_external_data=beside, location=path.name + BESIDE if beside else None)
    if beside:  # onnx makes it readable to nobody else
        os.chmod(path.with_name(path.name + BESIDE), path.stat().st_mode)
    onnx.checker.check_model(path, full_check=True)


def run(path: Path, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the logits of batches of images [batch, height, width, 3].

    They are computed by onnxruntime; in float64, which its convolution does not have, by the reference implementation
    of the ONNX project.
    """
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    if batches[0].dtype == np.float64:
        session: Any = ReferenceEvaluator(str(path))
    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [
        session.run([LOGITS], {IMAGES: np.ascontiguousarray(images.transpose(0, 3, 1, 2))})[0] for images in batches
    ]
