"""A run: everything that its flags, its dataset and its weight file decide, settled once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import input_pipeline
from bit_jax.checkpoints import pieces
from bit_jax.config import AUTO, Config, ModelConfig
from bit_jax.formats import weights
from bit_jax.formats.weights import Params
from bit_jax.model.architecture import HEAD_KERNEL, Architecture, HeadAlone
from bit_jax.model.precision import choose
from bit_jax.published import locate
from bit_jax.scale import hosts, sharding
from bit_jax.scale.spread import Spread
from bit_jax.training import fitting, flagperf, hyperrule, resources, trained
from bit_jax.training.hyperrule import Recipe
from bit_jax.training.linear_probe import Probe
from bit_jax.training.program import Steps, make_steps
from bit_jax.training.target import Target
from bit_jax.training.workdir import Workdir, begun_in
from input_pipeline.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Run:
    """The model, the data, the devices and the folder of a run. Nothing of it is open, and nothing changes.

    Attributes:
        config: the flags; what they leave open is settled in `recipe`.
        recipe: resolution, mixup and schedule.
        views: resizing, cropping and flipping of the images; of features, none of these.
        architecture: the model's architecture, with a head for the dataset's classes; a `HeadAlone` if the dataset is
            features.
        weight_file: the file to start from; None where the parameters are drawn by the seed.
        target: the devices, the precision, and how the model is executed there.
        global_batch: number of rows of a batch, over all hosts.
        train, validation: the two splits, with the same numbers for the same classes.
        workdir: the folder of the results.
        notes: sentences that the log begins with.
    """

    config: Config
    recipe: Recipe
    views: input_pipeline.Views | input_pipeline.FeatureViews
    architecture: Architecture
    weight_file: Path | None
    target: Target
    global_batch: int
    train: input_pipeline.Source
    validation: input_pipeline.Source
    workdir: Workdir
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, cfg: Config) -> Run:
        """Settles everything that the flags decide or leave to the dataset and to BiT-HyperRule. Reads the dataset's
        index and the names in the weight file; writes nothing.

        Raises:
            RequestError: something is wrong or missing, or does not fit the rest.
        """
        precision = choose(cfg.model.precision)  # before any array is made
        if cfg.scale.mesh == AUTO:
            return fitting.fitted(cfg, cls.of)
        scale, data = cfg.scale, cfg.data
        spread = Spread.of(cfg, begun_in(cfg.run.workdir))
        mesh, global_batch = spread.mesh, spread.global_batch
        if not starts_from_nothing(cfg.model):
            locate.resolve(cfg.model.model)  # a wrong name is said before anything is read or fetched
        probe = Probe.of(cfg)
        if probe is not None:
            cfg = probe.config
        train, validation = open_sources(cfg) if probe is None else _matched(probe.train, probe.validation)
        train, recipe, notes = _settled(cfg, train, mesh, global_batch)
        notes = (*spread.notes, *notes)
        class_names = list(train.class_names)
        architecture, weight_file = initial_weights(cfg.model, num_classes=len(class_names))
        if probe is not None:
            architecture, notes = probe.head(architecture, weight_file), (*notes, probe.note)
        if (pattern := cfg.additions.train) is not None:
            notes = (*notes, _trains(architecture, pattern))
        if architecture.note:
            notes = (*notes, architecture.note)
        # kept only where it is not BiT's, so that runs of BiT's own go on as they were begun
        constants: dict[str, Any] = (
            {} if architecture.note is None else {"standardize_eps": architecture.standardize_eps}
        )
        if probe is not None:
            constants |= {"features": probe.identity}
        views = input_pipeline.Views(recipe.resize_to, recipe.crop, data.flip, data.resize, cfg.additions.crop_style)
        return cls(
            config=cfg,
            recipe=recipe,
            views=views if probe is None else probe.views,
            architecture=architecture,
            weight_file=weight_file,
            target=Target(mesh, precision, scale.remat, spread.microbatches, deterministic=cfg.run.deterministic),
            global_batch=global_batch,
            train=train,
            validation=validation,
            workdir=Workdir.of(cfg, recipe=recipe, global_batch=global_batch, class_names=class_names, **constants),
            notes=notes,
        )

    @property
    def mesh(self) -> Mesh:
        return self.target.mesh

    def loader(self, source: input_pipeline.Source) -> input_pipeline.Loader:
        """Returns a loader of this host's batches, which moves them to its devices ahead of their use."""
        data = self.config.data
        return input_pipeline.Loader(
            source,
            self.views,
            self.global_batch,
            self.config.run.seed,
            place=functools.partial(sharding.shard_batch, mesh=self.mesh),
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=data.input_threads,
            skip_damaged=data.skip_damaged,
        )

    def steps(self) -> Steps:
        """Makes the training step and the evaluation step, without compiling them."""
        return make_steps(
            self.target,
            self.architecture,
            self.recipe,
            momentum=self.config.optimizer.momentum,
            seed=self.config.run.seed,
            global_batch=self.global_batch,
            share=self.rank0_share,
            additions=self.config.additions,
        )

    @property
    def rank0_share(self) -> flagperf.Rank0Share | None:
        """The examples whose accuracy is reported besides that of all, if `--flagperf-compat accuracy` asks for it."""
        if "accuracy" not in self.config.run.flagperf_compat:
            return None
        return flagperf.Rank0Share(self.mesh.size, len(self.validation))

    def initial_params(self, like: Params) -> Params:
        """Makes the parameters that training starts from; each device makes its own part.

        Args:
            like: the parameters' shapes, dtypes and shardings.
        """
        seed = self.config.run.seed
        if self.config.model.init == "random":
            model = self.architecture.model(jax.tree.leaves(like)[0].dtype)
            return jax.jit(lambda: model.init_params(seed), out_shardings=sharding.formats(like))()
        shapes = weights.flatten(like)
        return weights.unflatten({key: sharding.place(array, shapes[key]) for key, array in self.arrays()})

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (key, array) of the weight file, with a new head of zeros; of that head alone if it trains alone."""
        layout = self.architecture.layout
        return ((key, array) for key, array in self._whole_arrays() if key in layout)

    def _whole_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        assert self.weight_file is not None
        return weights.read(self.weight_file, num_classes=self.architecture.num_classes)[1]

    def whole(self, params: Params) -> Params:
        """Returns the parameters of the whole model: those of a head that was trained alone get the weight file's body,
        as NumPy's arrays on the first host, which writes them."""
        if not isinstance(self.architecture, HeadAlone) or not hosts.is_first():
            return params
        return trained.overlaid(weights.unflatten(dict(self._whole_arrays())), params)

    def needs(self) -> list[resources.Need]:
        """Lists what the run will need of this machine."""
        files = sum(input_pipeline.descriptors(source) for source in (self.train, self.validation))
        keep, additions = self.config.run.keep_checkpoints, self.config.additions
        needs = resources.needs(self.architecture, self.target.param_dtype, self.workdir, keep, files, additions)
        if (directory := self.config.run.local_checkpoints) is None:
            return needs
        return resources.with_local_copies(needs, directory, pieces.bytes_here(self.steps().state), self.workdir)


def _settled(
    cfg: Config, train: input_pipeline.Source, mesh: Mesh, global_batch: int
) -> tuple[input_pipeline.Source, Recipe, tuple[str, ...]]:
    """Returns the examples to train on, the recipe for them, and sentences that say where it comes from.

    Raises:
        RequestError: the recipe does not fit the batch.
    """
    native_area, notes = None, ()
    if hyperrule.needs_native_area(cfg):
        native_area, seen = input_pipeline.typical_area(train, skip_damaged=cfg.data.skip_damaged)
        notes = (f"{seen}; BiT-HyperRule chooses the resolution by the median",)
    if cfg.data.examples_per_class is not None:
        train = input_pipeline.few_shot(train, cfg.data.examples_per_class, cfg.run.seed)
    recipe = hyperrule.recipe(cfg, train_examples=len(train), native_area=native_area)
    if (decay_steps := cfg.optimizer.decay_steps) and cfg.additions.schedule == "cosine":
        notes = (*notes, f"--schedule cosine: --decay-steps {' '.join(map(str, decay_steps))} do not matter")
    if "schedule" in cfg.run.flagperf_compat:
        every = flagperf.epoch_steps(len(train), mesh.size, global_batch // mesh.size)
        recipe = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, restart_every=every))
        notes = (*notes, f"--flagperf-compat schedule: the schedule begins anew every {every} steps")
    if recipe.mixup and global_batch % 2:
        raise RequestError(f"mixup pairs neighbours and needs an even global batch, not {global_batch}; add --mixup 0")
    return train, recipe, notes


def starts_from_nothing(model: ModelConfig) -> bool:
    """Whether there is no weight file, not even for its architecture."""
    return model.init == "random" and Architecture.is_name(model.model)


def initial_weights(model: ModelConfig, *, num_classes: int) -> tuple[Architecture, Path | None]:
    """Returns the architecture with a head for `num_classes` classes, and the weight file, or None if there is none.
    The names and shapes in the file are checked."""
    if starts_from_nothing(model):
        return Architecture.parse(model.model, num_classes), None
    path = locate.weight_file(model.model)
    architecture, _ = weights.read(path, num_classes=num_classes)
    return architecture, path


def _trains(architecture: Architecture, pattern: str) -> str:
    """Returns a sentence on how many parameters train.

    Raises:
        RequestError: the pattern matches no parameter, or not the kernel of the new head. That is zero at first, so as
            long as it does not train, the gradient of everything below it is zero, too.
    """
    sizes = {key: int(np.prod(shape)) for key, shape in architecture.layout.items()}
    keys = trained.require(sizes, pattern)
    if HEAD_KERNEL not in keys:
        raise RequestError(
            f"--train {pattern!r} trains nothing below the new head, whose kernel is zero and would stay so; write "
            f"{pattern + '|head'!r}"
        )
    count, total = sum(sizes[key] for key in keys), sum(sizes.values())
    return (
        f"--train {pattern}: {count:,} of {total:,} parameters train, in {len(keys)} of {len(sizes)} arrays; the "
        "others get no gradient, no momentum and no update"
    )


def open_sources(cfg: Config) -> tuple[input_pipeline.Source, input_pipeline.Source]:
    """Opens the training split and the evaluation split, whose labels get the numbers that training's classes of the
    same names have."""
    data = cfg.data
    train, validation = (
        input_pipeline.open_source(data.dataset, split, data.data_dir) for split in (data.train_split, data.eval_split)
    )
    return _matched(train, validation)


def _matched(
    train: input_pipeline.Source, validation: input_pipeline.Source
) -> tuple[input_pipeline.Source, input_pipeline.Source]:
    """Returns both splits, with the same numbers for the same classes."""
    for source in (train, validation):
        input_pipeline.require_labels(source)
    return train, input_pipeline.relabelled(validation, train.class_names, train.name)
