"""Counts BiT's floating-point operations, two for each accumulated product, and the values between its layers, from
the architecture alone."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from bit_jax.model.architecture import Architecture


class Convolution(NamedTuple):
    """One of the architecture's convolutions, on images of one size.

    Attributes:
        size: side of the kernel.
        cin, cout: numbers of input and output channels.
        stride: stride, 1 or 2.
        input_size, output_size: (height, width) of its input and output.
    """

    size: int
    cin: int
    cout: int
    stride: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]

    @property
    def flops(self) -> float:
        """Number of operations of the forward pass for one image, as many as each of the two gradients takes."""
        return 2.0 * self.size**2 * self.cin * self.cout * math.prod(self.output_size)


def forward(architecture: Architecture, height: int, width: int) -> float:
    """Counts the operations of the convolutions and the head for one image. Products with padding count; other
    operations do not."""
    layers = list(convolutions(architecture, height, width))
    return sum(layer.flops for layer in layers) + 2.0 * layers[-1].cout * architecture.num_classes


def training_step(architecture: Architecture, height: int, width: int) -> float:
    """Counts the operations of forward pass and gradients for one image: three times the forward pass, less one pass of
    the root convolution, whose input needs no gradient."""
    root = next(convolutions(architecture, height, width))
    return 3 * forward(architecture, height, width) - root.flops


def convolved(architecture: Architecture, height: int, width: int) -> int:
    """Counts the output values of all convolutions for one image."""
    return sum(layer.cout * math.prod(layer.output_size) for layer in convolutions(architecture, height, width))


def parameters(architecture: Architecture) -> int:
    """Counts the weights of the convolutions and the head."""
    layers = list(convolutions(architecture, 1, 1))
    return sum(layer.size**2 * layer.cin * layer.cout for layer in layers) + layers[-1].cout * architecture.num_classes


def convolutions(architecture: Architecture, height: int, width: int) -> Iterator[Convolution]:
    """Yields all convolutions, without the head: the root first, then each unit's in the order of computation."""
    size = height, width
    out = _halved(size)
    cin = round(64 * architecture.width)
    yield Convolution(7, 3, cin, 2, size, out)
    size, root = _halved(out), cin  # after the max-pool
    for stage, units in enumerate(architecture.units):
        mid = root * 2**stage
        for unit in range(units):
            stride = 2 if stage > 0 and unit == 0 else 1
            out = _halved(size) if stride == 2 else size
            if unit == 0:
                yield Convolution(1, cin, 4 * mid, stride, size, out)
            yield Convolution(1, cin, mid, 1, size, size)
            yield Convolution(3, mid, mid, stride, size, out)
            yield Convolution(1, mid, 4 * mid, 1, out, out)
            cin, size = 4 * mid, out


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2
