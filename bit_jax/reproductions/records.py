"""What a published figure is: its value as printed, its source, and the command that measures it again."""

import dataclasses
import shlex
from decimal import Decimal
from pathlib import Path
from typing import Literal

from bit_jax.plan.request import Request as PlanRequest

Unit = Literal["percent", "share", "images/s", "s", "GiB"]
SCALE = {"percent": Decimal("0.01")}  # of a unit, in the figure's own; others are kept as they are
ACCURACIES: tuple[Unit, ...] = ("percent", "share")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a figure is published.

    Attributes:
        title: what it is, with the version or commit that was read.
        address: https address of it, or a path in this repository.
    """

    title: str
    address: str


@dataclasses.dataclass(frozen=True)
class Value:
    """One published number.

    Attributes:
        metric: the key of the measured figure, in the JSON of an evaluation or in a run's result.json.
        printed: the number as it is printed; its last digit says how it is rounded. Empty: only a range is published.
        unit: what it is in; an accuracy is in percent or a share of 1.
        examples: number of examples that an accuracy is of.
        lowest, highest: the smallest and the largest of several runs, of which `printed` is the median.
        compat: key of the figure that --flagperf-compat measures FlagPerf's way; it is compared where a run has it.
    """

    metric: str
    printed: str
    unit: Unit = "percent"
    examples: int | None = None
    lowest: str | None = None
    highest: str | None = None
    compat: str = ""

    @property
    def is_accuracy(self) -> bool:
        return self.unit in ACCURACIES

    @property
    def shown(self) -> str:
        """The number as it is published, with its unit, or the range."""
        unit = {"percent": " %", "share": ""}.get(self.unit, f" {self.unit}")
        if self.spread is None:
            return f"{self.printed}{unit}"
        median = f"{self.printed}{unit}, " if self.printed else ""
        return f"{median}{self.lowest} to {self.highest}{unit}"

    @property
    def rounded_from(self) -> tuple[Decimal, Decimal]:
        """The smallest and the largest number that are printed so; an accuracy's as shares of 1."""
        return _below(self.printed, self.unit), _above(self.printed, self.unit)

    @property
    def spread(self) -> tuple[Decimal, Decimal] | None:
        """The range of the published runs, with its rounding, or None if there is only one number."""
        if self.lowest is None or self.highest is None:
            return None
        return _below(self.lowest, self.unit), _above(self.highest, self.unit)


def _half_of_the_last_digit(printed: str) -> Decimal:
    exponent = Decimal(printed).as_tuple().exponent
    assert isinstance(exponent, int)  # only infinities and NaN have a letter there
    return Decimal(5).scaleb(exponent - 1)


def _below(printed: str, unit: Unit) -> Decimal:
    return (Decimal(printed) - _half_of_the_last_digit(printed)) * SCALE.get(unit, Decimal(1))


def _above(printed: str, unit: Unit) -> Decimal:
    return (Decimal(printed) + _half_of_the_last_digit(printed)) * SCALE.get(unit, Decimal(1))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published figure, or several of one run, and how it is measured again.

    Attributes:
        name: what `python -m bit_jax.reproduce` calls it.
        what: a sentence: which weights, which examples, which view of them.
        values: the published numbers.
        source: where they are published.
        how: `evaluation` of published weights, or `training`.
        words: the arguments of `python -m bit_jax.evaluate` or of `python train.py`; `{data_dir}` in them is replaced.
        examples: number of examples of the split that the accuracy is measured on here.
        data: a clause that says where the data come from.
        seeds: the seeds of the runs, for training.
        steps: number of training steps of a run.
        reasons: sentences: what is known to keep the measured figure from being equal.
        plan: the training step to plan for; None for evaluations and where nothing has to be planned.
    """

    name: str
    what: str
    values: tuple[Value, ...]
    source: Source
    how: Literal["evaluation", "training"]
    words: str
    examples: int
    data: str
    seeds: tuple[int, ...] = (0,)
    steps: int = 0
    reasons: tuple[str, ...] = ()
    plan: PlanRequest | None = None

    @property
    def dataset(self) -> str:
        words = shlex.split(self.words)
        if "--dataset" in words:
            return words[words.index("--dataset") + 1]
        return "imagenet2012" if words[0] == "flagperf" else words[0]

    def arguments(self, data_dir: Path | None, more: tuple[str, ...] = ()) -> list[str]:
        """Returns the arguments of the command, without --workdir and --seed.

        Args:
            data_dir: directory of the data; None: tfds's default, and DATA in a path.
            more: arguments that are added at the end, where they replace earlier ones.
        """
        words = [word.format(data_dir="DATA" if data_dir is None else data_dir) for word in shlex.split(self.words)]
        if data_dir is not None and not self.needs_directory and self.dataset != "digits":
            words += ["--data-dir", str(data_dir)]
        return [*words, *more]

    @property
    def needs_directory(self) -> bool:
        """Whether the dataset lies in a directory that has to be named."""
        return "{data_dir}" in self.words

    def commands(self, data_dir: Path | None, workdir: Path, more: tuple[str, ...] = ()) -> list[str]:
        """Returns the command lines that measure the figure, one for each seed."""
        arguments = self.arguments(data_dir, more)
        if self.how == "evaluation":
            return [f"python -m bit_jax.evaluate {shlex.join(arguments)}"]
        return [f"python train.py {shlex.join([*arguments, *self.of_run(workdir, seed)])}" for seed in self.seeds]

    @classmethod
    def of_run(cls, workdir: Path, seed: int) -> list[str]:
        """Returns the flags that one seed's run has in addition."""
        return ["--seed", str(seed), "--workdir", str(cls.folder(workdir, seed))]

    @staticmethod
    def folder(workdir: Path, seed: int) -> Path:
        """Returns the folder of one seed's run."""
        return workdir / f"seed{seed}"
