"""The tasks of the ladder in JAX that train nothing, made of the functions that train.py is made of.

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

import input_pipeline
from bit_jax.compiled import hlo
from bit_jax.config import Additions
from bit_jax.formats import weights
from bit_jax.model import layers, resnetv2
from bit_jax.model.architecture import Architecture
from bit_jax.model.precision import choose, products
from bit_jax.scale import sharding
from bit_jax.training import figures, steps
from bit_jax.training.target import Target
from input_pipeline.errors import RequestError
from parity import faults
from parity.in_jax import operations, script, single, units
from parity.sides import inputs
from parity.sides.classes import open_labelled
from parity.sides.fingerprint import fingerprint
from parity.sides.inputs import Files
from parity.sides.operations import Recording
from parity.sides.operations import operations as operations_of
from parity.sides.side import Side
from parity.sides.tasks import Disturb, Result

FORWARD_PROGRAM = "forward program sha256"  # entry of the attestation
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
        self._programs: dict[tuple, Any] = {}

    def injected(self, fault: str | None) -> AbstractContextManager[None]:
        """Has the fault of that name while the `with` block runs; None: no fault."""
        if fault != self._fault:
            self._programs.clear()
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

    def _jit_once(self, name: str, additions: Additions, function: Callable) -> Callable:
        """Returns what `_jit` made of the function of that name when it was first given with these additions, so that
        what is asked again, with a disturbance or another loss scale, is not traced again. A fault makes others."""
        return self._programs.setdefault((name, additions), self._jit(function))

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
        key = "forward", images.shape, teacher is None
        if key not in self._programs:
            # units within a rematerialized part cannot be recorded; what a backward pass keeps does not matter here
            plain = model.clone(remat="none")
            apply = self._jit(lambda params, images, teacher: units.record(plain, params, images, teacher))
            self._programs[key] = apply.lower(params, images, teacher).compile()
        return self._programs[key]

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
        added = added_to(additions)

        def losses(params, images, targets):
            rows = steps.cross_entropy(steps.apply_model(model, params, images), targets, added.label_smoothing)
            mean, _ = steps.loss_and_gradients(model, params, images, targets, self.side.microbatches, additions=added)
            return {"loss of each row": rows, "mean loss": mean}

        compute = self._jit_once("loss", added, losses)
        computed = compute(self._disturbed_params(params, disturb), images, targets)
        return None, {name: np.asarray(loss) for name, loss in computed.items()}

    def operations(self, mixed: str, site: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Records the first batch's values and gradients at a site; with a `teacher`, a recording, returns what each
        operation of the site makes of that."""
        model, params = self.model()
        ops = operations_of(site, weights.flatten(params))
        params, (images, targets) = self._disturbed_params(params, disturb), self._mixed(mixed, 0, None)
        key = "operations", site, images.shape
        if key not in self._programs:
            self._programs[key] = operations.Observed(model, site, ops, self._jit)
        observed = self._programs[key]
        if teacher is None:
            return None, observed.record(params, images, targets).named()
        return None, observed.feed(params, images, Recording.load(teacher, disturb))

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
        split = sharding.param_sharding(self.mesh, array.shape)
        return sharding.place(array, jax.ShapeDtypeStruct(array.shape, self.dtype, sharding=split))

    def _rows(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(np.asarray(array, self.precision.dtype), sharding.batch_sharding(self.mesh))

    def _images(self, path: str) -> jax.Array:
        """Reads the first batch of a file of pictures or of mixed images; returns the images that the model gets."""
        with np.load(path) as file:
            if "image" in file:
                return steps.normalize(sharding.shard_batch(file["image"][0], self.mesh), self.dtype)
            return jax.device_put(file["images/0"].astype(self.dtype), sharding.batch_sharding(self.mesh))

    def _mixed(self, mixed: str, number: int, disturb: Disturb | None) -> tuple[jax.Array, ...]:
        """Reads batch `number` of a file and disturbs its images; returns images and targets on the mesh."""
        with np.load(mixed) as file:
            arrays = [file[f"{name}/{number}"].astype(self.dtype) for name in ("images", "targets")]
        images, targets = (jax.device_put(rows, sharding.batch_sharding(self.mesh)) for rows in arrays)
        return self._disturbed(images, f"images/{number}", disturb), targets

    def _disturbed(self, array: jax.Array, name: str, disturb: Disturb | None) -> jax.Array:
        if disturb is None:
            return array
        # on the host, because JAX would compile a product for every shape
        return sharding.place(np.asarray(array) * inputs.disturbance(name, array.shape, *disturb), array)

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


def added_to(fields: Added) -> Additions:
    """Returns the additions of a task's argument."""
    return Additions(**(fields or {}))
