"""Fine-tunes a BiT model: `python train.py PRESET --workdir DIR`; see `--help` of each preset for its flags."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # of a GPU; the rest is CUDA's and NCCL's: see plan/

from bit_jax.model.architecture import Architecture
from bit_jax.process import hugepages

if __name__ == "__main__":
    hugepages.restart()

import jax
import tyro

import input_pipeline
from bit_jax import config, doctor
from bit_jax.compiled import profile
from bit_jax.model import weights
from bit_jax.model.precision import choose
from bit_jax.model.resnetv2 import param_dtype
from bit_jax.published import fetch, locate
from bit_jax.scale import hosts, sharding
from bit_jax.training import figures, hyperrule, loop, resources
from bit_jax.training import run as finetune
from bit_jax.training.workdir import Workdir
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.limits import raise_descriptor_limit


def main() -> None:
    cfg = tyro.extras.overridable_config_cli(config.PRESETS, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    raise_descriptor_limit()
    keep_compiled_programs()
    with hosts.joined(cfg.scale):
        if cfg.scale.doctor:
            return examine(cfg)
        result = run(cfg)
        first = hosts.is_first()
    if first:
        with contextlib.suppress(BrokenPipeError):  # the run is done and kept, whether or not anybody reads of it
            terminal.console(width=120).print(figures.flagperf_row(result))
            if cfg.run.profile:
                with contextlib.suppress(RequestError):  # the log says why there is no table
                    profile.show(profile.load(cfg.run.workdir), terminal.console(width=120))
            print(f"{cfg.run.workdir}: final.npz, result.json, metrics.jsonl, tensorboard/, checkpoints/", flush=True)


def keep_compiled_programs() -> None:
    """In the cache directory, so that a run started again, or another of the same shapes, does not compile anew."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(RequestError):  # without a home there is none, and the run compiles anew
            jax.config.update("jax_compilation_cache_dir", str(fetch.cache_dir() / "xla"))


def run(cfg: config.Config) -> dict:
    """One whole run, from configuration to the content of result.json."""
    choose(cfg.model.precision)  # before any array is made
    devices = sharding.make_mesh(fsdp=sharding.parse_mesh(cfg.scale.mesh, jax.device_count()))
    global_batch = sharding.global_batch_size(
        devices,
        global_batch=cfg.data.global_batch,
        batch_per_device=cfg.data.batch_per_device,
        microbatches=cfg.scale.microbatches,
    )
    if not starts_from_nothing(cfg.model):
        locate.resolve(cfg.model.model)  # a wrong name is said before anything is read or fetched
    train, validation = open_sources(cfg)
    native_area, notes = None, []
    if hyperrule.needs_native_area(cfg):
        native_area, seen = input_pipeline.typical_area(train, skip_damaged=cfg.data.skip_damaged)
        notes = [f"{seen}; BiT-HyperRule chooses the resolution by the median"]
    if cfg.data.examples_per_class is not None:
        train = input_pipeline.few_shot(train, cfg.data.examples_per_class, cfg.run.seed)
    recipe = hyperrule.recipe(cfg, train_examples=len(train), native_area=native_area)
    if recipe.mixup and global_batch % 2:
        raise RequestError(f"mixup pairs neighbours and needs an even global batch, not {global_batch}; add --mixup 0")

    views = input_pipeline.Views(recipe.resize_to, recipe.crop, cfg.data.flip, cfg.data.resize)
    architecture, initial_params = initial_model(cfg, num_classes=len(train.class_names))
    workdir = Workdir.of(cfg, recipe=recipe, global_batch=global_batch, class_names=list(train.class_names))
    if result := workdir.finished():
        if hosts.is_first():
            print(f"{workdir.path} holds this run, finished; its result:", file=sys.stderr)
        return result
    resources.require(needs(cfg, architecture, workdir, (train, validation)))

    def loader(source: input_pipeline.Source) -> loop.Split:
        batches = input_pipeline.Loader(
            source,
            views,
            global_batch,
            cfg.run.seed,
            place=lambda batch: sharding.shard_batch(batch, devices),
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=cfg.data.input_threads,
            skip_damaged=cfg.data.skip_damaged,
        )
        return loop.Split(source.name, len(source), batches)

    with workdir.owned():
        return finetune.finetune(
            cfg,
            recipe,
            architecture,
            initial_params,
            train=loader(train),
            validation=loader(validation),
            global_batch=global_batch,
            mesh=devices,
            workdir=workdir,
            notes=notes,
        )


def examine(cfg: config.Config) -> None:
    """Looks at everything that the run is made of and at what it runs on, and starts nothing."""
    choose(cfg.model.precision)
    sources = open_sources(cfg)
    inputs = {source.name: input_pipeline.fingerprint(source) for source in sources}
    if not starts_from_nothing(cfg.model):
        inputs["weights"] = doctor.file_fingerprint(locate.weight_file(cfg.model.model))
    architecture, _ = initial_model(cfg, num_classes=len(sources[0].class_names))
    doctor.examine(cfg, inputs, needs(cfg, architecture, Workdir.of(cfg), sources))


def open_sources(cfg: config.Config) -> tuple[input_pipeline.Source, input_pipeline.Source]:
    """The training split, and the evaluation split with its labels numbered as training's: by the classes' names."""
    data = cfg.data
    train, validation = (
        input_pipeline.open_source(data.dataset, split, data.data_dir) for split in (data.train_split, data.eval_split)
    )
    for source in (train, validation):
        input_pipeline.require_labels(source)
    return train, input_pipeline.relabelled(validation, train.class_names, train.name)


def needs(
    cfg: config.Config,
    architecture: Architecture,
    workdir: Workdir,
    sources: Sequence[input_pipeline.Source],
) -> list[resources.Need]:
    """What the run will need of this machine."""
    files = sum(input_pipeline.descriptors(source) for source in sources)
    dtype = param_dtype(choose(cfg.model.precision).dtype)
    return resources.needs(architecture, dtype, workdir, cfg.run.keep_checkpoints, files)


def starts_from_nothing(model: config.ModelConfig) -> bool:
    """Whether there is no weight file, not even for its architecture."""
    return model.init == "random" and Architecture.is_name(model.model)


def initial_model(
    cfg: config.Config, *, num_classes: int
) -> tuple[Architecture, Callable[[weights.Params], weights.Params]]:
    """The architecture with a head for `num_classes`, and what makes the parameters to start from: given their shapes,
    dtypes, shardings and layouts, it makes each device's part there."""
    name, seed = cfg.model.model, cfg.run.seed
    if starts_from_nothing(cfg.model):
        architecture = Architecture.parse(name, num_classes)
    else:
        architecture, arrays = weights.read(locate.weight_file(name), num_classes=num_classes)

    def read(like: weights.Params) -> weights.Params:
        shapes = weights.flatten(like)
        return weights.unflatten({key: sharding.place(array, shapes[key]) for key, array in arrays})

    def draw(like: weights.Params) -> weights.Params:
        model = architecture.model(jax.tree.leaves(like)[0].dtype)
        return jax.jit(lambda: model.init_params(seed), out_shardings=sharding.formats(like))()

    return architecture, draw if cfg.model.init == "random" else read


if __name__ == "__main__":
    sys.exit(exit_code(main))
