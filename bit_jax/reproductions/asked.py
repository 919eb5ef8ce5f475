"""What is asked for behind `--`: whether it can be, and which of it changes what is measured.

A figure that is measured with other weights, on other examples or after another training says nothing of the published
one, even if the number of examples is the same. Precision, devices, hosts and threads do not matter, nor, for an
evaluation, the batch.
"""

from pathlib import Path
from typing import Any

from bit_jax import config, evaluate, train
from bit_jax.reproductions.records import Figure
from input_pipeline.errors import RequestError

FREE_IN_EVALUATION = {
    "data_dir",
    "precision",
    "devices",
    "json",
    "html",
    "predictions",
    "mistakes",
    "input_threads",
    "view",  # its fields are compared one by one
}
FREE_IN_TRAINING = {"model.precision", "run.deterministic"}  # besides those that a continued run may change
OF_EXAMPLES = {"--dataset", "--split", "--train-split", "--eval-split"}


def evaluation(figure: Figure, data_dir: Path | None, more: tuple[str, ...] = ()) -> evaluate.Request:
    """Returns what `evaluate` is asked for; wrong words in `more` end the process as that command does."""
    return evaluate.configuration(figure.arguments(data_dir, more), prog="python -m bit_jax.evaluate")


def training(
    figure: Figure, data_dir: Path | None, workdir: Path, seed: int, more: tuple[str, ...] = ()
) -> config.Config:
    """Returns what one seed's run is asked for; wrong words in `more` end the process as train.py does.

    Raises:
        RequestError: a value is out of its range, or `more` has another seed or folder than the figure's run.
    """
    words = [*figure.arguments(data_dir), *figure.of_run(workdir, seed), *more]
    cfg = train.configuration(words, prog="python train.py")
    if (cfg.run.seed, cfg.run.workdir) != (seed, figure.folder(workdir, seed)):
        seeds = ", ".join(map(str, figure.seeds))
        raise RequestError(
            f"--seed and --workdir of each run are {figure.name}'s own (seeds: {seeds}); leave them out behind `--`, "
            "and give --workdir before it to keep the runs elsewhere"
        )
    return cfg


def changed(figure: Figure, data_dir: Path | None, more: tuple[str, ...]) -> list[str]:
    """Returns the flags behind `--` that change what is measured.

    A folder of images may stand for the figure's dataset, and its splits may have other names.

    Raises:
        RequestError: see `training`.
    """
    before, after = _deciding(figure, data_dir, ()), _deciding(figure, data_dir, more)
    differing = {key for key in before | after if before.get(key) != after.get(key)}
    flags = {f"--{key.rpartition('.')[2].replace('_', '-')}" for key in differing}
    if "--dataset" in flags and (after.get("dataset") or after["data.dataset"]).startswith("folder:"):
        flags -= OF_EXAMPLES
    return sorted(flags)


def _deciding(figure: Figure, data_dir: Path | None, more: tuple[str, ...]) -> dict[str, Any]:
    """Returns {field: value} of all that decides what is measured."""
    if figure.how == "evaluation":
        request = evaluation(figure, data_dir, more)
        fields = vars(request) | vars(request.view)
        return {key: value for key, value in fields.items() if key not in FREE_IN_EVALUATION}
    cfg = training(figure, data_dir, Path("workdir"), figure.seeds[0], more)
    fields = {key: value for key, value in config.identity(cfg).items() if key not in FREE_IN_TRAINING}
    return fields | {"run.flagperf_compat": "schedule" in cfg.run.flagperf_compat}


def require_plannable(figure: Figure, data_dir: Path | None, more: tuple[str, ...]) -> None:
    """Refuses to plan for what --plan knows nothing of.

    Raises:
        RequestError: there are words behind `--` of a training, or they name other examples.
    """
    if figure.how == "training" and more:
        raise RequestError(
            f"--plan of {figure.name} is for the training as published, and `-- {' '.join(more)}` would change it; "
            "leave that out, or plan for another training with `python -m bit_jax.plan`"
        )
    if figure.how == "evaluation" and (other := OF_EXAMPLES.intersection(changed(figure, data_dir, more))):
        raise RequestError(
            f"--plan of {figure.name} is for its {figure.examples:,} images, and {', '.join(sorted(other))} behind "
            "`--` names others; leave that out"
        )
