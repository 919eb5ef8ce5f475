"""train.py whose first device loses a bit when the process gets SIGRTMIN, as a device with a broken memory would.

`benchmarks/chaos.py` runs it. The bit is one of the largest parameter, in this host's own copy alone, before the next
step.
"""

import dataclasses
import signal
import sys
import threading
from typing import Any

import jax
import numpy as np

from bit_jax import train
from bit_jax.training import finetuning, program
from input_pipeline.exits import exit_code

BIT = 1 << 9  # of a number's upper word of 32 bits: float64 changes in its fourth digit, float32 in its fifth

FLIP = signal.SIGRTMIN  # a signal that train.py does not use

asked = threading.Event()


def flipped(array: jax.Array) -> jax.Array:
    """Returns the array with one bit changed in the copy on this process's first device."""
    shards = [shard.data for shard in array.addressable_shards]
    words = np.array(shards[0])
    words.reshape(-1).view(np.uint32)[-1] ^= BIT
    shards[0] = jax.device_put(words, shards[0].sharding)
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def compile_program(steps: program.Steps, **more: Any) -> program.Program:
    """Compiles the program, with a training step that first flips the bit if that was asked for."""
    whole = program.compile_program(steps, **more)

    def train_step(state: Any, batch: Any) -> Any:
        if asked.is_set():
            asked.clear()
            leaves, structure = jax.tree.flatten(state.params)
            largest = max(range(len(leaves)), key=lambda place: leaves[place].size)
            leaves[largest] = flipped(leaves[largest])
            state = state.replace(params=jax.tree.unflatten(structure, leaves))
        return whole.train_step(state, batch)

    return dataclasses.replace(whole, train_step=train_step)


if __name__ == "__main__":
    signal.signal(FLIP, lambda *_: asked.set())
    finetuning.compile_program = compile_program
    sys.exit(exit_code(train.main))
