"""Measures how long a checkpoint holds a run up, and how long it takes to write: `python benchmarks/saving.py`.

A state of the model's parameters and as many values of momentum lies on virtual devices of the CPU. Each arm saves it
twice in a process of its own, because what the first checkpoint of a run compiles the later ones find; the arms take
turns. `held` is the time until training may go on. Medians and the range of all rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from bit_jax.model.architecture import Architecture
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import writable, write_json
from input_pipeline.flags import UserPath, require_positive

ARMS = {
    "a slice from every device that has the part": {"use_replica_parallel": True},  # Orbax's default
    "each part from one device": {"use_replica_parallel": False},  # as bit_jax.checkpoints.shared saves
    "so, and not compressed": {"use_replica_parallel": False, "use_compression": False},
}


def measure(arm: str, model: str, fsdp: int) -> dict[str, float]:
    """Returns seconds and bytes of the first and of the second checkpoint, measured in this process."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as orbax

    from bit_jax.scale import sharding

    mesh, rng = sharding.make_mesh(fsdp=fsdp), np.random.default_rng(0)
    state: dict[str, Any] = {}
    for key, shape in Architecture.parse(model, 1000).layout.items():
        like = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding.param_sharding(mesh, shape))
        for kind in ("parameters", "momentum"):
            values = rng.standard_normal(shape, np.float32)
            state[f"{kind}.{key.replace('/', '.')}"] = sharding.place(values, like)
    jax.block_until_ready(state)
    context = orbax.Context()
    for name, value in ARMS[arm].items():
        setattr(context.array.saving, name, value)
    found: dict[str, float] = {}
    for which in ("first", "second"):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            with context:
                response = orbax.save_async(str(Path(folder) / "state"), state)
            found[f"{which}, held"] = time.perf_counter() - start
            response.result()
            found[f"{which}, written"] = time.perf_counter() - start
            found["bytes"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return found


def main(
    model: str = "R50x1", devices: int = 8, fsdp: int = 1, rounds: int = 3, json_path: UserPath | None = None
) -> None:
    """Measures all arms and prints a line for each.

    Args:
        model: Architecture whose state is saved.
        devices: Number of virtual devices.
        fsdp: Number of devices that split an array; the others hold copies.
        rounds: Number of processes of each arm.
        json_path: File for all figures.
    """
    require_positive({"--devices": devices, "--fsdp": fsdp, "--rounds": rounds})
    if devices % fsdp:
        raise RequestError(f"--fsdp {fsdp} does not divide --devices {devices}; give a divisor")
    Architecture.parse(model, 1000)
    if json_path is not None:
        writable(json_path)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm, results in measured.items():
            command = [sys.executable, __file__, "--measure", arm, model, str(fsdp)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    for arm, results in measured.items():
        print(arm)
        for name in results[0]:
            values = sorted(result[name] for result in results)
            print(f"    {name}: {statistics.median(values):.4g} ({values[0]:.4g} to {values[-1]:.4g})")
    if json_path is not None:
        write_json(json_path, {"model": model, "devices": devices, "fsdp": fsdp, "arms": measured})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        sys.exit(exit_code(lambda: tyro.cli(main)))
