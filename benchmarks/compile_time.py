"""Measures how long the train step of R152x2 takes to trace, lower and compile, on this machine's CPU and for an A100.

`python benchmarks/compile_time.py` measures every case three times, in turns and each time in a process of its own, and
prints medians. `cached` is the compilation of the same program by a second process that finds it in the persistent
cache.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from input_pipeline.files import write_json

CASES = [("cpu", "none"), ("cpu", "norm"), ("a100-40g", "none"), ("a100-40g", "norm")]
ROUNDS = 3
RESULTS = Path(__file__).parent / "results" / "compile_time.json"


def measure(device: str, remat: str) -> dict[str, float]:
    """Returns the seconds of each phase, measured in this process."""
    from bit_jax.plan import compilation
    from bit_jax.plan.request import Request
    from bit_jax.scale.sharding import make_mesh

    request = Request(model="R152x2", device="a100-40g" if device == "cpu" else device, remat=remat)
    if device == "cpu":
        steps = compilation.steps_on(request, make_mesh())
    else:
        steps = compilation.steps_on_gpus(request, compilation.UNLIMITED)
    start = time.perf_counter()
    lowered = steps.lower_train_step()
    traced = time.perf_counter()
    lowered.compile(compiler_options=steps.target.compiler_options)
    return {"trace and lower": traced - start, "compile": time.perf_counter() - traced}


def measure_in_a_process(device: str, remat: str, cache: str) -> dict[str, float]:
    """Returns what `measure` returns in a new process whose persistent cache is the folder `cache`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, __file__, device, remat], env=environment, capture_output=True, text=True)
    done.check_returncode()
    return json.loads(done.stdout)


def main() -> None:
    """Measures all cases, writes the seconds to RESULTS and prints their medians."""
    measured: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for device, remat in CASES:
            with tempfile.TemporaryDirectory() as cache:
                seconds = measure_in_a_process(device, remat, cache)
                if device == "cpu":  # a compilation for a GPU that is not here is not kept
                    seconds["cached"] = measure_in_a_process(device, remat, cache)["compile"]
            for phase, value in seconds.items():
                measured.setdefault(f"{device} {remat}", {}).setdefault(phase, []).append(value)
    medians = {
        case: {phase: {"median": statistics.median(values), "all": values} for phase, values in phases.items()}
        for case, phases in measured.items()
    }
    write_json(RESULTS, medians)
    for case, phases in medians.items():
        print(case, {phase: round(numbers["median"], 1) for phase, numbers in phases.items()})


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:]))) if len(sys.argv) > 1 else main()
