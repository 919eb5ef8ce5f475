"""What a run left in its work directory, read whether the run is finished or under way."""

import dataclasses
import functools
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bit_jax.accounts import goodput, starts
from bit_jax.accounts.goodput import Account
from bit_jax.stores.mirror import local
from bit_jax.training import metrics
from bit_jax.watching import numbers, spikes
from bit_jax.watching.spikes import Spike
from input_pipeline.errors import RequestError
from input_pipeline.files import DamagedFile, Url, is_number, read_json

FILES = (
    "config.json",
    "result.json",
    "metrics.jsonl",
    starts.NAME,
    spikes.NAME,
)  # what `read` reads of a work directory
REMEDY = "restore it, or leave this run out"
# the fields of result.json that are shown as numbers; any of them may be missing or null
NUMBERS = (
    *("hosts", "devices", "batch_per_device", "steps", "e2e_time", "compile_time", "p_whole", "p_train", "p_core"),
    *("final_acc1", "mem_gib", "mem_total_gib", "rank0_acc1", "rank0_examples", "p_core_unsynchronized"),
    "schedule_restarts_every",
)
# its fields, and the flags of config.json, that are shown as text
TEXTS = ("model", "architecture", "dataset", "precision", "device_kind", "mem_of")
FLAG_TEXTS = ("model.model", "data.dataset", "model.precision")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Record:
    """The files of one run.

    Attributes:
        workdir: the run's work directory, as it was named.
        config: the content of config.json; empty where the directory holds a result alone.
        result: the content of result.json; None before the run's end.
        metrics: the entries of metrics.jsonl.
        damaged_lines: number of lines of metrics.jsonl that could not be read.
        account: where the time went, over all starts; None where no starts.jsonl says so.
        spikes: the losses that stood out.
    """

    workdir: Path | Url
    config: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    damaged_lines: int
    account: Account | None
    spikes: list[Spike]

    @property
    def finished(self) -> bool:
        return self.result is not None

    @functools.cached_property
    def last(self) -> dict[str, Any]:
        """The newest value of each name in metrics.jsonl, and the step of the newest entry."""
        return {name: value for entry in self.metrics for name, value in entry.items()}

    @property
    def watched(self) -> dict[str, Any]:
        """The newest entry of metrics.jsonl that `--watch-every` wrote; empty if there is none."""
        return next((entry for entry in reversed(self.metrics) if not entry.keys().isdisjoint(numbers.WHOLE)), {})

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the run that config.json keeps, by "section.field"."""
        return self.config.get("config", {})

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that config.json keeps: resolution, mixup and schedule."""
        return self.config.get("recipe", {})

    @property
    def steps(self) -> str:
        """The number of steps that were taken, and the number to take while the run is not finished."""
        if self.result is not None:
            return str(self.result.get("steps", ""))
        total = self.recipe.get("schedule", {}).get("steps", "?")
        return f"{self.last.get('step', 0)} of {total}"

    @property
    def known(self) -> dict[str, Any]:
        """The fields of result.json that are known: all of a finished run, the newest figures of one under way."""
        if self.result is not None:
            return self.result
        accuracy, batch = self.last.get("val_acc1"), self.flags.get("data.batch_per_device")
        return {
            "model": self.flags.get("model.model"),
            "dataset": self.flags.get("data.dataset"),
            "precision": self.flags.get("model.precision"),
            "batch_per_device": batch if is_number(batch) else None,
            "final_acc1": accuracy if is_number(accuracy) else None,
        }


def read(workdir: Path | Url) -> Record:
    """Reads what a run left.

    Raises:
        RequestError: the directory holds no run, or a file cannot be read.
        DamagedFile: a file holds something else than a run writes.
    """
    folder = local(workdir)
    paths = {name: folder / f"{name}.json" for name in ("config", "result")}
    there = {name: path for name, path in paths.items() if path.exists()}
    if not there:
        what = "holds neither config.json nor result.json" if folder.is_dir() else "is no directory"
        raise RequestError(f"{workdir} {what}, so there is no run to report; name the --workdir of one")
    content = {name: read_json(path, dict, REMEDY) for name, path in there.items()}
    result = content.get("result")
    if result is not None:
        _check(paths["result"], result, NUMBERS, is_number, "number")
        _check(paths["result"], result, TEXTS, _is_text, "text")
        _check(paths["result"], result, ("flagperf_compat",), _is_texts, "list of texts")
        _objects(paths["result"], result, "versions")
    config = content.get("config", {})
    objects = _objects(paths["config"], config, "config", "recipe")
    _check(paths["config"], objects["config"], FLAG_TEXTS, _is_text, "text")
    _objects(paths["config"], objects["recipe"], "schedule")
    entries, damaged = metrics.read(folder / "metrics.jsonl")
    account = _of_file(folder / starts.NAME, lambda path: goodput.read(path) if path.exists() else None)
    return Record(workdir, config, result, entries, damaged, account, _of_file(folder / spikes.NAME, spikes.read))


def _of_file(path: Path, read: Callable[[Path], T]) -> T:
    """Returns what `read` returns of the file; raises RequestError if the file is there and cannot be read."""
    try:
        return read(path)
    except OSError as error:
        raise RequestError(f"cannot read {path} ({error.strerror}); {REMEDY}") from None


def _objects(path: Path, content: dict[str, Any], *names: str) -> dict[str, Any]:
    """Returns the objects of those names; a missing one is empty. Raises DamagedFile if one is no object."""
    objects = {name: content.get(name, {}) for name in names}
    for name, value in objects.items():
        if not isinstance(value, dict):
            raise DamagedFile(f"{path} is damaged ({name} is no object); {REMEDY}")
    return objects


def _check(path: Path, content: dict[str, Any], names: Sequence[str], holds: Callable[[Any], bool], kind: str) -> None:
    """Raises DamagedFile if one of the values of those names is neither None nor what it has to be."""
    for name in names:
        value = content.get(name)
        if value is not None and not holds(value):
            raise DamagedFile(f"{path} is damaged ({name} is {reprlib.repr(value)}, not a {kind}); {REMEDY}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))
