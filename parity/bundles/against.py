"""Holds a candidate against a bundle: the reference's part of a comparison is read from a file that was recorded
elsewhere, and neither the reference's framework nor its machine is needed here."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from rich.console import Console

from bit_jax.config import Additions
from bit_jax.formats import weights
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.flags import UserPath
from input_pipeline.terminal import printable
from parity.bundles.archive import Reader
from parity.bundles.record import RECORDED
from parity.ladder.kept import Kept, Whole, relative_rmse
from parity.ladder.ladder import Ladder, median_ulps
from parity.ladder.question import Question
from parity.ladder.reference import Evaluated
from parity.ladder.rungs import Rung, of_forward, of_mixup
from parity.ladder.verdict import LIMIT, Expected
from parity.options import Options
from parity.sides.classes import Matching
from parity.sides.fingerprint import fingerprint
from parity.sides.weights import RANDOM


@dataclasses.dataclass(frozen=True)
class Against:
    """The bundle, and the side that is held against it."""

    bundle: tyro.conf.Positional[UserPath]
    """File that python -m parity record wrote."""
    candidate: str = "jax"
    """Side to judge, written like --candidate of a comparison."""
    torch_model: str | None = None
    """PyTorch model to judge in place of this project's, as package.module:factory."""
    torch_weights: UserPath | None = None
    """File with a state dict to load into the PyTorch model."""
    accept: tuple[str, ...] = ()
    """Differences of the attestation to accept: 'standardization eps', 'group norm eps', or both.
    The candidate, if it is this project's own, then computes with the recorded side's value."""
    weights: str | None = None
    """The recorded weights, if the bundle does not contain them: a published name or the path of an .npz.
    None: the bundle's own, or those of the name that was recorded."""
    data_dir: UserPath | None = None
    """Directory with the prepared tfds datasets, for the accuracy rung. None: tfds's default directory."""
    until: Rung | None = None
    """Last rung to run. None: the last one that was recorded."""
    run: UserPath | None = None
    """Folder that keeps the report. None: a folder below runs/parity/, named by the time."""
    json: UserPath | None = None
    """File to write the report to as JSON, too. None: only the run's folder has it."""
    html: UserPath | None = None
    """File to write the report to as a web page, too. None: only the run's folder has it."""
    junit: UserPath | None = None
    """File to write JUnit XML to, with one test case per array. None: no JUnit XML is written."""
    baseline: UserPath | None = None
    """File that keeps what runs used of their limits, and their times; see the same flag of a comparison."""
    fail_fast: bool = False
    """End a rung at the first array that differs."""

    def opened(self) -> tuple[Reader, Options, list[str]]:
        """Opens the bundle; returns it, the options of the comparison, and the names of the rungs to run.

        Raises:
            RequestError: the bundle is not to be had, or was not recorded as far as --until.
        """
        bundle, names = Reader(self.bundle), list(get_args(Rung))
        try:
            recorded = {name: bundle.manifest["options"][name] for name in RECORDED}
            recorded["decay_steps"] = tuple(recorded["decay_steps"])
            # bundles from before there were any have no entry
            recorded["additions"] = Additions(**bundle.manifest["options"].get("additions", {}))
            options = Options(**recorded, **{name: getattr(self, name) for name in _OWN})
            last = names.index(bundle.manifest["until"])
            for entry in ENTRIES:
                bundle.manifest[entry]
        except (KeyError, TypeError, ValueError) as error:
            raise bundle.damaged(error) from None
        if self.until is not None and names.index(self.until) > last:
            raise RequestError(
                f"--until {self.until}: bundle {self.bundle} was recorded until {names[last]}; take that"
            )
        if self.weights is not None:
            options = dataclasses.replace(options, weights=self.weights)
        return bundle, options, names[: 1 + (last if self.until is None else names.index(self.until))]


# entries of every bundle's manifest, see record.py
ENTRIES = ("created", "side", "attestation", "classes", "eval_size", "weights", "questions", "pictures", "images")
_OWN = (
    "candidate",
    "torch_model",
    "torch_weights",
    "data_dir",
    "run",
    "json",
    "html",
    "junit",
    "baseline",
    "fail_fast",
)
Flags = Annotated[Against, tyro.conf.OmitArgPrefixes]


class Recorded:
    """The reference's answers as a bundle has them."""

    def __init__(self, bundle: Reader, ladder: "RecordedLadder"):
        self._bundle, self._ladder = bundle, ladder

    def attested(self, precision: str, arguments: dict[str, Any]) -> dict[str, Any]:
        entries = self._bundle.manifest["attestation"][precision]
        recorded = {"recorded": self._bundle.manifest["created"], "bundle sha256": self._bundle.sha256}
        return entries | recorded

    def oracle(self, question: Question, look: int) -> Iterator[tuple[str, list[Kept]]]:
        for name, batches in self._look(question, look)["oracle"].items():
            yield name, [self._bundle.kept(entry) for entry in batches]

    def expected(
        self, question: Question, look: int, names: Sequence[str] | None, scaled: dict[str, float]
    ) -> Iterator[tuple[str, Expected]]:
        recorded = self._look(question, look)["expected"]
        for name, oracle in self.oracle(question, look):
            if name in recorded and (names is None or name in names):
                entry = recorded[name]
                results = [self._bundle.kept(result) for result in entry["results"]]
                explained = None if entry["explained"] is None else np.array(entry["explained"])
                yield name, Expected(oracle, results, np.array(entry["errors"]), explained)

    def grown(self, question: Question, look: int, names: Sequence[str] | None) -> dict[str, float]:
        return self._look(question, 0)["grown"]

    def scale(self, question: Question, look: int) -> float:
        return self._look(question, look)["scale"]

    def losses(self, question: Question, precision: str, scaled: dict[str, float]) -> list[float] | None:
        return self._look(question, 0).get("losses", {}).get(precision)

    def products(self) -> tuple[str, str]:
        return self._bundle.manifest["products"]

    def teacher(self, precision: str) -> Path | None:
        ladder, question = self._ladder, of_forward(self._ladder)
        if precision != "fp64":
            return question.candidate("fp64").arrays.path
        known = self.oracle(question, 0)
        units: dict[str, Any] = {name: array.array for name, (array,) in known if isinstance(array, Whole)}
        if len(units) < len(self._look(question, 0)["oracle"]):
            return None
        path = ladder.folder / "units.npz"
        np.savez(path, **units)
        return path

    def fed(self) -> dict[str, np.ndarray]:
        return {site: np.array(errors) for site, errors in self._bundle.manifest["fed"].items()}

    def accuracy(self, arguments: dict[str, Any]) -> Evaluated:
        entry = self._bundle.manifest["accuracy"]
        labels, index = (self._bundle.array(entry[name]) for name in ("labels", "index"))
        return Evaluated(self._logits(entry), labels, index, entry["correct"], partial="logits" not in entry)

    def _logits(self, entry: dict[str, Any]) -> np.ndarray:
        if "logits" in entry:
            return self._bundle.array(entry["logits"])
        largest, classes = (self._bundle.array(entry[name]) for name in ("largest", "classes"))
        logits = np.repeat(largest.min(axis=1, keepdims=True), entry["of"], axis=1)
        np.put_along_axis(logits, classes, largest, axis=1)
        return logits

    def _look(self, question: Question, look: int) -> dict[str, Any]:
        try:
            return self._bundle.manifest["questions"][question.task][look]
        except (KeyError, IndexError) as error:
            raise self._bundle.damaged(error) from None


class RecordedLadder(Ladder):
    """A comparison whose reference is a bundle. The candidate computes in float64 what both sides would be given by
    the reference: mixed batches and gradients, which have been held against the record before they are used."""

    roles = ("candidate",)
    reads = ("accuracy",)

    def __init__(self, bundle: Reader, options: Options, folder: Path, console: Console | None = None):
        self._bundle = bundle
        super().__init__(options, folder, console)
        self.reference = Recorded(bundle, self)

    @property
    def names(self) -> dict[str, str]:
        return {"reference": f"{self._bundle.manifest['side']} (recorded)"} | super().names

    @property
    def oracle(self) -> str:
        """The candidate: once its float64 agrees with the record, it is what its other precisions are held against."""
        return "candidate"

    def image_files(self) -> list[Path]:
        files = []
        for number, (name, member) in enumerate(self._bundle.manifest["images"]):
            if Path(name).name != name:
                raise self._bundle.damaged(ValueError(f"an image is called {name}"))
            files.append(self._bundle.extract(member, self.folder / "files" / str(number) / name))
        return files

    def pictures(self, look: int = 0) -> Path:
        return self._extracted("pictures", look)

    def dataset_batches(self, look: int = 0) -> Path:
        return self._extracted("batches", look)

    def mixed_pictures(self, look: int = 0) -> Path:
        path = self.ask("candidate", "fp64", "mix", batches=self.pictures(look)).arrays.path
        if look == 0 and "mix" in self._bundle.manifest["questions"]:
            self._check_mixup()
        return path

    def mixed_batches(self, look: int = 0) -> Path:
        return self.ask("candidate", "fp64", "mix", batches=self.dataset_batches(look)).arrays.path

    def gradients(self) -> Path:
        arguments = {"mixed": self.mixed_pictures(), "count": self.options.batches} | self.options.added
        return self.ask("candidate", "fp64", "gradients", **arguments).arrays.path

    def matching(self, split: str) -> Matching:
        recorded = self._bundle.manifest["classes"].get(split)
        return super().matching(split) if recorded is None else Matching(**recorded)

    @functools.cached_property
    def eval_size(self) -> int:
        return self._bundle.manifest["eval_size"]

    @functools.cached_property
    def one_ulp(self) -> dict[str, float]:
        return self._bundle.manifest["one_ulp"]

    @functools.cached_property
    def amplitude_in_ulp(self) -> float:
        """Amplitude of the better side. The record's disturbances are as large as the reference's own."""
        if "candidate" not in self.computing("fp64"):
            return self._bundle.manifest["ulps"]
        own = self.ask("candidate", self.options.precision, "forward", images=self.pictures()).arrays
        exact = self.ask("candidate", "fp64", "forward", images=self.pictures()).arrays
        errors = {site: relative_rmse(exact[site], own[site]) for site in self.one_ulp if site in own}
        return min(self._bundle.manifest["ulps"], median_ulps(errors, self.one_ulp))

    def _extracted(self, kind: str, look: int) -> Path:
        path = self.folder / f"{kind} {look}.npz"
        return path if path.exists() else self._bundle.extract(self._bundle.manifest[kind][look], path)

    def _check_mixup(self) -> None:
        """Raises RunFailed if the candidate's mixup is not the recorded one: nothing after it could be compared."""
        question = of_mixup(self)
        own = question.candidate("fp64").arrays
        for name, (recorded,) in self.reference.oracle(question, 0):
            if name not in own or recorded.difference(own[name]) > LIMIT:
                raise RunFailed(f"the candidate's {name} after mixup are not the recorded ones; run the loss rung")

    def _weights(self) -> Path:
        recorded = self._bundle.manifest["weights"]
        named = printable(self.options.weights)
        if recorded["file"] is not None:
            return self._bundle.extract(recorded["file"], self.folder / "weights.npz")
        try:
            path = super()._weights()
        except RequestError as error:
            raise RequestError(
                f"bundle {self._bundle.path} does not contain the weights, which were {named} ({error}); "
                "give the same ones with --weights"
            ) from None
        _, arrays = weights.read(path)
        if fingerprint(dict(arrays)) != recorded["fingerprint"]:
            what = "drawn differently here" if named.startswith(RANDOM) else "others"
            raise RequestError(
                f"bundle {self._bundle.path} was recorded with weights {recorded['fingerprint'][:12]}, and {named} are "
                f"{what}; give the recorded ones with --weights, or record without --fingerprints"
            )
        return path
