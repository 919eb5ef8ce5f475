"""The tasks of the ladder in JAX, made of the very functions that training, evaluation and loading are made of.

Every task returns (what it says, {name: array} or None). Arrays are in the checkpoint's layout: images NHWC, kernels
HWIO, names as the file's keys.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import input_pipeline
from bit_jax.model import layers, resnetv2, weights
from bit_jax.model.architecture import Architecture
from bit_jax.model.precision import choose, products
from bit_jax.scale import sharding
from bit_jax.training import figures, optimizer, program, steps
from bit_jax.training.hyperrule import Schedule
from bit_jax.training.target import Target
from input_pipeline.errors import RequestError
from input_pipeline.examples import Subset
from parity import faults
from parity.sides import inputs
from parity.sides.classes import open_labelled
from parity.sides.fingerprint import fingerprint
from parity.sides.inputs import Files
from parity.sides.side import Side
from parity.sides.tasks import Disturb, Result

MOMENTUM_FROM_PARAMS = 0.1  # the momentum that the optimizer rung starts from, as a share of the parameters


class JaxSide:
    def __init__(self, side: Side, precision: str, weight_file: str, progress: Callable[[int, int], None]):
        self.precision = choose(precision)
        self.side, self.weight_file, self.progress = side, weight_file, progress
        if len(jax.devices()) < side.devices:
            found = len(jax.devices())
            raise RequestError(f"{side} needs {side.devices} devices, and JAX finds {found}; take fewer")
        self.mesh = sharding.make_mesh(jax.devices()[: side.devices], fsdp=side.fsdp)
        self.target = Target(self.mesh, self.precision, side.remat, side.microbatches, tuned=side.tuned)
        self.dtype = self.target.param_dtype
        self._loaded: dict[str | None, Any] = {}
        self._fault: str | None = None

    def injected(self, fault: str | None) -> AbstractContextManager[None]:
        self._fault = fault
        return faults.injected(fault)

    def model(self) -> tuple[resnetv2.ResNetV2, Any]:
        """The model and its parameters where they belong on the mesh."""
        if self._fault not in self._loaded:
            architecture, arrays = weights.read(self.weight_file)
            placed = {key: self._param(array) for key, array in arrays}
            model = self.target.model(architecture)
            self._loaded = {self._fault: (model, weights.unflatten(placed))}
        return self._loaded[self._fault]

    def _jit(self, function: Callable, **how: Any) -> Callable:
        return jax.jit(function, compiler_options=self.target.compiler_options, **how)

    def attest(self, images: str, dataset: Sequence[Any] = ()) -> Result:
        model, params = self.model()
        architecture = Architecture(model.units, model.width, model.num_classes)
        matrix, convolution = products(self.precision)
        device = self.mesh.devices.flat[0]
        return {
            "framework": "jax",
            "versions": figures.versions(),
            "device": f"{device.platform}: {device.device_kind}",
            "topology": {"devices": self.side.devices, "fsdp": self.side.fsdp, "microbatches": self.side.microbatches},
            "precision": self.precision.name,
            "matrix products": matrix,
            "convolution products": convolution,
            "group norm eps": layers.NORM_EPS,
            "standardization eps": layers.STANDARDIZE_EPS,
            "groups": layers.GROUPS,
            "layout": "activations NHWC, kernels HWIO",
            "settings": {
                "jax_default_matmul_precision": str(jax.config.values["jax_default_matmul_precision"]),
                "product precision": str(self.precision.product),
                "jax_enable_x64": bool(jax.config.read("jax_enable_x64")),
            },
            "architecture": f"{architecture.name}, {architecture.num_classes:,} classes",
            "weights sha256": fingerprint(self._named(params)),
            "pictures sha256": fingerprint({"images": np.load(images)["image"]}),
        } | inputs.described(dataset), None

    def products(self) -> Result:
        """What a matrix product and a convolution multiply with."""
        return products(self.precision), None

    def weights(self) -> Result:
        return None, self._named(self.model()[1])

    def pixels(self, files: Sequence[str], resize: int, crop: int, epochs: int, seed: int, draws: list[Any]) -> Result:
        source = Files(files)
        views = input_pipeline.Views(resize, crop, flip=True)
        loader = input_pipeline.Loader(source, views, global_batch=len(source), seed=seed)
        saved = {}
        for _number, batch in loader.evaluation():
            saved |= self._views("evaluation", source, batch)
        for epoch, batch in loader.train(0, epochs):
            saved |= self._views(f"train, epoch {epoch}", source, batch)
        return None, saved

    def forward(self, images: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Every unit's output; with a `teacher` file, of units that are each given the teacher's input."""
        model, params = self.model()
        given = None
        if teacher is not None:
            with np.load(teacher) as file:
                given = {site: self._rows(file[site]) for site in file.files}
        seen = model.clone(remat="none")  # it decides what backward passes keep; units within it cannot be looked at
        apply = self._jit(lambda params, images, given: record_units(seen, params, images, given))
        batch = self._disturbed(self._images(np.load(images)["image"][0]), "images", disturb)
        outputs = apply(self._disturbed_params(params, disturb), batch, given)
        # files know no bfloat16
        return None, {site: np.asarray(output, self.dtype) for site, output in outputs.items()}

    def mix(self, batches: str) -> Result:
        """Every batch after normalization and mixup, by the given weights."""
        model, _ = self.model()
        mix = jax.jit(lambda batch, weight: steps.prepare(batch, model.num_classes, self.dtype, weight))
        saved = {}
        with np.load(batches) as file:
            image, label, weight = file["image"], file["label"], file["weight"]
        for number in range(len(label)):
            batch = sharding.shard_batch({"image": image[number], "label": label[number]}, self.mesh)
            images, targets = mix(batch, jnp.asarray(weight[number], self.dtype))
            saved |= {f"images/{number}": np.asarray(images), f"targets/{number}": np.asarray(targets)}
        return None, saved

    def loss(self, mixed: str, disturb: Disturb | None = None) -> Result:
        model, params = self.model()
        images, targets = self._mixed(mixed, 0, disturb)

        def losses(params, images, targets):
            rows = steps.cross_entropy(steps.apply_model(model, params, images), targets)
            mean, _ = steps.loss_and_gradients(model, params, images, targets, self.side.microbatches)
            return {"loss of each row": rows, "mean loss": mean}

        return None, _arrays(self._jit(losses)(self._disturbed_params(params, disturb), images, targets))

    def gradients(
        self, mixed: str, count: int, disturb: Disturb | None = None, scale: float = steps.FIRST_SCALE
    ) -> Result:
        """Gradients of the mean loss by every parameter, for each of `count` batches. In float16 the loss is multiplied
        by `scale` and its gradients are divided by it; the answer says how many batches' gradients are not finite."""
        model, params = self.model()
        params = self._disturbed_params(params, disturb)
        gradients = self._jit(lambda *given: self._loss_and_gradients(model, *given)[1])
        loss_scale = jnp.float32(scale) if self.precision.scales_loss else None
        saved, overflows = {}, 0
        for number in range(count):
            named = self._named(gradients(params, *self._mixed(mixed, number, disturb), loss_scale), f"{number}/")
            saved |= named
            overflows += not all(np.isfinite(array).all() for array in named.values())
            self.progress(number + 1, count)
        return {"overflows": overflows}, saved

    def optimizer(self, gradients: str, schedule: dict, momentum: float, step: int) -> Result:
        """Parameters and momentum after update number `step` with the first of the given gradients; the momentum
        before it is not zero."""
        _, params = self.model()
        sgd = optimizer.sgd(_schedule(schedule), momentum)

        def update(params: Any, gradients: Any) -> steps.TrainState:
            state = steps.init_state(params, sgd)
            trace = jax.tree.map(lambda leaf: MOMENTUM_FROM_PARAMS * leaf, params)
            count = jnp.asarray(step, jnp.int32)
            opt_state: Any = optax.tree_utils.tree_set(state.opt_state, trace=trace, count=count)
            return steps.update(state.replace(step=count, opt_state=opt_state), gradients, sgd)

        with np.load(gradients) as file:
            given = weights.unflatten({key: self._param(file[f"0/{key}"]) for key in weights.flatten(params)})
        state = jax.jit(update)(params, given)
        after = optax.tree_utils.tree_get(state.opt_state, "trace")
        return None, self._named(state.params, "params/") | self._named(after, "momentum/")

    def curve(
        self,
        mixed: str,
        count: int,
        schedule: dict,
        momentum: float,
        disturb: Disturb | None = None,
        scale: float = steps.FIRST_SCALE,
    ) -> Result:
        """The loss of each of `count` steps on the replayed batches, and the parameters after them; in float16 with a
        `LossScale`, from `scale` on. Says how many steps it skipped."""
        training = self.training(schedule, momentum, disturb=disturb)
        loss_scale = training.state.loss_scale
        if loss_scale is not None:
            training.state = training.state.replace(loss_scale=loss_scale.replace(scale=jnp.float32(scale)))
        losses = []
        for number in range(count):
            training(*self._mixed(mixed, number, disturb))
            losses.append(np.asarray(training.metrics["loss"]))
            self.progress(number + 1, count)
        state = training.state
        overflows = 0 if state.loss_scale is None else int(state.loss_scale.skipped)
        return {"overflows": overflows}, {"losses": np.stack(losses)} | self._named(state.params, "params/")

    def training(
        self, schedule: dict[str, Any], momentum: float, *, mixup: float | None = None, disturb: Disturb | None = None
    ) -> "Training":
        """Training from the weight file's parameters, which steps use up: the next task reads them anew.

        Args:
            schedule: fields of a `Schedule`.
            momentum: of SGD.
            mixup: alpha, where steps are to take the loader's batches, as in train.py; None: they take images and
                targets that are mixed already.
            disturb: see `inputs.disturbance`.
        """
        model, params = self.model()
        params = self._disturbed_params(params, disturb)
        self._loaded = {}
        sgd, microbatches = optimizer.sgd(_schedule(schedule), momentum), self.side.microbatches
        if mixup is None:
            step = steps.make_update_step(model, sgd, microbatches=microbatches)
        else:
            step = steps.make_train_step(model, sgd, mixup=mixup, seed=0, microbatches=microbatches)
        architecture = Architecture(model.units, model.width, model.num_classes)
        scales_loss = self.precision.scales_loss
        like = program.abstract_state(architecture, self.dtype, sgd, self.mesh, scales_loss=scales_loss)
        return Training(step, program.initial_state(params, sgd, like), self.target)

    def accuracy(
        self,
        dataset: str,
        split: str,
        data_dir: str | None,
        class_names: Sequence[str] | None,
        size: int,
        batch: int,
        limit: int | None,
    ) -> Result:
        """Logits, label and id of every example that evaluation counts, and evaluation's own sums."""
        model, params = self.model()
        source = open_labelled(dataset, split, data_dir, class_names)
        if limit is not None:
            source = Subset(source, np.arange(min(limit, len(source))), f"{source.name} (first {limit})")
        views = input_pipeline.Views(size, size, flip=False)
        loader = input_pipeline.Loader(
            source, views, batch, place=lambda rows: (rows, sharding.shard_batch(rows, self.mesh))
        )

        @self._jit
        def evaluate(params, batch):
            logits = steps.apply_model(model, params, steps.normalize(batch["image"], self.dtype))
            return logits, steps.evaluation_sums(logits, batch)

        totals: dict[str, Any] = dict.fromkeys(("loss", "correct1", "correct5", "seen"), 0)
        logits, labels, indices = [], [], []
        for number, (rows, placed) in loader.evaluation():
            computed, sums = evaluate(params, placed)
            totals = {name: total + sums[name].item() for name, total in totals.items()}
            logits.append(np.asarray(computed)[rows["mask"]])
            labels.append(rows["label"][rows["mask"]])
            indices.append(rows["index"][rows["mask"]])
            self.progress(min((number + 1) * batch, len(source)), len(source))
        saved = {
            "logits": np.concatenate(logits),
            "labels": np.concatenate(labels),
            "index": np.concatenate(indices),
        }
        return totals | {"examples": len(source)}, saved

    def _loss_and_gradients(self, model, params, images, targets, scale):
        return steps.loss_and_gradients(model, params, images, targets, self.side.microbatches, scale)

    def _param(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(jnp.asarray(array, self.dtype), sharding.param_sharding(self.mesh, array.shape))

    def _rows(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(np.asarray(array, self.precision.dtype), sharding.batch_sharding(self.mesh))

    def _images(self, image: np.ndarray) -> jax.Array:
        return steps.normalize(sharding.shard_batch(image, self.mesh), self.dtype)

    def _mixed(self, mixed: str, number: int, disturb: Disturb | None) -> tuple[jax.Array, ...]:
        with np.load(mixed) as file:
            both = [file[f"{what}/{number}"].astype(self.dtype) for what in ("images", "targets")]
        images, targets = (jax.device_put(rows, sharding.batch_sharding(self.mesh)) for rows in both)
        return self._disturbed(images, f"images/{number}", disturb), targets

    def _disturbed(self, array: jax.Array, name: str, disturb: Disturb | None) -> jax.Array:
        if disturb is None:
            return array
        return array * jax.device_put(inputs.disturbance(name, array.shape, *disturb), array.sharding)

    def _disturbed_params(self, params: Any, disturb: Disturb | None) -> Any:
        if disturb is None:
            return params
        flat = weights.flatten(params)
        return weights.unflatten({key: self._disturbed(array, key, disturb) for key, array in flat.items()})

    def _views(self, view: str, source: Files, batch: input_pipeline.Batch) -> dict[str, np.ndarray]:
        images = np.asarray(steps.normalize(jnp.asarray(batch["image"]), self.dtype))
        return {
            f"{view}: {source[int(index)]['id']}": image
            for image, index, real in zip(images, batch["index"], batch["mask"], strict=True)
            if real
        }

    def _named(self, params: Any, prefix: str = "") -> dict[str, np.ndarray]:
        return {prefix + key: np.asarray(array) for key, array in weights.flatten(params).items()}


class Training:
    """Steps of training, each of which has finished when its call returns.

    Attributes:
        state: the state after the last step.
        metrics: what the last step says.

    The step is compiled at the first call; where the target is tuned as train.py compiles it, so that the state lies as
    the step wants it.
    """

    def __init__(self, step: Callable[..., tuple[Any, Any]], state: Any, target: Target):
        self.state, self.metrics = state, {}
        self._step, self._target = step, target
        self._compiled: Callable[..., tuple[Any, Any]] | None = None

    def __call__(self, *batch: Any) -> None:
        if self._compiled is None:
            self._compiled = self._compile(*batch)
        # as in train.py's loop, the state before the step is let go while the devices work
        self.state, self.metrics = self._compiled(self.state, *batch)
        jax.block_until_ready((self.state, self.metrics))

    def lower(self, *batch: Any) -> jax.stages.Lowered:
        return program.lower_step(self._step, self.state, *batch)

    def _compile(self, *batch: Any) -> Callable[..., tuple[Any, Any]]:
        if not self._target.tuned:
            return jax.jit(self._step, donate_argnums=0)
        compiled = self.lower(*batch).compile(compiler_options=self._target.compiler_options)
        self.state = jax.device_put(self.state, compiled.input_formats[0][0], donate=True)
        return compiled


def record_units(
    model: resnetv2.ResNetV2, params: Any, images: jax.Array, teacher: dict[str, jax.Array] | None
) -> dict[str, jax.Array]:
    """{site: output} for root_block, block1/unit01 and so on, and logits.

    With a teacher, {site: output} of another implementation, each unit is given what came before it there.
    """
    outputs: dict[str, jax.Array] = {}
    last = f"block{len(model.units)}/unit{model.units[-1]:02d}"

    def record(call, args, kwargs, context):
        if not isinstance(context.module, (resnetv2.RootBlock, resnetv2.BottleneckUnit)):
            return call(*args, **kwargs)
        site = "/".join(context.module.path)
        before = next(reversed(outputs), None)
        if teacher is not None and before in teacher:  # a teacher of another make may not show every unit
            args = (teacher[before],)
        outputs[site] = call(*args, **kwargs)
        return teacher[site] if teacher is not None and site == last and site in teacher else outputs[site]

    with nn.intercept_methods(record):
        logits = steps.apply_model(model, params, images)
    return outputs | {"logits": logits}


def _schedule(fields: dict[str, Any]) -> Schedule:
    fields = fields | {"decay_steps": tuple(fields["decay_steps"])}
    return Schedule(**fields)


def _arrays(tree: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in tree.items()}
