"""How many floating-point operations BiT takes, from its shape alone: two for each product that is accumulated."""

from bit_jax.weights import Architecture


def forward(architecture: Architecture, height: int, width: int) -> float:
    """Of the convolutions and the head, for one image. What multiplies padding counts, what is no product does not."""
    out = _halved((height, width))
    channels = round(64 * architecture.width)
    total = _convolution(7, 3, channels, out)
    out, cin = _halved(out), channels  # past the pool
    for stage, units in enumerate(architecture.units):
        mid = channels * 2**stage
        for unit in range(units):
            before, out = out, _halved(out) if stage > 0 and unit == 0 else out
            total += _convolution(1, cin, mid, before) + _convolution(3, mid, mid, out)
            total += _convolution(1, mid, 4 * mid, out)
            total += _convolution(1, cin, 4 * mid, out) if unit == 0 else 0.0
            cin = 4 * mid
    return total + _convolution(1, cin, architecture.num_classes, (1, 1))


def training_step(architecture: Architecture, height: int, width: int) -> float:
    """Of forward pass and gradients, for one image: three times the forward pass, but for the root, whose input needs
    no gradient."""
    root = _convolution(7, 3, round(64 * architecture.width), _halved((height, width)))
    return 3 * forward(architecture, height, width) - root


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _convolution(side: int, cin: int, cout: int, out: tuple[int, int]) -> float:
    return 2.0 * side * side * cin * cout * out[0] * out[1]
