"""When a run's state is saved and in which of two ways, and what it is continued from."""

import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Any, Literal

from bit_jax.checkpoints.errors import CheckpointError
from bit_jax.checkpoints.local import LocalCopies
from bit_jax.checkpoints.shared import Checkpoints
from bit_jax.checkpoints.stored import StoredCheckpoints
from bit_jax.config import RunConfig
from bit_jax.scale import hosts
from input_pipeline.errors import RunFailed

Kind = Literal["shared", "local"]


def nothing(*_: Any) -> None:
    """The check that finds nothing wrong, and the like."""


class Saving:
    """Saves the state where that is due, for the loop, which asks after every step.

    Args:
        shared: the shared checkpoints.
        local: the local copies; None: there are none.
        every: steps between two shared checkpoints.
        minutes: minutes after a shared checkpoint after which another is due, too, by host 0's clock; None: never.
        local_every: steps between two local copies.
        disown: function that makes the run give up all of its local copies, also those on hosts that are away.
        clock: returns seconds.

    Attributes:
        check: function that is called with the state before each shared save, on all hosts. It raises RunFailed if the
            state must not be kept; then the local copies, which nobody has checked, are not used again either.
    """

    def __init__(
        self,
        shared: Checkpoints | StoredCheckpoints,
        local: LocalCopies | None = None,
        *,
        every: int,
        minutes: float | None = None,
        local_every: int | None = None,
        disown: Callable[[], None] = nothing,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.check: Callable[[Any], None] = nothing
        self._shared, self._local = shared, local
        self._every, self._minutes, self._local_every = every, minutes, local_every
        self._disown, self._clock, self._last = disown, clock, clock()
        self._from_local: int | None = None

    @classmethod
    def of(
        cls,
        flags: RunConfig,
        open_shared: Callable[[str, Callable[[], object]], Checkpoints | StoredCheckpoints],
        run: Callable[[], str],
        disown: Callable[[], None],
        progress: Callable[[], object] = nothing,
    ) -> "Saving":
        """Opens the places that the flags name. All hosts have to make this call.

        Args:
            open_shared: opens the shared checkpoints; it is given a text that only this start of the run has, the same
                on all hosts, and `progress`.
            run: returns a text that only this run has, if there are local copies.
            disown: function after which `run` returns another text, for all hosts.
            progress: function that is called, in any thread, whenever a part of the state is written.

        Raises:
            RequestError: a place cannot be used.
        """
        attempt = hosts.exchange("attempt", secrets.token_hex(4))[0]
        shared, local = open_shared(attempt, progress), None
        if flags.local_checkpoints is not None:
            local = LocalCopies(flags.local_checkpoints, run(), attempt, shared.complete, progress)
        intervals = {"minutes": flags.checkpoint_minutes, "local_every": flags.local_every}
        return cls(shared, local, every=flags.checkpoint_every, disown=disown, **intervals)

    # the start

    def start(self, shapes: Any) -> int:
        """Returns the step to continue from, 0 if nothing is saved. All hosts have to make this call.

        Args:
            shapes: shapes and dtypes of the state's arrays.
        """
        shared = self._shared.newest or 0
        self._from_local = self._local.newest(shapes, shared) if self._local else None
        return self._from_local or shared

    @property
    def origin(self) -> str:
        """Where the state of `start` lies, for the log; empty for shared checkpoints, where one expects it."""
        if self._from_local is None:
            return ""
        shared = self._shared.newest
        newest = f"the newest checkpoint is of step {shared}" if shared else "there is no checkpoint yet"
        return f", of which the hosts have local copies; {newest}"

    def restore(self, step: int, like: Any) -> Any:
        """Returns the state of that step, which `start` gave, lying as `like` says.

        Raises:
            CheckpointError: it cannot be read.
        """
        if self._local is not None and step == self._from_local:
            return self._local.restore(like)
        return self._shared.restore(step, like)

    # while the run goes on

    @property
    def wished(self) -> bool:
        """Whether this host wants a shared checkpoint: host 0 does after the given minutes. The hosts tell each other,
        so that all of them save after the same step."""
        return self._minutes is not None and hosts.is_first() and self._clock() - self._last >= 60 * self._minutes

    def due(self, step: int, wished: bool = False) -> Kind | None:
        """Returns what is due after the step: a shared checkpoint, which goes first, a local copy, or nothing.

        Args:
            step: number of the step.
            wished: whether the hosts know that one of them has `wished`.
        """
        if wished or step % self._every == 0:
            return "shared"
        return "local" if self._local and self._local_every and step % self._local_every == 0 else None

    def save(self, step: int, state: Any, wished: bool = False) -> None:
        """Saves the state after the step if that is due; for a shared checkpoint, that step has to be finished."""
        kind = self.due(step, wished)
        if kind == "shared":
            self._save_shared(state)
        elif kind == "local":
            assert self._local is not None
            self._local.save(step, state)

    def finish(self, step: int, state: Any) -> None:
        """Saves the state after the step, if that is not done, and returns once the checkpoint is whole. All hosts have
        to make this call. The local copies, which are older, are removed."""
        if step and step != self._shared.newest:
            self._save_shared(state)
        self._shared.close()
        if self._local is not None:
            hosts.wait_for_all("last checkpoint")  # host 0 finishes it
            self._local.remove()
            self._local.close()

    def _save_shared(self, state: Any) -> None:
        try:
            self.check(state)
        except RunFailed:
            if self._local is not None:
                self._disown()
                self._local.remove()
            with contextlib.suppress(CheckpointError):  # what the check has found is worse
                self._shared.close()  # the one that may still be written is what the run continues from
            raise
        self._shared.save(state)
        self._last = self._clock()
