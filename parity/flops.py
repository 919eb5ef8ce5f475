"""What BiT takes, from its shape alone: floating-point operations, two for each product that is accumulated, and
values between its layers."""

from collections.abc import Iterator

from bit_jax.weights import Architecture

Layer = tuple[int, int, int, tuple[int, int]]  # side of the kernel, channels in, channels out, (height, width) out


def forward(architecture: Architecture, height: int, width: int) -> float:
    """Operations of the convolutions and the head, for one image. What multiplies padding counts, what is no product
    does not."""
    *_, (_, _, features, _) = layers = list(_convolutions(architecture, height, width))
    return sum(map(_operations, layers)) + _operations((1, features, architecture.num_classes, (1, 1)))


def training_step(architecture: Architecture, height: int, width: int) -> float:
    """Operations of forward pass and gradients, for one image: three times the forward pass, but for the root, whose
    input needs no gradient."""
    root = next(_convolutions(architecture, height, width))
    return 3 * forward(architecture, height, width) - _operations(root)


def convolved(architecture: Architecture, height: int, width: int) -> int:
    """Values that the convolutions of one image put out."""
    return sum(cout * out[0] * out[1] for _, _, cout, out in _convolutions(architecture, height, width))


def parameters(architecture: Architecture) -> int:
    """Weights of the convolutions and the head."""
    *_, (_, _, features, _) = layers = list(_convolutions(architecture, 1, 1))
    return sum(side * side * cin * cout for side, cin, cout, _ in layers) + features * architecture.num_classes


def _convolutions(architecture: Architecture, height: int, width: int) -> Iterator[Layer]:
    """All but the head, the root first; of a unit, its last convolution last."""
    out = _halved((height, width))
    cin = round(64 * architecture.width)
    yield 7, 3, cin, out
    out, root = _halved(out), cin  # past the pool
    for stage, units in enumerate(architecture.units):
        mid = root * 2**stage
        for unit in range(units):
            before, out = out, _halved(out) if stage > 0 and unit == 0 else out
            if unit == 0:
                yield 1, cin, 4 * mid, out
            yield 1, cin, mid, before
            yield 3, mid, mid, out
            yield 1, mid, 4 * mid, out
            cin = 4 * mid


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _operations(layer: Layer) -> float:
    side, cin, cout, out = layer
    return 2.0 * side * side * cin * cout * out[0] * out[1]
