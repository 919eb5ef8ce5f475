"""Measures published figures of BiT again: `python -m bit_jax.reproduce list`, `python -m bit_jax.reproduce NAME`.

NAME evaluates published weights or trains, prints what it measures beside what is published, and says whether the two
agree. Arguments behind `--` are added to the command that measures, such as `-- --precision bf16`.
"""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

import input_pipeline
from bit_jax import evaluate, train
from bit_jax.reproductions import asked
from bit_jax.reproductions.judge import Judged, judge
from bit_jax.reproductions.records import Figure
from bit_jax.reproductions.table import FIGURES
from bit_jax.reproductions.takes import takes
from bit_jax.training import figures
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import writable, write_json
from input_pipeline.flags import UserPath, require_distinct
from input_pipeline.terminal import printable

LIST = "list"
RESULT = "reproduction.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """The figure to measure, and where its data lie."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[NAME]")] = LIST
    """Name of the figure, or `list` for all names."""
    data_dir: UserPath | None = None
    """Directory with the data, as `list` and the figure's own text say. None: tfds's default directory."""
    workdir: UserPath | None = None
    """Directory that receives reproduction.json and, of each seed, the training run. Runs that are there are continued,
    and finished ones are only judged. None: runs/reproduce/NAME."""
    plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure nothing, but say what it would take: memory and time at a GPU's published peaks.
    Training needs XLA's compiler for GPUs for that (`pip install 'bit-jax[plan]'`), and a few minutes; no GPU."""
    device: str = "a100-40g"
    """GPU for --plan: a100-40g, a100-80g or h100-80g."""
    json: UserPath | None = None
    """File to write the list, the plan or the result to."""


def main() -> int:
    typed, more = split(sys.argv[1:])
    request = tyro.cli(Request, description=__doc__, args=typed, config=(tyro.conf.OmitArgPrefixes,))
    if request.json is not None:
        writable(request.json)
    console = terminal.console(width=120)
    if request.name == LIST:
        if more:
            raise RequestError(f"`list` measures nothing, so `-- {' '.join(more)}` belongs to a figure; name one")
        if request.plan:
            raise RequestError("`list` measures nothing, so --plan belongs to a figure; name one")
        return show_all(request, console)
    figure = lookup(request.name)
    return plan(figure, request, more, console) if request.plan else measure(figure, request, more, console)


def split(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Returns (this command's arguments, those behind `--`)."""
    words = list(arguments)
    if "--" not in words:
        return words, ()
    place = words.index("--")
    return words[:place], tuple(words[place + 1 :])


def lookup(name: str) -> Figure:
    """Finds a figure by its name.

    Raises:
        RequestError: there is none of that name; the nearest are listed.
    """
    if name in FIGURES:
        return FIGURES[name]
    nearest = difflib.get_close_matches(name, FIGURES, 3, cutoff=0.4)
    hint = f"; near it: {', '.join(nearest)}" if nearest else ""
    raise RequestError(f"no published figure is called {name!r}{hint}; `python -m bit_jax.reproduce list` names all")


def show_all(request: Request, console: Console) -> int:
    """Prints a table of all figures."""
    table = Table("name", "published", "metric", "how", "of what")
    for figure in FIGURES.values():
        for number, value in enumerate(figure.values):
            first = (figure.name, figure.how, figure.what) if number == 0 else ("", "", "")
            table.add_row(first[0], value.shown, value.metric, first[1], first[2])
    console.print(table)
    if request.json is not None:
        workdir = Path("WORKDIR")
        write_json(request.json, [as_json(figure, request.data_dir, workdir) for figure in FIGURES.values()])
    return 0


def as_json(figure: Figure, data_dir: Path | None, workdir: Path, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns a figure with its source and its commands, as JSON types."""
    described = dataclasses.asdict(figure)
    return {key: described[key] for key in ("name", "what", "values", "source", "how", "data", "seeds", "reasons")} | {
        "commands": figure.commands(data_dir, workdir, more)
    }


def plan(figure: Figure, request: Request, more: tuple[str, ...], console: Console) -> int:
    """Prints what the measurement would take."""
    asked.require_plannable(figure, request.data_dir, more)
    jax.config.update("jax_platforms", "cpu")  # a GPU that is here must not be taken for the one that is asked for
    evaluated = None
    if figure.how == "evaluation":
        evaluated = asked.evaluation(figure, request.data_dir, more)
    elif figure.plan is not None:
        terminal.console(stderr=True).print("compiling a training step: a minute or two for a large model")
    content, sentences = takes(figure, evaluated, request.device)
    describe(figure, request, workdir_of(figure, request), more, console)
    for sentence in (f"data: {figure.data}", *sentences):
        console.print(f"  {sentence}")
    if request.json is not None:
        write_json(request.json, as_json(figure, request.data_dir, Path("WORKDIR"), more) | content)
    return 0


def measure(figure: Figure, request: Request, more: tuple[str, ...], console: Console) -> int:
    """Evaluates or trains, prints what is measured beside what is published, and keeps it as JSON.

    Returns:
        0, or 1 if a measured figure differs from the published one.

    Raises:
        RequestError: something is missing or wrong; see `asked.changed`, `evaluate.evaluate` and `Run.of`.
    """
    changed = asked.changed(figure, request.data_dir, more)
    if figure.needs_directory and request.data_dir is None:
        raise RequestError(f"{figure.name} needs --data-dir DATA; {figure.data}")
    workdir = workdir_of(figure, request)
    kept = workdir / RESULT
    writable(kept)
    describe(figure, request, workdir, more, console)
    if changed:
        console.print(f"  what is measured is changed by {' and '.join(changed)}, so it will not be judged")
    runs = _evaluated(figure, request, more) if figure.how == "evaluation" else _trained(figure, request, workdir, more)
    if not runs:  # this is not the first host
        return 0
    judged = judge(figure, runs, changed)
    show(figure, judged, console)
    content = as_json(figure, request.data_dir, workdir, more) | {
        "judged": [each.as_json() for each in judged],
        "runs": runs,
        "versions": figures.versions(),
    }
    for path in filter(None, (kept, request.json)):
        write_json(path, content)
    console.print(printable(f"{kept} keeps it"))
    return 1 if any(each.agrees is False for each in judged) else 0


def workdir_of(figure: Figure, request: Request) -> Path:
    return request.workdir or Path("runs/reproduce") / figure.name


def describe(figure: Figure, request: Request, workdir: Path, more: tuple[str, ...], console: Console) -> None:
    """Prints what is measured, where it is published, and the command."""
    console.print(f"{figure.name}: {figure.what}")
    console.print(f"  published: {figure.source.title}, {figure.source.address}")
    for command in figure.commands(request.data_dir, workdir, more):
        console.print(printable(f"  $ {command}"))


def _evaluated(figure: Figure, request: Request, more: tuple[str, ...]) -> list[dict[str, Any]]:
    wanted = asked.evaluation(figure, request.data_dir, more)
    outputs = {f"`-- --{name}`": getattr(wanted, name) for name in ("json", "html", "predictions")}
    require_distinct({"--json": request.json} | outputs)
    require_data(figure, wanted.dataset, wanted.split, wanted.data_dir)
    evaluation = evaluate.carry_out(wanted)
    return [] if evaluation is None else [evaluation.as_json()]


def _trained(figure: Figure, request: Request, workdir: Path, more: tuple[str, ...]) -> list[dict[str, Any]]:
    configs = [asked.training(figure, request.data_dir, workdir, seed, more) for seed in figure.seeds]
    data = configs[0].data
    require_data(figure, data.dataset, data.train_split, data.data_dir)
    results = [train.train(config) for config in configs]
    return [result for result in results if result is not None]


def require_data(figure: Figure, dataset: str, split: str, data_dir: Path | None) -> None:
    """Opens a split of the data, to say at the start where missing ones come from.

    Raises:
        RequestError: the dataset or its split is not there.
    """
    try:
        input_pipeline.open_source(dataset, split, data_dir)
    except input_pipeline.DatasetError as error:
        raise RequestError(f"{figure.name} has no data here ({error}); {figure.data}") from None


def show(figure: Figure, judged: Sequence[Judged], console: Console) -> None:
    """Prints a table of published and measured figures, and what is known to keep them apart."""
    table = Table("metric", "published", "measured", "95 % interval", "verdict")
    for each in judged:
        interval = "" if each.interval is None else " to ".join(_number(each, edge) for edge in each.interval)
        runs = "" if len(each.measured) < 2 else f" ({', '.join(_number(each, one) for one in each.measured)})"
        middle = "" if each.middle is None else _number(each, each.middle)
        table.add_row(each.value.metric, each.value.shown, f"{middle}{runs}", interval, each.verdict)
    console.print(table)
    for reason in figure.reasons:
        console.print(f"  {reason}")


def _number(judged: Judged, number: float) -> str:
    """Writes a measured number in the published one's unit."""
    if judged.value.unit == "percent":
        return f"{100 * number:.3f} %"
    return f"{number:.5f}" if judged.value.unit == "share" else f"{number:,.1f} {judged.value.unit}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
