"""Records what the reference says of every rung: the oracle, its own errors, and what rounding explains.

A candidate that is held against the record meets the same questions, inputs and limits as one that is compared with the
reference itself.
"""

import contextlib
import dataclasses
import datetime
import shlex
import sys
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from rich.console import Console

from bit_jax.formats import weights
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.flags import UserPath
from input_pipeline.terminal import printable
from parity.bundles.archive import PLAIN, VERSION, Entry, Writer, writing
from parity.ladder import accuracy
from parity.ladder.attestation import PRODUCTS, attested, precisions_of
from parity.ladder.kept import SAMPLE, Kept, Whole
from parity.ladder.ladder import Ladder, working_folder
from parity.ladder.question import Question
from parity.ladder.rungs import NARROW, QUESTIONS, Rung
from parity.ladder.verdict import LOOKS
from parity.options import Options
from parity.sides.fingerprint import fingerprint

# options that the record depends on, and that a candidate is asked with again
RECORDED = (
    *("weights", "precision", "reference", "size", "rows", "batches", "disturbances", "seed"),
    *("dataset", "train_split", "eval_split", "limit", "eval_size", "margin"),
    *("steps", "base_lr", "momentum", "warmup_steps", "decay_steps"),
)
# Values of a unit's output that a sketch keeps: some 65 of them lie beyond the quantile that is judged. An exported
# model has no float64 of its own, so that its errors are estimated from these.
SAMPLED_OF_UNITS = 1 << 16
MOST_LOGITS = 1 << 20  # logits that are kept whole; of more, each image's `TOP` largest are
TOP = 32


@dataclasses.dataclass(frozen=True)
class Record:
    """The record to write."""

    bundle: UserPath
    """File to write, such as reference.bundle. It must not exist."""
    until: Rung = "accuracy"
    """Last rung to record."""
    fingerprints: bool = False
    """Keep sketches of large arrays in place of the arrays, and no weights: a small file.
    What sketches cannot see is in docs/parity_machines.md."""


Flags = Annotated[Record, tyro.conf.OmitArgPrefixes]


class Recording(Ladder):
    """A comparison without a candidate."""

    roles = ("reference",)


def record(options: Options, request: Record, console: Console) -> bool:
    """Records the reference and prints the bundle's size.

    Raises:
        RequestError: the file exists, or the options are not possible.
        RunFailed: the reference fails, or gives numbers that no candidate can be judged by.
    """
    if request.bundle.exists():
        raise RequestError(f"--bundle {request.bundle} exists; choose another name or remove it")
    for name in ("candidate", "run", "json", "html", "junit", "baseline", "reproducer", "fail_fast", "accept", "fault"):
        if getattr(options, name) != getattr(Options(), name):
            raise RequestError(f"--{name.replace('_', '-')} is nothing that record needs; leave it to `against`")
    names = list(get_args(Rung))
    names = names[: names.index(request.until) + 1]
    with working_folder() as folder, Recording(options, folder, console) as ladder:
        if ladder.exported is not None:
            raise RequestError(
                f"--reference {options.reference} is an exported file, and has no float64 to record; give torch or jax"
            )
        matchings = {split: ladder.matching(split) for split in _splits(options, names)}
        arguments, precisions = attested(ladder, rungs=names), precisions_of(ladder)
        ladder.start(*precisions)
        manifest: dict[str, Any] = {
            "version": VERSION if options.added else PLAIN,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "parity", *sys.argv[1:]]),
            "options": {name: getattr(options, name) for name in RECORDED} | options.added,
            "until": request.until,
            "side": ladder.names["reference"],
            "architecture": str(ladder.architecture),
            "classes": {split: dataclasses.asdict(matching) for split, matching in matchings.items()},
            "eval_size": ladder.eval_size,
            "attestation": {precision: ladder.reference.attested(precision, arguments) for precision in precisions},
        }
        with writing(request.bundle, fingerprints=request.fingerprints) as writer:
            manifest |= _weights(ladder, writer, whole=not request.fingerprints)
            manifest |= _amplitude(ladder)
            manifest["questions"] = {}
            for name in names:
                for ask in QUESTIONS.get(name, ()):
                    question = ask(ladder)
                    manifest["questions"][question.task] = _looks(question, writer)
                ladder.say(f"recorded {name}")
            if "forward" in names and options.precision != "fp64":
                manifest["fed"] = {site: errors.tolist() for site, errors in ladder.reference.fed().items()}
            manifest |= _inputs(ladder, writer, names)
            if "accuracy" in names:
                manifest["accuracy"] = _accuracy(ladder, writer, request.fingerprints)
            writer.finish(manifest)
    size = request.bundle.stat().st_size / 2**20
    console.print(
        f"{printable(request.bundle)}: {size:,.1f} MiB, {manifest['side']} in {options.precision}, {names[-1]}"
    )
    return True


def _splits(options: Options, names: list[str]) -> list[str]:
    return [
        split for rung, split in (("curve", options.train_split), ("accuracy", options.eval_split)) if rung in names
    ]


def _weights(ladder: Ladder, writer: Writer, *, whole: bool) -> dict[str, Any]:
    _, arrays = weights.read(ladder.weight_file)
    member = writer.file(ladder.weight_file) if whole else None
    return {"weights": {"fingerprint": fingerprint(dict(arrays)), "file": member}}


def _amplitude(ladder: Ladder) -> dict[str, Any]:
    """Returns how much rounding disturbs the reference, in ulps of the precision asked for.

    Raises:
        RunFailed: its products are narrower than the precision.
    """
    precision = ladder.options.precision
    if precision == "fp64":
        return {}
    ulps, products = ladder.ulps("reference"), ladder.reference.products()
    if ulps > NARROW or (precision == "fp16" and any(used != PRODUCTS[precision] for used in products)):
        raise RunFailed(
            f"the reference errs as if every weight and pixel were disturbed by {ulps:.0f} ulp of {precision}, and "
            f"multiplies in {' and '.join(products)}: nothing can be judged by it"
        )
    return {"ulps": ulps, "one_ulp": ladder.one_ulp, "products": products}


def _looks(question: Question, writer: Writer) -> list[dict[str, Any]]:
    """Returns what the reference says at every look that a candidate may need."""
    ladder = question.ladder
    judged = question.judged and ladder.options.precision != "fp64"
    looks = []
    for number in range(LOOKS if question.chaotic or (judged and question.disturb) else 1):
        with ladder.forgetting() if number else contextlib.nullcontext():
            looks.append(_look(question, number, writer, judged=judged))
    return looks


def _look(question: Question, number: int, writer: Writer, *, judged: bool) -> dict[str, Any]:
    reference, precision = question.ladder.reference, question.ladder.options.precision
    sample = SAMPLED_OF_UNITS if question.task == "forward" else SAMPLE
    oracle: dict[str, list[Entry]] = {}
    for name, batches in reference.oracle(question, number):
        arrays = [_finite(name, _array(batch)) for batch in batches]
        # the weights are in the bundle, or must be had: of their arrays, fingerprints are enough
        oracle[name] = [writer.kept(array, sample=sample, sketched=question.task == "weights") for array in arrays]
    look: dict[str, Any] = {"oracle": oracle}
    if number == 0 and (losses := reference.losses(question, "fp64", {})):
        look["losses"] = {"fp64": losses}
    if question.chaotic and number == 0:  # how far rounding grows is much the same on other images
        look["grown"] = reference.grown(question, number, None)
    if not judged:
        return look
    scaled = {"scale": reference.scale(question, number)} if question.scales_loss else {}
    look["expected"] = {
        name: {
            "results": [writer.kept(_array(result), sample=sample) for result in expected.results],
            "errors": _finite(name, expected.errors).tolist(),
            "explained": None if expected.explained is None else expected.explained.tolist(),
        }
        for name, expected in reference.expected(question, number, None, scaled)
    }
    if "losses" in look:
        look["losses"] |= {precision: reference.losses(question, precision, scaled)}
    return look | scaled


def _array(kept: Kept) -> np.ndarray:
    """Returns the values of an array that a process has just computed."""
    assert isinstance(kept, Whole)
    return kept.array


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise RunFailed(f"the reference's {name} is not finite: nothing can be judged by it")
    return array


def _inputs(ladder: Ladder, writer: Writer, names: list[str]) -> dict[str, Any]:
    """Stores the images and batches that the questions were asked with."""
    files = ladder.image_files() if "pixels" in names else []
    return {
        "pictures": [writer.file(ladder.pictures(look)) for look in range(LOOKS)],
        "batches": [writer.file(ladder.dataset_batches(look)) for look in range(LOOKS)] if "curve" in names else [],
        "images": [[path.name, writer.file(path)] for path in files],
    }


def _accuracy(ladder: Ladder, writer: Writer, fingerprints: bool) -> dict[str, Any]:
    evaluated = ladder.reference.accuracy(accuracy.evaluation(ladder))
    order = np.argsort(evaluated.index, kind="stable")
    logits = _finite("logits", evaluated.logits[order])
    entry: dict[str, Any] = {
        "labels": writer.array(evaluated.labels[order]),
        "index": writer.array(evaluated.index[order]),
        "correct": evaluated.correct,
    }
    if not fingerprints or logits.size <= MOST_LOGITS:
        return entry | {"logits": writer.array(logits)}
    classes = np.argpartition(logits, -TOP, axis=1)[:, -TOP:].astype(np.int32)
    largest = np.take_along_axis(logits, classes, axis=1)
    return entry | {"largest": writer.array(largest), "classes": writer.array(classes), "of": logits.shape[1]}
