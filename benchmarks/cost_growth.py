"""How time and memory of train.py's training step grow with batch, resolution, width and depth, on this machine:
`python benchmarks/cost_growth.py`. Every point in processes of its own, three times, in turns; medians.

Memory is XLA's account of the compiled step: the state, the batch and everything in between. The exponent is the slope
of a straight line through the logarithms; beside it the slope of what theory expects: of time, the floating-point
operations; of memory, each convolution's output and the activation after it, parameters and momentum.
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
ROUNDS, CALLS = 3, 5
RESULTS = Path(__file__).parent / "results" / "cost_growth.json"


def once(point: dict[str, Any]) -> dict[str, float]:
    """{seconds: median of the calls, gib: arguments and temporaries}, in this process."""
    import jax
    import jax.numpy as jnp

    from bit_jax.plan.compilation import steps_on
    from bit_jax.plan.request import Request
    from bit_jax.scale.sharding import make_mesh

    request = Request(
        model=f"R{point['depth']}x{point['width']:g}", crop=point["size"], batch_per_device=point["batch"]
    )
    made = steps_on(request, make_mesh(jax.devices()[:1]))
    step = made.lower_train_step().compile(compiler_options=made.target.compiler_options)

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        return jax.device_put(jnp.full(leaf.shape, value, leaf.dtype), leaf.sharding)

    state, batch = jax.tree.map(filled, made.state), jax.tree.map(filled, made.training_batch)
    seconds = []
    for _ in range(1 + CALLS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    analysis: Any = step.memory_analysis()
    memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return {"seconds": statistics.median(seconds[1:]), "gib": memory / 2**30}


def theory(point: dict[str, Any]) -> dict[str, float]:
    """{seconds: operations of a step, in no unit of time; gib: of what has to be kept}."""
    from bit_jax.model.architecture import Architecture
    from parity.sides import flops

    architecture = Architecture.parse(f"R{point['depth']}x{point['width']:g}", 1000)
    side, batch = point["size"], point["batch"]
    kept = 2 * batch * flops.convolved(architecture, side, side) + 2 * flops.parameters(architecture)
    return {"seconds": batch * flops.training_step(architecture, side, side), "gib": 4 * kept / 2**30}


def slope(values: list[Any], costs: list[float]) -> float:
    """The exponent: of a straight line through the logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def in_a_process(point: dict[str, Any]) -> dict[str, float]:
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
    try:
        point = json.loads(text)
    except ValueError:
        point = None
    if not isinstance(point, dict) or set(point) != set(BASE):
        raise RequestError(f"--point {text} is no point; write it as {json.dumps(BASE)}")
    return point


def main(point: str = "") -> None:
    """Args:
    point: measure this one alone, in this process: {"batch": 8, "size": 128, "width": 1, "depth": 50}.
    """
    if point:
        print(json.dumps(once(parsed(point))))
        return
    points = {
        f"{sweep} {value}": BASE | SMALLER.get(sweep, {}) | {sweep: value}
        for sweep, values in SWEEPS.items()
        for value in values
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in points}
    for number in range(ROUNDS):
        for name, point in points.items():
            measured[name].append(in_a_process(point))
            print(f"{number + 1}/{ROUNDS} {name}: {measured[name][-1]['seconds']:.3f} s", file=sys.stderr)
    report: dict[str, Any] = {"machine": machine()}
    for sweep, values in SWEEPS.items():
        names = [f"{sweep} {value}" for value in values]
        expected = [theory(points[name]) for name in names]
        found = [
            {what: statistics.median(one[what] for one in measured[name]) for what in ("seconds", "gib")}
            for name in names
        ]
        report[sweep] = {
            "others": {what: value for what, value in points[names[0]].items() if what != sweep},
            "values": values,
            "measured": {name: measured[name] for name in names},
            "exponents": {
                what: {
                    "measured": slope(values, [one[what] for one in found]),
                    "theory": slope(values, [one[what] for one in expected]),
                }
                for what in ("seconds", "gib")
            },
        }
        print(sweep, report[sweep]["others"])
        for value, one in zip(values, found, strict=True):
            print(f"  {value}: {one['seconds']:.3f} s, {one['gib']:.2f} GiB")
        print("  exponents", report[sweep]["exponents"])
    write_json(RESULTS, report)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, description=__doc__)))
