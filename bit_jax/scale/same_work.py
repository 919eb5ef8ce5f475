"""How long do this host's devices take for a piece of work that is the same everywhere?"""

import time
from typing import Any

import jax
import jax.numpy as jnp

SIDE = {"gpu": 4096, "cpu": 384}  # of square matrices: less than a millisecond for an H100 or a core


class SameWork:
    """Measures the work.

    Attributes:
        seconds: seconds that the slowest device of this host took when it was measured last; 0 before.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def measure(self) -> None:
        """Has each device, one after the other, multiply square matrices, and keeps the best of three times. The
        devices must have nothing else to do. A run of one host has nobody to be compared with, and measures nothing."""
        if jax.process_count() > 1:
            self.seconds = max(_seconds(device) for device in jax.local_devices())


def _seconds(device: Any) -> float:
    matrix = jax.device_put(jnp.ones((SIDE.get(device.platform, 1024),) * 2, jnp.bfloat16), device)
    times = []
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        _products(matrix).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times[1:])


@jax.jit
def _products(matrix: jax.Array) -> jax.Array:
    return matrix @ (matrix @ matrix)
