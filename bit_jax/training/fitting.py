"""`--mesh auto`: parameters are split over as few devices as the memory of the devices allows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from bit_jax.compiled import hlo, memory
from bit_jax.config import AUTO, Config
from bit_jax.scale import hosts, sharding
from input_pipeline.errors import RequestError

if TYPE_CHECKING:
    from bit_jax.training.program import Steps
    from bit_jax.training.run import Run

GIB = 2**30
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # begins XLA's message where a device's memory is too small


def fitted(cfg: Config, settle: Callable[[Config], Run]) -> Run:
    """Returns the run on the first mesh that fits, from fsdp=1 on, with a note that says why it is that one. Splitting
    costs communication, so it is not done where every device can hold all parameters.

    What fits is read off the compiled training step, as `bit_jax.plan` does, so the step is compiled for each mesh that
    is tried; the one that fits is found in the compilation cache when the run compiles it.

    Args:
        settle: function that makes a run of a configuration with a mesh.

    Raises:
        RequestError: no mesh fits.
    """
    devices, limit = jax.device_count(), min(map(int, hosts.exchange("memory", str(least_memory()))))
    if not limit:
        why = "the devices here share their host's memory, and have no limit of their own"
        return _explained(_on(cfg, settle, 1), why)
    tried: list[str] = []
    for fsdp in (size for size in range(1, devices + 1) if devices % size == 0):
        run = _on(cfg, settle, fsdp)
        needed = largest(hosts.exchange(f"a step with fsdp={fsdp}", json.dumps(need(run.steps()))))
        if needed is not None and needed <= limit:
            why = f"a step takes {_gib(needed)} of the {_gib(limit)} that XLA has of each device"
            return _explained(run, "; ".join([why, *tried]))
        tried.append(f"with fsdp={fsdp} it would take {_gib(needed)}")
    raise RequestError(
        f"--mesh auto: no mesh of {devices} devices fits: XLA has {_gib(limit)} of each; {'; '.join(tried)}. --remat "
        "norm or unit, more --microbatches, a smaller --batch-per-device or more devices take less"
    )


def least_memory() -> int:
    """Returns the bytes that JAX may use of the local device that has least; 0 where devices set no limit, as CPUs."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") or 0 for device in jax.local_devices()]
    return min(limits)


def largest(needs: Sequence[str]) -> int | None:
    """Returns the largest of what `need` returned on each host, as JSON; None if it did so on one of them."""
    sizes = [json.loads(text) for text in needs]
    return None if None in sizes else max(sizes)


def need(steps: Steps) -> int | None:
    """Returns the bytes of a device that the training step takes at its peak, cuDNN's workspaces included; None if
    XLA's compiler had to repeat instructions to stay within the device's memory, or had too little of it to try out
    cuDNN's algorithms."""
    try:
        executable = steps.lower_train_step().compile(compiler_options=steps.target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        return None
    analysis: Any = executable.memory_analysis()
    module = hlo.Module(executable.as_text() or "")
    return None if module.rematerialized() else analysis.peak_memory_in_bytes + memory.workspace(module)


def _on(cfg: Config, settle: Callable[[Config], Run], fsdp: int) -> Run:
    mesh = f"{sharding.DATA}={jax.device_count() // fsdp},{sharding.FSDP}={fsdp}"
    return settle(dataclasses.replace(cfg, scale=dataclasses.replace(cfg.scale, mesh=mesh)))


def _explained(run: Run, why: str) -> Run:
    note = f"--mesh {AUTO}: {run.config.scale.mesh}, because {why}"
    return dataclasses.replace(run, notes=(note, *run.notes))


def _gib(size: int | None) -> str:
    return "more than that" if size is None else f"{size / GIB:.3g} GiB"
