"""A run of train.py as its work directory keeps it: what it was asked, its states, its losses and its real batches.

Everything is read and nothing written, so that the run may still be going on.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import input_pipeline
from bit_jax.config import Additions
from bit_jax.formats import weights
from bit_jax.model.architecture import STANDARDIZE_EPS
from bit_jax.model.precision import PRECISIONS
from bit_jax.published import fetch, locate
from bit_jax.published.catalogue import PublishedFile
from bit_jax.training import metrics
from bit_jax.training.hyperrule import Recipe, Schedule
from bit_jax.training.steps import FIRST_SCALE, mixup_weight
from bit_jax.training.trained import trains
from input_pipeline.errors import RequestError
from input_pipeline.files import DamagedFile, read_json
from parity.sides.inputs import Batches

OPTIMIZER = {"base_lr", "momentum", "mixup", "warmup_steps", "decay_steps", "steps"}  # what both sides know of one
ADDITIONS = "additions."  # how the flags of additions begin
REMEDY = "give the --workdir of a run of train.py"


@dataclasses.dataclass(frozen=True)
class State:
    """The state after a number of steps.

    Attributes:
        step: number of steps that were taken.
        params, momentum: {key in the checkpoint's layout: array}, float32, or float64 of a run in fp64. There is a
            momentum of the parameters that train.
        ema: the average of the same parameters, if the run keeps one.
        skipped: number of steps so far that changed nothing, because float16's gradients overflowed.
        scale: float16's loss scale; None in other precisions.
    """

    step: int
    params: dict[str, np.ndarray]
    momentum: dict[str, np.ndarray]
    ema: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    scale: float | None = None

    @property
    def named(self) -> dict[str, Any]:
        """The arrays as both sides' tasks name them: `params/KEY`, `momentum/KEY` and `ema/KEY`."""
        kinds = {"params": self.params, "momentum": self.momentum, "ema": self.ema}
        return {f"{kind}/{key}": array for kind, arrays in kinds.items() for key, array in arrays.items()}

    @property
    def not_finite(self) -> list[str]:
        """Names of the arrays that hold NaN or infinity."""
        return [name for name, array in self.named.items() if not np.isfinite(array).all()]

    def save(self, path: Path) -> Path:
        """Writes the file that both sides' tasks take as `start`, and returns its path."""
        np.savez(path, **self.named)
        return path

    def save_weights(self, path: Path, standardize_eps: float) -> Path:
        """Writes the parameters as an official weight file, in float32, and returns its path."""
        params = weights.unflatten({key: array.astype(np.float32) for key, array in self.params.items()})
        weights.save(path, params, standardize_eps=standardize_eps)
        return path


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """What the work directory's config.json says of the run.

    Attributes:
        workdir: the work directory.
        flags: {"section.field": value} of the flags that decide what the run computes.
        recipe: resolution, mixup and schedule.
        global_batch: rows of a batch, over all hosts.
        class_names: names of the training classes in label order.
        dataset, data_dir: where the dataset is now.
        standardize_eps: what the run's model adds to the variance of kernels.
    """

    workdir: Path
    flags: dict[str, Any]
    recipe: Recipe
    global_batch: int
    class_names: list[str]
    dataset: str
    data_dir: Path | None
    standardize_eps: float = STANDARDIZE_EPS

    @classmethod
    def of(cls, workdir: Path, *, dataset: str | None = None, data_dir: Path | None = None) -> "RecordedRun":
        """Reads config.json.

        Args:
            dataset: the dataset if it is elsewhere now; None: where the run found it.

        Raises:
            RequestError: the folder holds no run, or a linear probe; config.json is damaged; or the run's optimizer is
                not one that parity has.
        """
        path = workdir / "config.json"
        if not path.exists():
            raise RequestError(f"{workdir} holds no config.json, so nothing says of which run it is; {REMEDY}")
        content = read_json(path, dict, REMEDY)
        try:
            flags, recipe = content["config"], content["recipe"]
            if "features" in content:
                raise RequestError(
                    f"{workdir} holds a linear probe, which trains on stored features, and parity's steps take images; "
                    "compare a probe with python -m parity curve --train head --candidate jax:probe"
                )
            schedule = Schedule(**recipe["schedule"] | {"decay_steps": tuple(recipe["schedule"]["decay_steps"])})
            run = cls(
                workdir=workdir,
                flags=flags,
                recipe=Recipe(recipe["resize_to"], recipe["crop"], recipe["mixup"], schedule),
                global_batch=content["global_batch"],
                class_names=content["class_names"],
                dataset=dataset or flags["data.dataset"],
                data_dir=data_dir,
                standardize_eps=float(content.get("standardize_eps", STANDARDIZE_EPS)),
            )
            run._check()
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise DamagedFile(f"{path} is damaged ({reason}); {REMEDY}") from None
        return run

    def _check(self) -> None:
        """Raises RequestError if the run's optimizer has settings that parity's does not know, and KeyError if a flag
        that is needed is not there."""
        of_optimizer = {name.removeprefix("optimizer.") for name in self.flags if name.startswith("optimizer.")}
        if unknown := sorted(of_optimizer - OPTIMIZER):
            raise RequestError(
                f"{self.workdir} was trained with optimizer.{unknown[0]} "
                f"{self.flags[f'optimizer.{unknown[0]}']}, and parity's optimizer is SGD with momentum alone; "
                "use the version of parity that came with that train.py"
            )
        for name in ("model.model", "model.init", "optimizer.momentum", "run.seed"):
            self.flags[name]
        if self.precision not in PRECISIONS:
            raise RequestError(
                f"{self.workdir} was trained in {self.precision}, and parity has {', '.join(PRECISIONS)}; use the "
                "version of parity that came with that train.py"
            )
        for name in ("train_split", "examples_per_class", "resize", "flip"):
            self.flags[f"data.{name}"]
        known = {field.name for field in dataclasses.fields(Additions)}
        if unknown := sorted(self._added.keys() - known):
            raise RequestError(
                f"{self.workdir} was trained with --{unknown[0].replace('_', '-')} {self._added[unknown[0]]}, which "
                "parity does not know; use the version of parity that came with that train.py"
            )
        Additions(**self._added)

    @property
    def precision(self) -> Any:
        return self.flags["model.precision"]

    @property
    def momentum(self) -> float:
        return self.flags["optimizer.momentum"]

    @property
    def _added(self) -> dict[str, Any]:
        return {name.removeprefix(ADDITIONS): value for name, value in self.flags.items() if name.startswith(ADDITIONS)}

    @property
    def additions(self) -> Additions:
        """What the run adds to BiT's recipe."""
        return Additions(**self._added)

    @property
    def schedule(self) -> dict[str, Any]:
        """Fields of a `Schedule`, as JSON's types."""
        return self.recipe.schedule.described()

    def checkpoints(self) -> list[int]:
        """Returns the steps of the complete checkpoints, the oldest first."""
        from bit_jax.checkpoints import reading  # here and below, because Orbax takes long to import

        return sorted(reading.steps(self.workdir))

    def initial_weights(self) -> Path | None:
        """Returns the weight file that training started from; None if it is not here, or if there was none."""
        if self.flags["model.init"] != "checkpoint":
            return None
        try:
            place = locate.resolve(self.flags["model.model"])
            path = fetch.cache_dir() / place.path if isinstance(place, PublishedFile) else place
        except RequestError:
            return None
        return path if path.exists() else None

    def state(self, step: int) -> State:
        """Reads the state after that many steps from its checkpoint; that of step 0 is the weight file's.

        Raises:
            RequestError: the checkpoint or the weight file is damaged or cannot be read, or the checkpoint's
                optimizer is not SGD with momentum.
        """
        from bit_jax.checkpoints import reading

        if step == 0:
            path = self.initial_weights()
            assert path is not None, "the caller has looked"
            params = dict(weights.read(path, num_classes=len(self.class_names))[1])
            wide = np.float64 if self.precision == "fp64" else np.float32
            params = {key: array.astype(wide) for key, array in params.items()}
            scale = FIRST_SCALE if self.precision == "fp16" else None
            own = {key: array for key, array in params.items() if trains(key, self.additions.train)}
            momentum = {key: np.zeros_like(array) for key, array in own.items()}
            return State(0, params, momentum, own if self.additions.ema is not None else {}, scale=scale)
        tree = reading.read(self.workdir, step)
        params = weights.flatten(tree["params"])
        traces = [part["trace"] for part in tree["opt_state"] if isinstance(part, dict) and "trace" in part]
        momentum = weights.flatten(traces[0]) if len(traces) == 1 else {}
        averages = [part["ema"] for part in tree["opt_state"] if isinstance(part, dict) and "ema" in part]
        ema = weights.flatten(averages[0]) if averages else {}
        own = {key for key in params if trains(key, self.additions.train)}
        if momentum.keys() != own:
            raise RequestError(
                f"checkpoint {step} of {self.workdir} does not hold one momentum for each parameter that trains, as "
                "SGD with momentum does, and parity has no other optimizer"
            )
        if ema.keys() != (own if self.additions.ema is not None else set()):
            raise RequestError(
                f"checkpoint {step} of {self.workdir} does not hold the averages that its config.json speaks of"
            )
        scale = tree.get("loss_scale")
        if scale is None:
            return State(step, params, momentum, ema)
        return State(step, params, momentum, ema, int(scale["skipped"]), float(scale["scale"]))

    def losses(self) -> dict[int, float]:
        """Returns {step: its loss} of the steps that metrics.jsonl has. Lines that are damaged, or not yet whole, are
        left out."""
        entries, _ = metrics.read(self.workdir / "metrics.jsonl")
        return {entry["step"]: entry["loss"] for entry in entries if isinstance(entry.get("loss"), float)}

    def source(self) -> input_pipeline.Source:
        """Opens the training split as the run did.

        Raises:
            RequestError: the dataset cannot be opened, or its classes are no longer those of the run.
        """
        flags = self.flags
        source = input_pipeline.open_source(self.dataset, flags["data.train_split"], self.data_dir)
        if list(source.class_names) != self.class_names:
            raise RequestError(
                f"{source.name} has other classes than the run was trained with ({len(source.class_names)} and "
                f"{len(self.class_names)}); name the run's dataset with --dataset and --data-dir"
            )
        if (examples := flags["data.examples_per_class"]) is not None:
            source = input_pipeline.few_shot(source, examples, flags["run.seed"])
        return source

    def batches(self, source: input_pipeline.Source, first: int, count: int) -> Batches:
        """Returns the batches of steps `first` + 1 to `first` + `count`, with the augmentation and the mixup that the
        run gave them."""
        views = input_pipeline.Views(
            self.recipe.resize_to,
            self.recipe.crop,
            self.flags["data.flip"],
            self.flags["data.resize"],
            self.additions.crop_style,
        )
        # a run without --skip-damaged has met no damaged image, so for it this changes nothing
        loader = input_pipeline.Loader(source, views, self.global_batch, self.flags["run.seed"], skip_damaged=True)
        made = [batch for _, batch in loader.train(first, first + count)]
        return Batches(
            np.stack([batch["image"] for batch in made]),
            np.stack([batch["label"] for batch in made]),
            self.mixup_weights(first, count),
            [[str(index) for index in batch["index"]] for batch in made],
        )

    def mixup_weights(self, first: int, count: int) -> np.ndarray | None:
        """Returns the weights that train.py draws for these steps, float64 [count]; None if the run does not mix."""
        if not self.recipe.mixup:
            return None
        with jax.enable_x64(self.precision == "fp64"):  # as in the run, because a seed's key depends on it
            drawn = [
                mixup_weight(self.flags["run.seed"], jnp.asarray(first + number, jnp.int32), self.recipe.mixup)
                for number in range(count)
            ]
        return np.array([np.asarray(weight) for weight in drawn], np.float64)

    def failed_batch(self, step: int) -> Batches | None:
        """Returns the batch of a step whose loss was not finite, as the run left it in a file for each host; None if
        there are no such files.

        Raises:
            RequestError: a file is damaged, or the files of some hosts are missing.
        """
        files: dict[int, Path] = {}
        for path in self.workdir.glob(f"failed_step{step}.host*.npz"):
            if match := re.fullmatch(rf"failed_step{step}\.host(\d+)\.npz", path.name):
                files[int(match[1])] = path
        if not files:
            return None
        parts = [_arrays(files[host]) for host in sorted(files)]
        image, label, index = (np.concatenate([part[name] for part in parts]) for name in ("image", "label", "index"))
        if len(label) != self.global_batch:
            raise RequestError(
                f"{', '.join(str(files[host]) for host in sorted(files))}: {len(label)} of the batch's "
                f"{self.global_batch} rows; bring the files of all hosts together, or move them away to take the "
                "batch from the dataset"
            )
        weight = self.mixup_weights(step - 1, 1)
        return Batches(image[None], label[None], weight, [[str(number) for number in index]])


def on_cpu() -> None:
    """Has JAX use the CPU alone in this process, which reads and draws but leaves accelerators to the sides."""
    jax.config.update("jax_platforms", "cpu")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return {name: file[name] for name in ("image", "label", "index")}
    except Exception as error:  # zipfile and NumPy raise many kinds
        raise RequestError(
            f"{path} cannot be read ({error}); move it away to take the batch from the dataset"
        ) from None
