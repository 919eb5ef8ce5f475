"""Makes the plan, a JSON-like dict: memory, work, collectives, and a roofline of the step."""

import dataclasses
from typing import Any

from bit_jax.compiled import hlo
from bit_jax.plan.compilation import UNLIMITED, compile_train_step, memory_needs
from bit_jax.plan.request import Request
from bit_jax.scale import sharding
from bit_jax.training import figures

HOSTS = (1, 2, 4, 8, 16, 32, 64)  # of the communication model


def plan(request: Request) -> dict[str, Any]:
    """Returns `demands`, and how memory changes where XLA rematerializes on its own. Compiles twice."""
    real = compile_train_step(request, request.gpu.memory)
    return demands(request) | {
        "with_xla_rematerialization": {
            "peak": real.peak,
            "fits": memory_needs(request, real)["fits"],
            "repeated_instructions": real.module.rematerialized(),
            "convolutions": real.module.convolutions(),
        }
    }


def demands(request: Request) -> dict[str, Any]:
    """Returns everything else that is printed; bytes and counts are those of one device and one step.

    Compiles once, with unlimited memory, so that XLA does not rematerialize on its own.
    """
    compiled = compile_train_step(request, UNLIMITED)
    module = compiled.module
    hosts = HOSTS if request.hosts > 1 else ()
    return {
        "request": dataclasses.asdict(request),
        "device": request.gpu.title,
        "memory": memory_needs(request, compiled),
        "convolutions": module.convolutions(),
        "flops": module.flops(),
        "traffic": module.traffic(),
        "collectives": _collectives(module),
        "estimate": roofline(request, module),
        "model_of_hosts": [{"hosts": count, **roofline(request, module, count)} for count in hosts],
        "compile_seconds": compiled.seconds,
        "versions": figures.versions(),
    }


def _collectives(module: hlo.Module) -> list[dict[str, Any]]:
    """Adds up the collectives of each kind and number of devices: their count, their bytes, and how much overlaps."""
    totals: dict[tuple[str, int], dict[str, Any]] = {}
    for collective in module.collectives():
        total = totals.setdefault(
            (collective.kind, collective.group),
            {"count": 0, "bytes": {}, "overlapped_count": 0, "overlapped_bytes": 0},
        )
        size = collective.times * sum(collective.bytes.values())
        total["count"] += collective.times
        for dtype, moved in collective.bytes.items():
            total["bytes"][dtype] = total["bytes"].get(dtype, 0) + collective.times * moved
        total["overlapped_count"] += collective.times * collective.overlapped
        total["overlapped_bytes"] += size * collective.overlapped
    return [{"kind": kind, "group": group, **total} for (kind, group), total in totals.items()]


def roofline(request: Request, module: hlo.Module, hosts: int | None = None) -> dict[str, float]:
    """Returns the roofline of a step, in seconds: a lower bound at published peaks, not a prediction.

    Each instruction takes the longer of its products at the peak rate and its bytes at memory bandwidth. Collectives
    are rings: within a host over its links, between hosts over one network link a host, which its devices share. What
    overlaps costs the longer of computation and communication, what does not is added.

    Args:
        hosts: as many instead of the request's, with the same work on each device; beyond the compiled program, so a
            model of a model.
    """
    gpu = request.gpu
    compute = module.roofline(gpu.flops[request.precision], gpu.bandwidth)
    hosts = hosts or request.hosts
    overlapped, exposed = 0.0, 0.0
    for collective in module.collectives():
        seconds = collective.times * ring_seconds(collective, request, hosts)
        if collective.overlapped:
            overlapped += seconds
        else:
            exposed += seconds
    step = max(compute, overlapped) + exposed
    images = request.batch_per_device * request.devices * hosts
    return {
        "compute": compute,
        "overlapped": overlapped,
        "exposed": exposed,
        "step": step,
        "images_per_s": images / step,
    }


def ring_seconds(collective: hlo.Collective, request: Request, hosts: int) -> float:
    """Returns the seconds that a collective takes as a ring within each host and one between them.

    A ring of n moves (n - 1) / n of the collective's larger side through each link, an all-reduce twice that.
    """
    size = sum(collective.bytes.values()) * (2 if collective.kind == "all-reduce" else 1)
    members, hosts = _span(collective, request, hosts)
    inside = size * (members - 1) / members / request.gpu.link
    groups = request.devices / members  # that use the host's network at the same time
    return inside + groups * size * (hosts - 1) / hosts / (request.network_gbps * 1e9 / 8)


def _span(collective: hlo.Collective, request: Request, hosts: int) -> tuple[int, int]:
    """(devices of each host that take part together, hosts). Devices are numbered host by host, `fsdp` innermost."""
    devices = request.devices
    fsdp = sharding.parse_mesh(request.mesh, request.hosts * devices)
    if collective.group == request.hosts * devices:
        return devices, hosts
    if collective.kind == "all-reduce":  # over `data`: one device of each group of fsdp
        members = max(devices // fsdp, 1)
        return members, collective.group // members * hosts // request.hosts
    return min(collective.group, devices), max(collective.group // devices, 1)
