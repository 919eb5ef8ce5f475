"""Save and restore the training state, atomically and in the background. The only file that knows Orbax."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from orbax.checkpoint import v1 as orbax

from bit_jax.errors import RequestError


class CheckpointError(RequestError):
    """A checkpoint cannot be written, or is not what was written."""


class Checkpoints:
    """The newest few training states of a run, by step.

    Saving copies the state off the devices and returns; writing goes on behind. A checkpoint appears under its name
    only when it is whole, so a run killed at any moment finds its last whole one.
    """

    def __init__(self, directory: Path, *, keep: int):
        self._directory = directory
        try:
            self._checkpointer = orbax.training.Checkpointer(
                directory.absolute(),
                preservation_policy=orbax.training.preservation_policies.LatestN(n=keep),
                cleanup_tmp_directories=True,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot use {directory} for checkpoints: {_cause(error)}") from None
        self._fingerprint = jax.jit(fingerprint)

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: Any) -> None:
        """Starts saving; waits for the save before, and raises CheckpointError if that one failed."""
        self.wait()
        metadata = {"fingerprint": jax.device_get(self._fingerprint(state)).tolist()}
        with _writing(self._directory):
            self._checkpointer.save_async(int(state.step), state, force=True, custom_metadata=metadata)

    def wait(self) -> None:
        """Returns once everything is written."""
        with _writing(self._directory):
            self._checkpointer.wait()

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of that step, laid out as `abstract_state` says (shapes, dtypes and shardings).

        Raises:
            CheckpointError: it cannot be read, or differs in a single bit from what was saved.
        """
        path = self._directory / str(step)
        remedy = "delete that folder to continue from the checkpoint before it, or from the start"
        try:
            state = self._checkpointer.load(step, abstract_state)
            saved = self._checkpointer.checkpointables_metadata(step).custom_metadata["fingerprint"]
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise CheckpointError(f"checkpoint {path} is damaged ({_cause(error)}); {remedy}") from None
        if jax.device_get(self._fingerprint(state)).tolist() != saved:
            raise CheckpointError(f"checkpoint {path} is not what was saved (fingerprints differ); {remedy}")
        return state

    def close(self) -> None:
        with _writing(self._directory):
            self._checkpointer.close()


def fingerprint(tree: Any) -> jax.Array:
    """uint32 [leaves]: a position-weighted sum of each leaf's 32-bit words, modulo 2**32.

    Whole-number sums do not depend on order, so every mesh computes the same; the weights are odd, so that no change of
    a single word goes unseen.
    """

    def of_leaf(leaf: jax.Array) -> jax.Array:
        words = lax.bitcast_convert_type(leaf, jnp.uint32).reshape(-1)
        weights = lax.iota(jnp.uint32, words.size) * jnp.uint32(2) + jnp.uint32(1)
        return (words * weights).sum(dtype=jnp.uint32)

    return jnp.stack([of_leaf(leaf) for leaf in jax.tree.leaves(tree)])


class _writing:
    """Turns whatever Orbax and TensorStore raise while writing into a CheckpointError."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception):
            raise CheckpointError(
                f"cannot write a checkpoint to {self._directory}: {_cause(error)}; free space or mend the folder, "
                "then start again to continue from the last whole one"
            ) from None


def _cause(error: Exception) -> str:
    """The last clause of the innermost error's first line: TensorStore puts the operating system's word there."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
