"""What BiT takes, from its shape alone: floating-point operations, two for each product that is accumulated, and
values between its layers."""

from collections.abc import Iterator
from typing import NamedTuple

from bit_jax.model.architecture import Architecture


class Convolution(NamedTuple):
    """One of the architecture's convolutions, on images of one size.

    Attributes:
        size: side of the kernel.
        cin, cout: channels.
        stride: 1 or 2.
        given, out: (height, width) of what it reads and writes.
    """

    size: int
    cin: int
    cout: int
    stride: int
    given: tuple[int, int]
    out: tuple[int, int]

    @property
    def flops(self) -> float:
        """Operations for one image, forward; its gradients by the input and by the kernel take as many each."""
        return 2.0 * self.size**2 * self.cin * self.cout * self.out[0] * self.out[1]


def forward(architecture: Architecture, height: int, width: int) -> float:
    """Operations of the convolutions and the head, for one image. What multiplies padding counts, what is no product
    does not."""
    layers = list(convolutions(architecture, height, width))
    return sum(layer.flops for layer in layers) + 2.0 * layers[-1].cout * architecture.num_classes


def training_step(architecture: Architecture, height: int, width: int) -> float:
    """Operations of forward pass and gradients, for one image: three times the forward pass, but for the root, whose
    input needs no gradient."""
    root = next(convolutions(architecture, height, width))
    return 3 * forward(architecture, height, width) - root.flops


def convolved(architecture: Architecture, height: int, width: int) -> int:
    """Values that the convolutions of one image put out."""
    return sum(each.cout * each.out[0] * each.out[1] for each in convolutions(architecture, height, width))


def parameters(architecture: Architecture) -> int:
    """Weights of the convolutions and the head."""
    layers = list(convolutions(architecture, 1, 1))
    return sum(each.size**2 * each.cin * each.cout for each in layers) + layers[-1].cout * architecture.num_classes


def convolutions(architecture: Architecture, height: int, width: int) -> Iterator[Convolution]:
    """All but the head, the root first; of a unit, its last convolution last."""
    given = height, width
    out = _halved(given)
    cin = round(64 * architecture.width)
    yield Convolution(7, 3, cin, 2, given, out)
    given, root = _halved(out), cin  # past the pool
    for stage, units in enumerate(architecture.units):
        mid = root * 2**stage
        for unit in range(units):
            stride = 2 if stage > 0 and unit == 0 else 1
            out = _halved(given) if stride == 2 else given
            if unit == 0:
                yield Convolution(1, cin, 4 * mid, stride, given, out)
            yield Convolution(1, cin, mid, 1, given, given)
            yield Convolution(3, mid, mid, stride, given, out)
            yield Convolution(1, mid, 4 * mid, 1, out, out)
            cin, given = 4 * mid, out


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2
