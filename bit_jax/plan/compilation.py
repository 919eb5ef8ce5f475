"""Compiles the train step of `train.py` for GPUs that are not here, and reads the memory that it needs on each."""

import dataclasses
import math
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from bit_jax.compiled import hlo, memory
from bit_jax.model.precision import PRECISIONS
from bit_jax.plan.request import Request
from bit_jax.scale import sharding
from bit_jax.training.program import Steps, make_steps
from bit_jax.training.target import Target
from input_pipeline.errors import RequestError

POOL = 0.9  # of a device's memory is XLA's (train.py asks for it); the rest is the CUDA context's and NCCL's
UNLIMITED = 2**50  # bytes of memory, with which XLA does not rematerialize


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A train step's executable: its program, and what it needs on each device."""

    module: hlo.Module
    peak: int  # bytes on a device, arguments included
    parameters: int  # bytes on a device
    optimizer: int  # bytes on a device
    seconds: float  # that tracing and compiling took


def compile_train_step(request: Request, memory: int) -> Compiled:
    """Compiles the train step for GPUs that have this many bytes of memory, or `UNLIMITED`."""
    start = time.perf_counter()
    steps = steps_on_gpus(request, memory)
    executable = steps.lower_train_step().compile(compiler_options=steps.target.compiler_options)
    analysis: Any = executable.memory_analysis()
    return Compiled(
        module=hlo.Module(executable.as_text() or ""),
        peak=analysis.peak_memory_in_bytes,
        parameters=_bytes_on_a_device(steps.state.params),
        optimizer=_bytes_on_a_device(steps.state.opt_state),
        seconds=time.perf_counter() - start,
    )


def steps_on_gpus(request: Request, memory: int) -> Steps:
    """Makes the steps of `train.py` for GPUs that have this many bytes of memory.

    Raises:
        RequestError: XLA's compiler for GPUs is not installed, or the mesh or batch does not fit the devices.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=request.gpu.target(memory),
            topology=f"1x{request.hosts}x{request.devices}",
        )
    except Exception as error:  # the plugin raises many kinds
        raise RequestError(
            f"XLA's compiler for NVIDIA GPUs cannot be used ({str(error).splitlines()[0]}); pip install 'bit-jax[plan]'"
        ) from None
    fsdp = sharding.parse_mesh(request.mesh, len(topology.devices))
    return steps_on(request, sharding.make_mesh(topology.devices, fsdp=fsdp))


def steps_on(request: Request, mesh: Mesh) -> Steps:
    """Makes the steps of `train.py` for these devices, whatever they are.

    Raises:
        RequestError: the batch does not fit the devices.
    """
    cfg = request.config()
    global_batch = sharding.global_batch_size(
        mesh, global_batch=0, batch_per_device=request.batch_per_device, microbatches=request.microbatches
    )
    return make_steps(
        Target(mesh, PRECISIONS[request.precision], request.remat, request.microbatches),
        request.architecture(),
        request.recipe(),
        momentum=cfg.optimizer.momentum,
        seed=cfg.run.seed,
        global_batch=global_batch,
    )


def memory_needs(request: Request, compiled: Compiled) -> dict[str, Any]:
    """Returns parameters, optimizer, peak, workspace, pool and outside_pool, in bytes of one device, and `fits`."""
    workspace, pool = memory.workspace(compiled.module), int(POOL * request.gpu.memory)
    return {
        "parameters": compiled.parameters,
        "optimizer": compiled.optimizer,
        "peak": compiled.peak,
        "workspace": workspace,
        "pool": pool,
        "outside_pool": request.gpu.memory - pool,
        "fits": compiled.peak + workspace <= pool,
    }


def _bytes_on_a_device(tree: Any) -> int:
    def size(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
