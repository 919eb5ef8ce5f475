"""Measures how time and memory of train.py's training step grow with batch, resolution, width and depth.

`python benchmarks/cost_growth.py` measures every point on this machine's CPU three times, in turns and each time in a
process of its own, and takes medians. Memory is what XLA reports for the compiled step: the state, the batch and
everything in between. The exponent is the slope of a straight line through the logarithms. Beside it stands the slope
that theory expects: for time, that of the floating-point operations; for memory, that of each convolution's output and
the activation after it, the parameters and the momentum.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import write_json
from parity.throughput.machine import machine

SWEEPS: dict[str, list[Any]] = {
    "batch": [2, 4, 8, 16],
    "size": [64, 96, 128, 192],
    "width": [0.5, 1, 2],
    "depth": [14, 26, 50, 101],
}
BASE = {"batch": 8, "size": 128, "width": 1, "depth": 50}
SMALLER = {"width": {"depth": 26, "size": 96}}  # small enough for twice the width
COSTS = ("seconds", "gib")
ROUNDS, CALLS = 3, 5
RESULTS = Path(__file__).parent / "results" / "cost_growth.json"


def measure(point: dict[str, Any]) -> dict[str, float]:
    """Returns {"seconds": median of the calls, "gib": GiB of arguments and temporaries}, measured in this process."""
    import jax
    import jax.numpy as jnp

    from bit_jax.plan.compilation import steps_on
    from bit_jax.plan.request import Request
    from bit_jax.scale.sharding import make_mesh

    request = Request(
        model=f"R{point['depth']}x{point['width']:g}", crop=point["size"], batch_per_device=point["batch"]
    )
    steps = steps_on(request, make_mesh(jax.devices()[:1]))
    step = steps.lower_train_step().compile(compiler_options=steps.target.compiler_options)

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        return jax.device_put(jnp.full(leaf.shape, value, leaf.dtype), leaf.sharding)

    state, batch = jax.tree.map(filled, steps.state), jax.tree.map(filled, steps.training_batch)
    seconds = []
    for _ in range(1 + CALLS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    analysis: Any = step.memory_analysis()
    memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return {"seconds": statistics.median(seconds[1:]), "gib": memory / 2**30}


def theory(point: dict[str, Any]) -> dict[str, float]:
    """Returns {"seconds": operations of a step, in no unit of time, "gib": GiB of the arrays that must be kept}."""
    from bit_jax.model.architecture import Architecture
    from parity.sides import flops

    architecture = Architecture.parse(f"R{point['depth']}x{point['width']:g}", 1000)
    side, batch = point["size"], point["batch"]
    kept = 2 * batch * flops.convolved(architecture, side, side) + 2 * flops.parameters(architecture)
    return {"seconds": batch * flops.training_step(architecture, side, side), "gib": 4 * kept / 2**30}


def slope(values: list[Any], costs: list[float]) -> float:
    """Returns the exponent: the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def measure_in_a_process(point: dict[str, Any]) -> dict[str, float]:
    """Returns what `measure` returns in a new process."""
    from bit_jax.process import hugepages

    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | hugepages.environment()
    done = subprocess.run(
        [sys.executable, __file__, "--point", json.dumps(point)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def parsed(text: str) -> dict[str, Any]:
    """Returns the point that --point describes in JSON.

    Raises:
        RequestError: the text is no JSON, or lacks an entry of BASE or has others.
    """
    try:
        point = json.loads(text)
    except ValueError:
        point = None
    if not isinstance(point, dict) or set(point) != set(BASE):
        raise RequestError(f"--point {text} is no point; write it as {json.dumps(BASE)}")
    return point


def main(point: str = "") -> None:
    """Measures all points, writes the figures to RESULTS and prints the exponents; or measures a single point.

    Args:
        point: Point to measure alone, in this process, such as {"batch": 8, "size": 128, "width": 1, "depth": 50}.
            Empty: all points.
    """
    if point:
        print(json.dumps(measure(parsed(point))))
        return
    points = {
        f"{sweep} {value}": BASE | SMALLER.get(sweep, {}) | {sweep: value}
        for sweep, values in SWEEPS.items()
        for value in values
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in points}
    for number in range(ROUNDS):
        for name, sizes in points.items():
            measured[name].append(measure_in_a_process(sizes))
            print(f"{number + 1}/{ROUNDS} {name}: {measured[name][-1]['seconds']:.3f} s", file=sys.stderr)
    report: dict[str, Any] = {"machine": machine()}
    for sweep, values in SWEEPS.items():
        names = [f"{sweep} {value}" for value in values]
        expected = [theory(points[name]) for name in names]
        medians = [
            {cost: statistics.median(costs[cost] for costs in measured[name]) for cost in COSTS} for name in names
        ]
        report[sweep] = {
            "others": {key: value for key, value in points[names[0]].items() if key != sweep},
            "values": values,
            "measured": {name: measured[name] for name in names},
            "exponents": {
                cost: {
                    "measured": slope(values, [costs[cost] for costs in medians]),
                    "theory": slope(values, [costs[cost] for costs in expected]),
                }
                for cost in COSTS
            },
        }
        print(sweep, report[sweep]["others"])
        for value, costs in zip(values, medians, strict=True):
            print(f"  {value}: {costs['seconds']:.3f} s, {costs['gib']:.2f} GiB")
        print("  exponents", report[sweep]["exponents"])
    write_json(RESULTS, report)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, description=__doc__)))
