"""The weights and images behind tests/data/bit_pytorch_float64.npz: the order of the draws is part of the data."""

import numpy as np

UNITS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def weights(depth: int, width: int, classes: int, seed: int) -> dict[str, np.ndarray]:
    """{official key: float32 array}, drawn in this order from one generator."""
    rng = np.random.default_rng(seed)
    flat: dict[str, np.ndarray] = {}

    def kernel(key: str, size: int, cin: int, cout: int) -> None:
        values = rng.standard_normal((size, size, cin, cout)) * np.sqrt(2 / (size * size * cin))
        means = rng.standard_normal((1, 1, 1, cout)) * 0.01
        flat[f"{key}/standardized_conv2d/kernel"] = (values + means).astype(np.float32)

    def norm(key: str, channels: int) -> None:
        flat[f"{key}/group_norm/gamma"] = (1 + 0.2 * rng.standard_normal(channels)).astype(np.float32)
        flat[f"{key}/group_norm/beta"] = (0.1 * rng.standard_normal(channels)).astype(np.float32)

    cin = 64 * width
    kernel("resnet/root_block", 7, 3, cin)
    for stage, units in enumerate(UNITS[depth]):
        mid = 64 * width * 2**stage
        for unit in range(units):
            block = f"resnet/block{stage + 1}/unit{unit + 1:02d}"
            for part, size, fan_in, fan_out in (("a", 1, cin, mid), ("b", 3, mid, mid), ("c", 1, mid, 4 * mid)):
                norm(f"{block}/{part}", fan_in)
                kernel(f"{block}/{part}", size, fan_in, fan_out)
            if unit == 0:
                kernel(f"{block}/a/proj", 1, cin, 4 * mid)
            cin = 4 * mid
    norm("resnet", cin)
    flat["resnet/head/conv2d/kernel"] = (rng.standard_normal((1, 1, cin, classes)) * 0.02).astype(np.float32)
    flat["resnet/head/conv2d/bias"] = (0.01 * rng.standard_normal(classes)).astype(np.float32)
    return flat


def images(seed: int) -> list[np.ndarray]:
    """[2, 128, 128, 3], [2, 97, 131, 3] and [4, 64, 64, 3], uniform in [-1, 1]."""
    rng = np.random.default_rng(seed + 100)
    shapes = (2, 128, 128, 3), (2, 97, 131, 3), (4, 64, 64, 3)
    return [rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes]
