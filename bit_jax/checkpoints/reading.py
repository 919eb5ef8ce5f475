"""Reads the checkpoints of a work directory, or of a directory that a store's work directory was copied to."""

from pathlib import Path
from typing import Any

from bit_jax.checkpoints import objects, shared
from bit_jax.stores.store import Store


def steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, the newest first."""
    return shared.complete_steps(workdir / objects.FOLDER) or objects.steps(Store(workdir))


def read(workdir: Path, step: int) -> dict[str, Any]:
    """Returns the state of a step as numpy arrays, whatever devices and hosts wrote it: a tree of dicts and lists that
    has `TrainState`'s attributes as keys. Nothing is moved or removed, so that a run may be writing beside it.

    Raises:
        CheckpointError: the checkpoint is damaged, cannot be read, or is of another step.
    """
    if step in shared.complete_steps(workdir / objects.FOLDER):
        return shared.read(workdir / objects.FOLDER, step)
    return objects.read(Store(workdir), step)
