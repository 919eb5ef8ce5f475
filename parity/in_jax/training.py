"""Training steps that are taken one by one."""

from collections.abc import Callable
from typing import Any

import jax

from bit_jax.training import program
from bit_jax.training.target import Target


def same(given: Any) -> Any:
    """Returns what it is given."""
    return given


class Training:
    """Training steps: each call takes one and returns when it has finished.

    The first call compiles the step. If the target is tuned, it does so as train.py does, and gives the state the
    layout that the compiled step wants.

    Attributes:
        state: the state after the last step.
        metrics: metrics of the last step.
        shown: function of images that returns what a step takes for them.
        whole: function of the state's parameters that returns those of the whole model.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, Any]],
        state: Any,
        target: Target,
        shown: Callable[[Any], Any] = same,
        whole: Callable[[Any], Any] = same,
    ):
        self.state, self.metrics = state, {}
        self.shown, self.whole = shown, whole
        self._step, self._target = step, target
        self._compiled: Callable[..., tuple[Any, Any]] | None = None

    def __call__(self, *batch: Any) -> None:
        if self._compiled is None:
            self._compiled = self._compile(*batch)
        # as in train.py's loop, the reference to the old state is dropped while the devices work
        self.state, self.metrics = self._compiled(self.state, *batch)
        jax.block_until_ready((self.state, self.metrics))

    def lower(self, *batch: Any) -> jax.stages.Lowered:
        """Lowers the step for the state and a batch, without computing anything."""
        return program.lower_step(self._step, self.state, *batch)

    def _compile(self, *batch: Any) -> Callable[..., tuple[Any, Any]]:
        if not self._target.tuned:
            return jax.jit(self._step, donate_argnums=0)
        compiled = self.lower(*batch).compile(compiler_options=self._target.compiler_options)
        self.state = jax.device_put(self.state, compiled.input_formats[0][0], donate=True)
        return compiled
