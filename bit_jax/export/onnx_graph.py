"""Writes BiT as an ONNX graph, node by node: what PyTorch's exporter needs ten nodes for is one here.

Kernels are standardized in float64 before they are written, so no runtime has to do it, or to add the right epsilon.
The package `onnx` builds and checks the file; no framework takes part.
"""

import dataclasses
from typing import Any

import numpy as np

from bit_jax.model.architecture import GROUPS, HEAD_BIAS, HEAD_KERNEL, PREFIX, STANDARDIZED, Architecture
from bit_jax.model.layers import NORM_EPS

OPSET = 21  # the first whose GroupNormalization has a scale for each channel, as BiT's has for its own
IR = 10  # the file format's version that opset 21 came with
IMAGES, LOGITS = "images", "logits"


@dataclasses.dataclass
class Graph:
    """Nodes and weights, in the order of computation.

    Attributes:
        weights: {official key: array}; kernels are HWIO and not standardized.
        eps: what is added to the variance of kernels.
        dtype: of weights, images and logits.
    """

    weights: dict[str, np.ndarray]
    eps: float
    dtype: np.dtype
    nodes: list[Any] = dataclasses.field(default_factory=list)
    initializers: list[Any] = dataclasses.field(default_factory=list)

    @property
    def kind(self) -> int:
        """ONNX's number for the dtype."""
        from onnx import helper

        return helper.np_dtype_to_tensor_dtype(self.dtype)

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node that is called after its one output, and returns that name."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, key: str) -> str:
        return self.constant(key, self.weights[key].astype(self.dtype))

    def std_conv(self, x: str, place: str, stride: int) -> str:
        """Convolution with the standardized kernel, padded by (size - 1) / 2 on each side."""
        key = f"{PREFIX}{place}/{STANDARDIZED}/kernel"
        kernel = standardized(self.weights[key], self.eps).transpose(3, 2, 0, 1)
        pad = (kernel.shape[-1] - 1) // 2
        name = self.constant(f"{key}/standardized", kernel.astype(self.dtype))
        return self.node("Conv", [x, name], f"{place}/conv", strides=[stride] * 2, pads=[pad] * 4)

    def group_norm_relu(self, x: str, place: str) -> str:
        key = f"{PREFIX}{place}"
        inputs = [x, self.weight(f"{key}/gamma"), self.weight(f"{key}/beta")]
        self.node("GroupNormalization", inputs, place, num_groups=GROUPS, epsilon=NORM_EPS, stash_type=self.kind)
        return self.node("Relu", [place], f"{place}/relu")

    def root(self, images: str) -> str:
        x = self.std_conv(images, "root_block", 2)
        # zeros, not -inf, which MaxPool itself would pad with: the checkpoints were trained with a zero-padded pool
        pads = self.constant("root_block/pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
        zero = self.constant("root_block/zero", np.zeros((), self.dtype))
        x = self.node("Pad", [x, pads, zero], "root_block/pad")
        return self.node("MaxPool", [x], "root_block/pool", kernel_shape=[3, 3], strides=[2, 2])

    def unit(self, x: str, place: str, stride: int, project: bool) -> str:
        active = self.group_norm_relu(x, f"{place}/a/group_norm")
        shortcut = self.std_conv(active, f"{place}/a/proj", stride) if project else x
        y = self.std_conv(active, f"{place}/a", 1)
        y = self.std_conv(self.group_norm_relu(y, f"{place}/b/group_norm"), f"{place}/b", stride)
        y = self.std_conv(self.group_norm_relu(y, f"{place}/c/group_norm"), f"{place}/c", 1)
        return self.node("Add", [y, shortcut], f"{place}/sum")

    def head(self, x: str) -> str:
        axes = self.constant("head/axes", np.array([2, 3], np.int64))
        features = self.node("ReduceMean", [x, axes], "features", keepdims=0)
        kernel = self.constant(HEAD_KERNEL, self.weights[HEAD_KERNEL][0, 0].astype(self.dtype))
        return self.node("Gemm", [features, kernel, self.weight(HEAD_BIAS)], LOGITS)


def standardized(kernel: np.ndarray, eps: float) -> np.ndarray:
    """Returns (kernel - mean) / sqrt(variance + eps) in float64, statistics over all values of an output channel."""
    kernel = kernel.astype(np.float64)
    return (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + eps)


def build(architecture: Architecture, weights: dict[str, np.ndarray], eps: float, dtype: Any = np.float32) -> Any:
    """Returns the `onnx.ModelProto` of images [batch, 3, height, width] in [-1, 1] -> logits [batch, classes].

    Batch, height and width are open.

    Args:
        architecture: what the weights are of.
        weights: {official key: array}.
        eps: what is added to the variance of kernels.
        dtype: float32, or float64, which onnxruntime has no convolution for.
    """
    from onnx import helper

    graph = Graph(weights, eps, np.dtype(dtype))
    x = graph.root(IMAGES)
    for stage, units in enumerate(architecture.units, start=1):
        for unit in range(1, units + 1):
            stride = 2 if stage > 1 and unit == 1 else 1
            x = graph.unit(x, f"block{stage}/unit{unit:02d}", stride, unit == 1)
    graph.head(graph.group_norm_relu(x, "group_norm"))
    images = helper.make_tensor_value_info(IMAGES, graph.kind, ["batch", 3, "height", "width"])
    logits = helper.make_tensor_value_info(LOGITS, graph.kind, ["batch", architecture.num_classes])
    made = helper.make_graph(graph.nodes, architecture.name, [images], [logits], graph.initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
