"""The ladder's last rung: both sides classify the same dataset, and their predictions are compared in pairs."""

from typing import Any

import numpy as np

from parity.ladder import statistics, verdict
from parity.ladder.kept import relative_difference
from parity.ladder.ladder import Ladder, RungResult
from parity.ladder.reference import evaluated
from parity.ladder.verdict import Line, Verdict


def accuracy(ladder: Ladder) -> RungResult:
    """Compares acc1 and acc5 of both sides on the same dataset, with every example exactly once."""
    options = ladder.options
    source, arguments = ladder.source(options.eval_split), evaluation(ladder)
    answers = {
        "reference": ladder.reference.accuracy(arguments),
        "candidate": evaluated(ladder, "candidate", arguments),
    }
    examples = min(len(source), options.limit or len(source))
    logits, labels = {}, {}
    result = RungResult("accuracy", [])
    for role, answer in answers.items():
        seen = np.bincount(answer.index, minlength=examples)
        missing, repeated = int((seen == 0).sum()), int((seen > 1).sum())
        covered = not missing and not repeated and len(seen) == examples
        note = "" if covered else f"{missing} of {examples} examples missing, {repeated} seen more than once"
        result.lines.append(_fact(f"{role}: every example once", options.precision, covered, note))
        if not covered:
            result.findings.append(f"the {role} evaluated {len(answer.index)} rows of {examples} examples: {note}")
            continue
        order = np.argsort(answer.index)
        logits[role], labels[role] = answer.logits[order], answer.labels[order]
        ranks = statistics.rank(logits[role], labels[role])
        counted = {f"correct{k}": int((ranks < k).sum()) for k in (1, 5)}
        right = answer.correct == counted
        note = "" if right else f"it counted {answer.correct}, its logits say {counted}"
        result.lines.append(_fact(f"{role}: counts follow from its logits", options.precision, right, note))
    if len(logits) < 2:
        return result
    truth = labels["reference"]
    result.lines.append(verdict.exact("accuracy", "labels", options.precision, truth, labels["candidate"]))
    if answers["reference"].partial:
        logits["reference"] = _completed(logits["reference"], logits["candidate"])
    judged = compare_logits(logits["reference"], logits["candidate"], truth, options.margin / 100, options.precision)
    result.lines += judged.lines
    result.findings += judged.findings
    result.details = judged.details | {"size": ladder.eval_size, "dataset": source.name, "margin": options.margin}
    result.details["class_names"] = list(source.class_names)
    result.details["arrays"] = {"labels": truth, "ids": _ids(source, examples), **logits}
    return result


def evaluation(ladder: Ladder) -> dict[str, Any]:
    """Returns the arguments of the accuracy task."""
    options = ladder.options
    devices = max(side.devices for side in ladder.sides.values())
    return {
        "dataset": options.dataset,
        "split": options.eval_split,
        "data_dir": options.data_dir,
        "class_names": ladder.matching(options.eval_split).class_names,
        "size": ladder.eval_size,
        "batch": -(-options.rows // devices) * devices * 4,
        "limit": options.limit,
    }


def compare_logits(
    reference: np.ndarray, candidate: np.ndarray, labels: np.ndarray, margin: float, precision: str
) -> RungResult:
    """Compares two sides' logits [images, classes] of the same images.

    Args:
        labels: number of each image's class.
        margin: share of images within which two accuracies count as the same: 0.001 for 0.1 percentage points.
        precision: precision that the lines of the result name.
    """
    right = [statistics.rank(logits, labels) < 1 for logits in (reference, candidate)]
    top5 = [float((statistics.rank(logits, labels) < 5).mean()) for logits in (reference, candidate)]
    paired = statistics.Paired.count(*right)
    error, flipped = statistics.flips(reference, candidate)
    unexplained = [flip for flip in flipped if not flip["expected"]]
    equivalence = paired.equivalence(margin)
    finite = bool(np.isfinite(reference).all() and np.isfinite(candidate).all())
    difference = relative_difference(reference, candidate)
    judged: Verdict = "equal" if np.array_equal(reference, candidate) else "rounding"
    notes = [
        f"{len(flipped)} predictions differ, {len(unexplained)} by more than rounding explains",
        f"accuracy differs by {100 * paired.difference:+.4f} points, beyond the margin of {100 * margin:g}",
    ]
    lines = [
        Line("accuracy", "logits", precision, judged if finite else "bug", difference, np.inf, note=""),
        _fact("flipped predictions", precision, not unexplained, notes[0] if flipped else ""),
        _fact("equivalence", precision, equivalence != "refuted", notes[1] if equivalence == "refuted" else ""),
    ]
    low, high = paired.interval()
    details = {
        "examples": paired.examples,
        "acc1": [float(side.mean()) for side in right],
        "acc5": top5,
        "table": [[paired.both, paired.reference_only], [paired.candidate_only, paired.neither]],
        "difference": paired.difference,
        "interval": [low, high],
        "mcnemar": paired.mcnemar(),
        "equivalence": equivalence,
        "examples_needed": paired.examples_needed(margin),
        "measured_error": error,
        "flips": flipped,
    }
    findings = [note for note, line in zip(notes, lines[1:], strict=True) if line.verdict == "bug"]
    return RungResult("accuracy", lines, findings, details)


def _completed(partial: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Returns logits of which only each row's largest are known, with the candidate's in place of those that are not,
    unless they are larger than the least that is known: no difference is claimed that was not seen."""
    least = partial.min(axis=1, keepdims=True)
    return np.where(partial == least, np.minimum(candidate, least), partial)


def _fact(name: str, precision: str, holds: bool, note: str = "") -> Line:
    """Returns the line of a statement that is either true or a bug."""
    return Line("accuracy", name, precision, "equal" if holds else "bug", 0.0 if holds else np.inf, 0.0, note=note)


def _ids(source: Any, examples: int) -> np.ndarray:
    """Returns the ids of the first examples of a dataset."""
    return np.array([str(source[index]["id"]) for index in range(examples)])
