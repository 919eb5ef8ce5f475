"""How long do this host's devices take for a piece of work that is the same everywhere?"""

import time
from typing import Any

import jax
import jax.numpy as jnp

# of square matrices; two products take 2 ms on two cores, and less by the rate of any GPU that `plan` knows
SIDE = {"gpu": 4096, "cpu": 384}
TRIES = 10  # the best of so many counts, because now and then something else has the processor for a moment


class SameWork:
    """Measures the work.

    One measurement may fall into a moment in which a device is slow for once: its clock is still low, or another
    program has the processor. So a device's time is the shorter one of the last two measurements, which are a
    checkpoint apart.

    Attributes:
        seconds: seconds that the slowest device of this host took; 0 before there are two measurements.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: list[float] = []  # of each device

    def measure(self) -> None:
        """Has each device, one after the other, multiply square matrices. The devices must have nothing else to do. A
        run of one host has nobody to be compared with, and measures nothing."""
        if jax.process_count() > 1:
            measured = [_seconds(device) for device in jax.local_devices()]
            if self._last:
                self.seconds = max(map(min, self._last, measured))
            self._last = measured


def _seconds(device: Any) -> float:
    """Returns the seconds of the best of `TRIES`."""
    matrix = jax.device_put(jnp.ones((SIDE.get(device.platform, 1024),) * 2, jnp.bfloat16), device)
    times = []
    for _ in range(1 + TRIES):  # the first compiles
        began = time.perf_counter()
        _products(matrix).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times[1:])


@jax.jit
def _products(matrix: jax.Array) -> jax.Array:
    return matrix @ (matrix @ matrix)
