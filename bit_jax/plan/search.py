"""Searches for the largest batch that fits on a device, by compiling."""

import dataclasses
from typing import Any, get_args

from rich.console import Console

from bit_jax.compiled.gpus import GIB
from bit_jax.model.architecture import Remat
from bit_jax.plan.compilation import UNLIMITED, compile_train_step, memory_needs
from bit_jax.plan.request import Request


def search(request: Request, console: Console) -> list[dict[str, Any]]:
    """Finds `largest_batch` for each `--remat`, beginning with the one that computes least again."""
    return [largest_batch(dataclasses.replace(request, remat=remat), console) for remat in get_args(Remat)]


def largest_batch(request: Request, console: Console) -> dict[str, Any]:
    """Returns {remat, largest_batch, memory: of that batch}; where none fits, 0 and the memory of the smallest.

    Memory grows by a constant amount an image, so two compilations predict the largest batch; compiling that and its
    neighbours settles it.
    """
    compiled: dict[int, dict[str, Any]] = {}  # batch a device -> its memory

    def lacks(batch: int) -> int:
        """Returns how many bytes the batch needs beyond what there is; at 0 or less it fits."""
        if batch not in compiled:
            candidate = dataclasses.replace(request, batch_per_device=batch)
            compiled[batch] = memory_needs(candidate, compile_train_step(candidate, UNLIMITED))
            used = compiled[batch]["peak"] + compiled[batch]["workspace"]
            console.print(f"--remat {request.remat}, {batch} a device: {used / GIB:.2f} GiB")
        memory = compiled[batch]
        return memory["peak"] + memory["workspace"] - memory["pool"]

    unit = 2 * request.microbatches  # mixup wants an even number
    low, high = unit, 4 * unit
    if lacks(low) > 0:
        return {"remat": request.remat, "largest_batch": 0, "memory": compiled[low]}
    while True:
        an_image = (lacks(high) - lacks(low)) / (high - low)
        guess = max(unit, int(low - lacks(low) / an_image) // unit * unit)
        if guess in (low, high) or guess in compiled:
            break
        low, high = (high, guess) if guess > high else (low, guess)
    while lacks(guess) > 0:
        guess -= unit
    while lacks(guess + unit) <= 0:
        guess += unit
    return {"remat": request.remat, "largest_batch": guess, "memory": compiled[guess]}
