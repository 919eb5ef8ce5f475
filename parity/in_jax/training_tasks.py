"""The tasks of the ladder in JAX that train, made of the functions that train.py is made of: gradients, one update, and
a curve of steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bit_jax.config import Additions
from bit_jax.formats import weights
from bit_jax.model import resnetv2
from bit_jax.model.architecture import Architecture, HeadAlone
from bit_jax.scale import sharding
from bit_jax.training import optimizer, program, steps
from bit_jax.training.hyperrule import Schedule
from bit_jax.training.trained import trained
from parity.in_jax.probe import Probe
from parity.in_jax.tasks import Added, JaxSide, added_to
from parity.in_jax.training import Training, same
from parity.sides.tasks import Disturb, Result

# the momentum and the average that the optimizer rung starts from, as shares of the parameters
MOMENTUM_FROM_PARAMS, EMA_FROM_PARAMS = 0.1, 0.8


class TrainingJax(JaxSide):
    """A `JaxSide` with the tasks that train."""

    def gradients(
        self,
        mixed: str,
        count: int,
        disturb: Disturb | None = None,
        scale: float = steps.FIRST_SCALE,
        additions: Added = None,
    ) -> Result:
        """Returns the gradient by every parameter that trains of each batch's mean loss, and {"overflows": number of
        batches with gradients that are not finite}. In float16 the loss is multiplied by `scale` and its gradients are
        divided by it."""
        model, params = self.model()
        params, shown, _ = self._trained_alone(model, self._disturbed_params(params, disturb))
        microbatches, added = self.side.microbatches, added_to(additions)

        def gradients(params, images, targets, scale):
            return steps.loss_and_gradients(model, params, images, targets, microbatches, scale, added)[1]

        compute = self._jit_once("gradients", added, gradients)
        loss_scale = jnp.float32(scale) if self.precision.scales_loss else None
        saved, overflows = {}, 0
        for number in range(count):
            images, targets = self._mixed(mixed, number, disturb)
            named = self._named(compute(params, shown(images), targets, loss_scale), f"{number}/")
            saved |= named
            overflows += not all(np.isfinite(array).all() for array in named.values())
            self.progress(number + 1, count)
        return {"overflows": overflows}, saved

    def optimizer(
        self,
        gradients: str,
        schedule: dict,
        momentum: float,
        step: int,
        start: str | None = None,
        additions: Added = None,
    ) -> Result:
        """Returns parameters, momentum and average, if one is kept, after update number `step` with the first batch's
        gradients. The momentum and the average before it are those of the file `start`, or `MOMENTUM_FROM_PARAMS` and
        `EMA_FROM_PARAMS` times the parameters, so that neither is zero or the parameters themselves."""
        _, params = self.model()
        added = added_to(additions)
        sgd = optimizer.sgd(_schedule(schedule), momentum, added)

        def update(params: Any, held: dict[str, Any], gradients: Any) -> steps.TrainState:
            state = _advanced(steps.init_state(params, sgd), held, jnp.asarray(step, jnp.int32))
            return steps.update(state, gradients, sgd)

        if start is None:
            own = trained(params, added.train)
            shares = {"trace": MOMENTUM_FROM_PARAMS} | ({} if added.ema is None else {"ema": EMA_FROM_PARAMS})
            held = {name: jax.tree.map(lambda leaf, share=share: share * leaf, own) for name, share in shares.items()}
        else:
            held = self._held(start, added)
        state = jax.jit(update)(params, held, self._read(gradients, "0/"))
        return None, self._named(state.params, "params/") | self._state(state)

    def curve(
        self,
        mixed: str,
        count: int,
        schedule: dict,
        momentum: float,
        disturb: Disturb | None = None,
        scale: float = steps.FIRST_SCALE,
        start: str | None = None,
        step: int = 0,
        additions: Added = None,
    ) -> Result:
        """Returns the loss of each of `count` training steps on the file's batches, the parameters and the average, if
        one is kept, after them, and {"overflows": number of skipped steps}. In float16 a `LossScale` scales the loss,
        by `scale` at first.

        With `start`, a file of the state after `step` steps, training goes on from there, and the momentum after the
        steps is returned too. A disturbance is then of the parameters that each step's gradients are taken at, and not
        of the state; it is the same in all steps, because parameters that hardly change are rounded alike.
        """
        if start is None:
            training = self.training(schedule, momentum, disturb=disturb, additions=additions)
        else:
            training = self._training_from(start, step, schedule, momentum, additions, disturbed=disturb is not None)
        loss_scale = training.state.loss_scale
        if loss_scale is not None:
            training.state = training.state.replace(loss_scale=loss_scale.replace(scale=jnp.float32(scale)))
        losses = []
        for number in range(count):
            images, targets = self._mixed(mixed, number, disturb)
            batch = training.shown(images), targets
            if start is not None and disturb is not None:
                batch = *batch, self._disturbed_params(training.state.params, disturb)
            training(*batch)
            losses.append(np.asarray(training.metrics["loss"]))
            self.progress(number + 1, count)
        state = training.state
        overflows = 0 if state.loss_scale is None else int(state.loss_scale.skipped)
        ended = self._named(training.whole(state.params), "params/")
        ended |= self._state(state, momentum=start is not None)
        return {"overflows": overflows}, {"losses": np.stack(losses)} | ended

    def training(
        self,
        schedule: dict[str, Any],
        momentum: float,
        *,
        mixup: float | None = None,
        disturb: Disturb | None = None,
        additions: Added = None,
    ) -> Training:
        """Prepares training from the weight file's parameters. Steps donate their buffers, so the next task reads the
        file again.

        Args:
            schedule: fields of a `Schedule`.
            momentum: momentum of SGD.
            mixup: alpha of mixup for steps that take the loader's batches, as in train.py; None for steps that take
                images and targets that are already mixed.
            disturb: disturbance of the parameters, see `inputs.disturbance`.
            additions: fields of `Additions`.
        """
        model, params = self.model()
        params = self._disturbed_params(params, disturb)
        self._loaded = {}
        added = added_to(additions)
        sgd = optimizer.sgd(_schedule(schedule), momentum, added)
        settings: dict[str, Any] = {"microbatches": self.side.microbatches, "additions": added}
        params, shown, whole = self._trained_alone(model, params)
        if mixup is None:
            step = steps.make_update_step(model, sgd, **settings)
        else:
            step = steps.make_train_step(model, sgd, mixup=mixup, seed=0, **settings)
        return Training(step, self._initial_state(model, params, sgd), self.target, shown, whole)

    def _trained_alone(self, model: resnetv2.ResNetV2, params: Any) -> tuple[Any, Callable, Callable]:
        """Returns the parameters that the state has, and two functions: of images, which returns what a step takes for
        them; and of such parameters, which returns those of the whole model. Only `probe` makes a difference."""
        if not self.side.probe:
            return params, same, same
        probe = Probe(model, params, self._jit)
        return probe.head, probe.features, probe.whole

    def _training_from(
        self, start: str, step: int, schedule: dict[str, Any], momentum: float, additions: Added, *, disturbed: bool
    ) -> "Training":
        """Prepares training from the file of the state after `step` steps.

        Args:
            disturbed: whether a step takes the parameters that its gradients are taken at after images and targets.
        """
        model, _ = self.model()
        added, microbatches = added_to(additions), self.side.microbatches
        sgd = optimizer.sgd(_schedule(schedule), momentum, added)

        def elsewhere(state: steps.TrainState, images: Any, targets: Any, params: Any) -> tuple[steps.TrainState, dict]:
            loss, gradients = steps.loss_and_gradients(model, params, images, targets, microbatches, additions=added)
            return steps.update_if_finite(state, loss, gradients, sgd), {"loss": loss}

        usual = steps.make_update_step(model, sgd, microbatches=microbatches, additions=added)
        update_step = elsewhere if disturbed else usual
        state = self._initial_state(model, self._read(start, "params/"), sgd)
        count = jax.device_put(jnp.asarray(step, jnp.int32), sharding.replicated(self.mesh))
        return Training(update_step, _advanced(state, self._held(start, added), count), self.target)

    def _initial_state(self, model: resnetv2.ResNetV2, params: Any, sgd: Any) -> steps.TrainState:
        architecture = (HeadAlone if self.side.probe else Architecture).of(model)
        scales_loss = self.precision.scales_loss
        like = program.abstract_state(architecture, self.dtype, sgd, self.mesh, scales_loss=scales_loss)
        return program.initial_state(params, sgd, like)

    def _read(self, path: str, prefix: str) -> Any:
        """Reads the parameters, or what else there is one of for each, whose names begin with the prefix."""
        with np.load(path) as file:
            named = {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}
        return weights.unflatten({key: self._param(array) for key, array in named.items()})

    def _held(self, start: str, additions: Additions) -> dict[str, Any]:
        """Reads a state's momentum and its average, if one is kept, under the names that they have in `opt_state`."""
        averages = {} if additions.ema is None else {"ema": self._read(start, "ema/")}
        return {"trace": self._read(start, "momentum/")} | averages

    def _state(self, state: steps.TrainState, *, momentum: bool = True) -> dict[str, np.ndarray]:
        """Returns the momentum, if that is asked for, and the average, if one is kept, of the parameters that train."""
        tree_get = optax.tree_utils.tree_get
        named = self._named(tree_get(state.opt_state, "trace"), "momentum/") if momentum else {}
        average = tree_get(state.opt_state, "ema")
        return named | ({} if average is None else self._named(average, "ema/"))


def _advanced(state: steps.TrainState, held: dict[str, Any], count: jax.Array) -> steps.TrainState:
    """Returns the state after that many steps, with that momentum and average; see `JaxSide._held`."""
    # the optimizer's count is a copy, because a step that uses up its state cannot use up one array twice
    opt_state: Any = optax.tree_utils.tree_set(state.opt_state, **held, count=jnp.array(count))
    return state.replace(step=count, opt_state=opt_state)


def _schedule(fields: dict[str, Any]) -> Schedule:
    fields = fields | {"decay_steps": tuple(fields["decay_steps"])}
    return Schedule(**fields)
