"""What a measurement would take: memory and time of its training steps, by `plan`, or the work of its evaluation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from bit_jax import evaluate
from bit_jax.compiled.gpus import GIB, accelerator
from bit_jax.formats import weights
from bit_jax.formats.described import Description, described
from bit_jax.model.architecture import Architecture
from bit_jax.plan.estimate import demands
from bit_jax.plan.request import IMAGENET_AREA
from bit_jax.published import locate
from bit_jax.published.catalogue import PublishedFile
from bit_jax.reproductions.records import Figure
from input_pipeline.errors import RequestError

HOUR = 3600


def takes(figure: Figure, request: evaluate.Request | None, device: str) -> tuple[dict[str, Any], list[str]]:
    """Returns what the measurement takes, for JSON and in sentences. Nothing is fetched or run.

    Args:
        request: what `evaluate` is asked for; None for training.
        device: the GPU's name, as `plan` has it.

    Raises:
        RequestError: the GPU is not known, or XLA's compiler for GPUs is not installed, which a training step needs.
    """
    return _training(figure, device) if request is None else _evaluation(figure, request, device)


def _evaluation(figure: Figure, request: evaluate.Request, device: str) -> tuple[dict[str, Any], list[str]]:
    gpu = accelerator(device)
    if request.precision not in gpu.flops:
        raise RequestError(f"--precision {request.precision} is not planned for; there are {', '.join(gpu.flops)}")
    place = locate.resolve(request.weights)
    if isinstance(place, PublishedFile):
        architecture, known = place.promised, Description()
    else:
        architecture, known = weights.read(place)[0], described(place)
    side = request.view.side(known, lambda: IMAGENET_AREA)
    flops = forward_flops(architecture, side)
    parameters = sum(4 * math.prod(shape) for shape in architecture.layout.values())
    seconds = flops * figure.examples / gpu.flops[request.precision]
    work = {
        "device": gpu.title,
        "precision": request.precision,
        "weights_bytes": parameters,
        "images": figure.examples,
        "size": side,
        "forward_flops": flops,
        "seconds_at_peak": seconds,
    }
    return work, [
        f"Weights of {parameters / 1e6:,.0f} MB, and {figure.examples:,} images of {side}x{side} pixels.",
        f"{flops / 1e9:,.1f} GFLOP an image by XLA's count, so at least {_duration(seconds)} on one {gpu.title} in "
        f"{request.precision}: its published peak, which no program reaches. Reading and decoding may take longer.",
    ]


def forward_flops(architecture: Architecture, side: int) -> float:
    """Returns the floating-point operations of a forward pass for one image of so many pixels a side, by XLA's count
    before it optimizes. Traces the model; compiles nothing."""
    model = architecture.model(jnp.float32)
    params = jax.eval_shape(lambda: model.init_params(0))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    lowered = jax.jit(lambda params, image: model.apply({"params": params}, image)).lower(params, image)
    analysis: Any = lowered.cost_analysis()
    return float(analysis["flops"])


def _training(figure: Figure, device: str) -> tuple[dict[str, Any], list[str]]:
    if figure.plan is None:
        return {}, ["A minute or two on two CPU cores; nothing has to be planned."]
    request = dataclasses.replace(figure.plan, device=device)
    request.check()
    planned = demands(request)
    memory, step = planned["memory"], planned["estimate"]["step"]
    seconds = step * figure.steps * len(figure.seeds)
    fits = "fits" if memory["fits"] else "does not fit"
    runs = "" if len(figure.seeds) == 1 else f" of each of {len(figure.seeds)} runs"
    sentences = [
        f"On {request.hosts}x{request.devices} {planned['device']} in {request.precision}, {request.batch_per_device} "
        f"images a GPU in {request.microbatches} pass(es): a peak of {memory['peak'] / GIB:.1f} GiB, which {fits}.",
        f"{figure.steps:,} steps{runs} of at least {step * 1e3:,.0f} ms: at least {_duration(seconds)}, by a roofline "
        "at published peaks, without evaluations and without waiting for input.",
    ]
    return {"plan": planned, "steps": figure.steps, "seconds_at_peak": seconds}, sentences


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} minutes" if seconds < 2 * HOUR else f"{seconds / HOUR:,.1f} hours"
