"""The tasks of the ladder in JAX, made of the very functions that training, evaluation and loading are made of.

Every task returns (values, {name: array}), either of which may be None. Arrays are in the checkpoint's layout: images
NHWC, kernels HWIO, names as the file's keys.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import input_pipeline
from bit_jax.compiled import hlo
from bit_jax.config import Additions
from bit_jax.formats import weights
from bit_jax.model import layers, resnetv2
from bit_jax.model.architecture import Architecture, HeadAlone
from bit_jax.model.precision import choose, products
from bit_jax.scale import sharding
from bit_jax.training import figures, optimizer, program, steps
from bit_jax.training.hyperrule import Schedule
from bit_jax.training.target import Target
from bit_jax.training.trained import trained
from input_pipeline.errors import RequestError
from parity import faults
from parity.in_jax import operations, script, single, units
from parity.in_jax.probe import Probe
from parity.in_jax.training import Training, same
from parity.sides import inputs
from parity.sides.classes import open_labelled
from parity.sides.fingerprint import fingerprint
from parity.sides.inputs import Files
from parity.sides.operations import Recording
from parity.sides.operations import operations as operations_of
from parity.sides.side import Side
from parity.sides.tasks import Disturb, Result

FORWARD_PROGRAM = "forward program sha256"  # entry of the attestation
# the momentum and the average that the optimizer rung starts from, as shares of the parameters
MOMENTUM_FROM_PARAMS, EMA_FROM_PARAMS = 0.1, 0.8
Added = dict[str, Any] | None  # fields of `Additions`; None: all of them are off


class JaxSide:
    """A weight file's model in JAX, and the tasks of `sides/tasks.py` that compute with it.

    Attributes:
        side, precision: the side and the precision to compute in.
        weight_file: path of an official `.npz`.
        progress: function (number done, number in all) -> None; tasks call it after each batch.
        mesh, target: the side's devices, and how the model runs on them.
        dtype: dtype of parameters, images and the loss.

    Raises:
        RequestError: JAX finds fewer devices than the side needs.
    """

    def __init__(self, side: Side, precision: str, weight_file: str, progress: Callable[[int, int], None]):
        self.precision = choose(precision)
        self.side, self.weight_file, self.progress = side, weight_file, progress
        devices = jax.devices()
        if len(devices) < side.devices:
            raise RequestError(f"{side} needs {side.devices} devices, and JAX finds {len(devices)}; take fewer")
        self.mesh = sharding.make_mesh(devices[: side.devices], fsdp=side.fsdp)
        switches = {"tuned": side.tuned, "deterministic": side.deterministic}
        self.target = Target(self.mesh, self.precision, side.remat, side.microbatches, **switches)
        self.dtype = self.target.param_dtype
        self._loaded: dict[str | None, Any] = {}
        self._fault: str | None = None
        self._units: dict[tuple, jax.stages.Compiled] = {}

    def injected(self, fault: str | None) -> AbstractContextManager[None]:
        """Has the fault of that name while the `with` block runs; None: no fault."""
        self._fault = fault
        return faults.injected(fault)

    def model(self) -> tuple[resnetv2.ResNetV2, Any]:
        """Returns the model, with the fault if there is one, and its parameters, placed on the mesh."""
        if self._fault not in self._loaded:
            architecture, arrays = weights.read(self.weight_file)
            placed = {key: self._param(array) for key, array in arrays}
            if self.side.standardize_eps is not None:
                architecture = dataclasses.replace(architecture, standardize_eps=self.side.standardize_eps)
            model = self.target.model(architecture).clone(norm_eps=self.side.norm_eps)
            self._loaded = {self._fault: (model, weights.unflatten(placed))}
        return self._loaded[self._fault]

    def _jit(self, function: Callable) -> Callable:
        return jax.jit(function, compiler_options=self.target.compiler_options)

    def attest(self, images: str, dataset: Sequence[Any] = (), *, program: bool = False) -> Result:
        """Describes what computes here: versions, device, precision and constants, and hashes of weights and data.

        Args:
            program: whether to compile the forward pass, and to give the hash of the optimized program.
        """
        model, params = self.model()
        architecture = Architecture.of(model)
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
            "group norm eps": layers.NORM_EPS if model.norm_eps is None else model.norm_eps,
            "standardization eps": layers.STANDARDIZE_EPS if model.standardize_eps is None else model.standardize_eps,
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
            **({FORWARD_PROGRAM: self._program(params, self._images(images))} if program else {}),
        } | inputs.described(dataset), None

    def products(self) -> Result:
        """Returns the precisions in which a matrix product and a convolution are really computed."""
        return products(self.precision), None

    def weights(self) -> Result:
        """Returns every array of the weight file, as the model holds it."""
        _, params = self.model()
        return None, self._named(params)

    def pixels(
        self,
        files: Sequence[str],
        resize: int,
        crop: int,
        epochs: int,
        seed: int,
        draws: list[Any],
        crop_style: Any = "bit",
    ) -> Result:
        """Returns each image file as evaluation and as each epoch of training show it, normalized.

        Args:
            files: paths of image files.
            resize, crop: sides in pixels of the images that training crops, and of the views.
            epochs: number of epochs.
            seed: seed of the loader's random draws.
            draws: not used: PyTorch's side takes these, which are the same as the loader's own.
            crop_style: see `Views`.
        """
        source = Files(files)
        views = input_pipeline.Views(resize, crop, flip=True, crop_style=crop_style)
        loader = input_pipeline.Loader(source, views, global_batch=len(source), seed=seed)
        saved = {}
        for _number, batch in loader.evaluation():
            saved |= self._views("evaluation", source, batch)
        for epoch, batch in loader.train(0, epochs):
            saved |= self._views(f"train, epoch {epoch}", source, batch)
        return None, saved

    def forward(self, images: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Returns every unit's output and the logits, for the first batch of a file of pictures or of a mixed one.

        With a `teacher`, a file that another side returned, each unit computes on what the unit before it returned
        there.
        """
        _, params = self.model()
        teacher_outputs = None
        if teacher is not None:
            with np.load(teacher) as file:
                teacher_outputs = {site: self._rows(file[site]) for site in file.files}
        batch = self._disturbed(self._images(images), "images", disturb)
        params = self._disturbed_params(params, disturb)
        outputs = self._forward(params, batch, teacher_outputs)(params, batch, teacher_outputs)
        # an .npz cannot hold bfloat16
        return None, {site: np.asarray(output, self.dtype) for site, output in outputs.items()}

    def _forward(self, params: Any, images: jax.Array, teacher: dict[str, jax.Array] | None) -> jax.stages.Compiled:
        """Returns the compiled forward pass that records every unit; it is compiled once for each fault and shape."""
        model, _ = self.model()
        key = self._fault, images.shape, teacher is None
        if key not in self._units:
            # units within a rematerialized part cannot be recorded; what a backward pass keeps does not matter here
            plain = model.clone(remat="none")
            apply = self._jit(lambda params, images, teacher: units.record(plain, params, images, teacher))
            self._units = {key: apply.lower(params, images, teacher).compile()}
        return self._units[key]

    def _program(self, params: Any, images: jax.Array) -> str:
        """Returns the hash of the forward pass's optimized HLO, by which a compiler that changed nothing is known."""
        return hlo.fingerprint(self._forward(params, images, None).as_text() or "")

    def mix(self, batches: str) -> Result:
        """Returns every batch after normalization and mixup with the weights in the file; without any, as it is."""
        model, _ = self.model()
        mix = jax.jit(lambda batch, weight: steps.prepare(batch, model.num_classes, self.dtype, weight))
        saved = {}
        with np.load(batches) as file:
            image, label = file["image"], file["label"]
            weight = file.get("weight")
        for number in range(len(label)):
            batch = sharding.shard_batch({"image": image[number], "label": label[number]}, self.mesh)
            images, targets = mix(batch, None if weight is None else jnp.asarray(weight[number], self.dtype))
            saved |= {f"images/{number}": np.asarray(images), f"targets/{number}": np.asarray(targets)}
        return None, saved

    def loss(self, mixed: str, disturb: Disturb | None = None, additions: Added = None) -> Result:
        """Returns the loss of each row of the first batch, and their mean."""
        model, params = self.model()
        images, targets = self._mixed(mixed, 0, disturb)
        added = _additions(additions)

        def losses(params, images, targets):
            rows = steps.cross_entropy(steps.apply_model(model, params, images), targets, added.label_smoothing)
            mean, _ = steps.loss_and_gradients(model, params, images, targets, self.side.microbatches, additions=added)
            return {"loss of each row": rows, "mean loss": mean}

        computed = self._jit(losses)(self._disturbed_params(params, disturb), images, targets)
        return None, {name: np.asarray(loss) for name, loss in computed.items()}

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
        microbatches, added = self.side.microbatches, _additions(additions)

        @self._jit
        def gradients(params, images, targets, scale):
            return steps.loss_and_gradients(model, params, images, targets, microbatches, scale, added)[1]

        loss_scale = jnp.float32(scale) if self.precision.scales_loss else None
        saved, overflows = {}, 0
        for number in range(count):
            images, targets = self._mixed(mixed, number, disturb)
            named = self._named(gradients(params, shown(images), targets, loss_scale), f"{number}/")
            saved |= named
            overflows += not all(np.isfinite(array).all() for array in named.values())
            self.progress(number + 1, count)
        return {"overflows": overflows}, saved

    def operations(self, mixed: str, site: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Records the first batch's values and gradients at a site; with a `teacher`, a recording, returns what each
        operation of the site makes of that."""
        model, params = self.model()
        ops = operations_of(site, weights.flatten(params))
        params, batch = self._disturbed_params(params, disturb), self._mixed(mixed, 0, None)
        observed = operations.Observed(model, params, batch, site, ops, self._jit)
        if teacher is None:
            return None, observed.record().named()
        return None, observed.feed(Recording.load(teacher, disturb))

    def operation(
        self, question: dict[str, Any], operands: str, disturb: Disturb | None = None, programs: str | None = None
    ) -> Result:
        """Returns what one operation by itself makes of operands, computed by the model's module and, under names that
        begin with `plain`, by JAX's public functions; writes the module's program into a folder. Says the compiler's
        options.

        Args:
            question: the content of a reproducer's operation.json.
            operands: file of its operands and the gradient by its result.
            disturb: disturbance of the operands.
            programs: folder that receives the program, or None.
        """
        if question["kind"] == "update":
            function = single.update(question)
        else:
            model, params = self.model()
            op = operations_of(question["site"], weights.flatten(params))[question["name"]]
            images = jax.ShapeDtypeStruct((2, 32, 32, 3), self.dtype)
            function = single.Single(model, params, images, op, question["kind"]).compute
        arrays = inputs.disturbed_file(operands, disturb)
        given = {name: arrays[name].astype(self.dtype) for name in question["operands"]}
        gradient = arrays["gradient"].astype(self.dtype)
        results = self._jit(function)(given, gradient)
        if programs is not None:
            single.write(function, self._jit, question["results"], given, gradient, Path(programs))
        plain = {f"plain {name}": array for name, array in script.plain(question, arrays).items()}
        options = self.target.compiler_options
        return {"compiler_options": options}, {name: np.asarray(a) for name, a in (results | plain).items()}

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
        added = _additions(additions)
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
        added = _additions(additions)
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
        added, microbatches = _additions(additions), self.side.microbatches
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
        """Returns logits, label and index of every example that evaluation counts, the sums that evaluation itself
        makes, and the number of examples."""
        model, params = self.model()
        source = open_labelled(dataset, split, data_dir, class_names, limit)
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

    def _param(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(jnp.asarray(array, self.dtype), sharding.param_sharding(self.mesh, array.shape))

    def _rows(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(np.asarray(array, self.precision.dtype), sharding.batch_sharding(self.mesh))

    def _images(self, path: str) -> jax.Array:
        """Reads the first batch of a file of pictures or of mixed images; returns the images that the model gets."""
        with np.load(path) as file:
            if "image" in file:
                return steps.normalize(sharding.shard_batch(file["image"][0], self.mesh), self.dtype)
            return jax.device_put(file["images/0"].astype(self.dtype), sharding.batch_sharding(self.mesh))

    def _read(self, path: str, prefix: str) -> Any:
        """Reads the parameters, or what else there is one of for each, whose names begin with the prefix."""
        with np.load(path) as file:
            named = {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}
        return weights.unflatten({key: self._param(array) for key, array in named.items()})

    def _held(self, start: str, additions: Additions) -> dict[str, Any]:
        """Reads a state's momentum and its average, if one is kept, under the names that they have in `opt_state`."""
        averages = {} if additions.ema is None else {"ema": self._read(start, "ema/")}
        return {"trace": self._read(start, "momentum/")} | averages

    def _mixed(self, mixed: str, number: int, disturb: Disturb | None) -> tuple[jax.Array, ...]:
        """Reads batch `number` of a file and disturbs its images; returns images and targets on the mesh."""
        with np.load(mixed) as file:
            arrays = [file[f"{name}/{number}"].astype(self.dtype) for name in ("images", "targets")]
        images, targets = (jax.device_put(rows, sharding.batch_sharding(self.mesh)) for rows in arrays)
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


def _additions(fields: Added) -> Additions:
    return Additions(**(fields or {}))


def _schedule(fields: dict[str, Any]) -> Schedule:
    fields = fields | {"decay_steps": tuple(fields["decay_steps"])}
    return Schedule(**fields)
