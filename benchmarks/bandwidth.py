"""Describes the machine and measures how fast its device copies its own memory, the bandwidth that rooflines divide by.

python benchmarks/bandwidth.py [--json FILE]
"""

import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import tyro

from bit_jax.training import figures
from input_pipeline.exits import exit_code
from input_pipeline.files import writable, write_json
from input_pipeline.flags import UserPath
from parity.throughput.machine import machine

VALUES = {"cpu": 2**24, "gpu": 2**30}  # float32 values that are read, and written negated
COPIES = 20


def main(json: UserPath | None = None) -> None:
    """Prints the bandwidth of the first device.

    Args:
        json: JSON file to write the bandwidth, the machine and the versions to. None: only print the bandwidth.
    """
    if json is not None:
        writable(json)
    device = jax.devices()[0]
    values = jax.random.normal(jax.random.key(0), (VALUES["cpu" if device.platform == "cpu" else "gpu"],), jnp.float32)
    negate = jax.jit(lambda values: -values)
    negate(values).block_until_ready()
    seconds = []
    for _ in range(COPIES):
        start = time.perf_counter()
        negate(values).block_until_ready()
        seconds.append(time.perf_counter() - start)
    measured = {
        "device": device.device_kind,
        "platform": device.platform,
        "bytes_a_second": 2 * values.nbytes / statistics.median(seconds),
        "versions": figures.versions(),
        "machine": machine(),
    }
    if device.platform == "gpu":
        measured["nvidia_smi"] = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    print(f"{measured['device']}: {measured['bytes_a_second'] / 1e9:.0f} GB/s, reading and writing")
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, measured)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, description=__doc__)))
