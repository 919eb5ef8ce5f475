"""Measures the time and memory of `bit_jax.load` beside a plain read of the same file.

    python benchmarks/load_weights.py --json-path benchmarks/results/load_weights.json

It writes random weights of each architecture in the official layout to a temporary folder. New processes then read the
whole file into one new `bytes` and load it, in turn, from the page cache. Memory is how far the process's resident size
rises at most above what it was with everything imported and JAX started (Linux's VmHWM).
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro
from rich.table import Table

from bit_jax.formats import weights
from bit_jax.model.architecture import Architecture
from bit_jax.published.catalogue import ARCHITECTURES
from input_pipeline import terminal
from input_pipeline.files import writable, write_json

MEASURE = """
import sys, time
import jax, jax.numpy as jnp
import bit_jax
jax.block_until_ready(jnp.zeros(1))
operation, path = sys.argv[1:]

def resident_kib():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = resident_kib()
start = time.perf_counter()
if operation == "load":
    kept = jax.block_until_ready(bit_jax.load(path))
else:
    with open(path, "rb") as file:
        kept = file.read()
print(time.perf_counter() - start, (resident_kib() - before) * 1024)
"""


def main(architectures: tuple[str, ...] = ARCHITECTURES, rounds: int = 5, json_path: Path | None = None) -> None:
    """Measures and prints the table.

    Args:
        architectures: Architectures to measure, such as R50x1; each needs disk space for its weights.
        rounds: Number of times that each file is read and loaded, in turn; the table shows medians.
        json_path: JSON file to write the figures to. None: only print them.
    """
    if json_path is not None:
        writable(json_path)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in architectures:
            path = Path(folder) / f"{name}.npz"
            write(path, name)
            measured = {"read": [], "load": []}
            for _ in range(rounds):
                for operation, values in measured.items():
                    values.append(measure(operation, path))
            rows.append({"architecture": name, "bytes": path.stat().st_size} | summary(measured))
            path.unlink()
    show(rows)
    if json_path is not None:
        write_json(json_path, {"rounds": rounds, "rows": rows})


def write(path: Path, name: str) -> None:
    """Writes random weights of the architecture of that name."""
    rng = np.random.default_rng(0)
    architecture = Architecture.parse(name, 1000)
    flat = {key: rng.standard_normal(shape, np.float32) for key, shape in architecture.layout.items()}
    weights.save(path, weights.unflatten(flat))


def measure(operation: str, path: Path) -> tuple[float, float]:
    """Returns the seconds and the bytes of memory that a new process takes to "read" or "load" the file."""
    done = subprocess.run([sys.executable, "-c", MEASURE, operation, path], capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.split()
    return float(seconds), float(memory)


def summary(measured: dict[str, list[tuple[float, float]]]) -> dict:
    """Returns the medians and ranges of {operation: [(seconds, bytes of memory)]}."""
    seconds = {operation: sorted(second for second, _ in values) for operation, values in measured.items()}
    return {
        "read_s": statistics.median(seconds["read"]),
        "read_s_range": [seconds["read"][0], seconds["read"][-1]],
        "load_s": statistics.median(seconds["load"]),
        "load_s_range": [seconds["load"][0], seconds["load"][-1]],
        "load_peak_bytes": statistics.median(memory for _, memory in measured["load"]),
    }


def show(rows: list[dict]) -> None:
    """Prints the figures of every architecture as a table."""
    table = Table("architecture", "MB", "read s", "load s", "load / read", "peak memory / file size")
    for row in rows:
        table.add_row(
            row["architecture"],
            f"{row['bytes'] / 1e6:,.0f}",
            "{:.2f} ({:.2f} to {:.2f})".format(row["read_s"], *row["read_s_range"]),
            "{:.2f} ({:.2f} to {:.2f})".format(row["load_s"], *row["load_s_range"]),
            f"{row['load_s'] / row['read_s']:.1f}",
            f"{row['load_peak_bytes'] / row['bytes']:.2f}",
        )
    terminal.console(width=120).print(table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
