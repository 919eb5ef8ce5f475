"""Collects what both sides compute with before anything is compared.

A mismatch is shown first, because it may explain every difference that follows.
"""

from collections.abc import Collection
from typing import Any

from parity.ladder.ladder import ROLES, Ladder

# entry of the attestation -> what a mismatch in it explains
EXPLAINS = {
    "matrix products": "explains differences in the head, of the size of the narrower format",
    "convolution products": "explains differences from the first convolution on, of the size of the narrower format",
    "group norm eps": "explains differences from block1/unit01 on",
    "standardization eps": "explains differences from root_block on",
    "groups": "explains differences from block1/unit01 on",
    "weights sha256": "the two do not hold the same weights",
    "pictures sha256": "the two are not given the same images",
    "training examples": "the two do not read the same dataset",
    "evaluation examples": "the two do not read the same dataset",
}
# precision -> the format of products that must be seen; tf32 is absent, because not all hardware has it
PRODUCTS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
UNKNOWN = "unknown"


def attest(ladder: Ladder, *, rungs: Collection[str]) -> dict[str, Any]:
    """Returns {"sides": {precision: {role: entries}}, "mismatches": sentences, "classes": {split: how its labels were
    matched}}, in JSON's types.

    Args:
        rungs: names of the rungs that will be climbed; a dataset that one of them uses is attested too.

    Raises:
        RequestError: a dataset that a rung needs cannot be had, or its classes are not the head's; no process was
            started.
    """
    matchings = {split: ladder.matching(split) for _, split in _splits(ladder, rungs)}
    arguments, precisions = attested(ladder, rungs=rungs), precisions_of(ladder)
    ladder.start(*precisions)
    sides = {
        precision: {
            "reference": ladder.reference.attested(precision, arguments),
            "candidate": ladder.ask("candidate", precision, "attest", **arguments).info,
        }
        for precision in precisions
    }
    mismatches = [sentence for precision, pair in sides.items() for sentence in _mismatches(precision, pair)]
    matched = {split: f"labels are {matching.how}" for split, matching in matchings.items()}
    return {"sides": sides, "mismatches": list(dict.fromkeys(mismatches)), "classes": matched}


def attested(ladder: Ladder, *, rungs: Collection[str]) -> dict[str, Any]:
    """Returns the arguments of the attest task; see `attest` for the errors."""
    options = ladder.options
    dataset = [
        (entry, options.dataset, split, options.data_dir, ladder.matching(split).class_names)
        for entry, split in _splits(ladder, rungs)
    ]
    more: dict[str, Any] = {"dataset": dataset} if dataset else {}
    return {"images": ladder.pictures(), "program": "forward" in rungs} | more


def precisions_of(ladder: Ladder) -> list[str]:
    """Returns the precisions of a comparison: float64, and the one asked for."""
    return list(dict.fromkeys(("fp64", ladder.options.precision)))


def _splits(ladder: Ladder, rungs: Collection[str]) -> list[tuple[str, str]]:
    """Returns (entry of the attestation, split) of the datasets that rungs read."""
    splits = {"curve": ("training examples", "train_split"), "accuracy": ("evaluation examples", "eval_split")}
    return [
        (entry, getattr(ladder.options, split))
        for rung, (entry, split) in splits.items()
        if rung in rungs and rung in ladder.reads
    ]


def _mismatches(precision: str, pair: dict[str, dict[str, Any]]) -> list[str]:
    """Returns sentences on the entries that differ between the sides, and on products in another format than asked."""
    reference, candidate = (pair[role] for role in ROLES)
    sentences = []
    for entry, effect in EXPLAINS.items():
        ours, theirs = reference.get(entry, UNKNOWN), candidate.get(entry, UNKNOWN)
        if UNKNOWN not in (ours, theirs) and ours != theirs:
            where = f" in {precision}" if "products" in entry else ""
            sentences.append(
                f"{entry}{where}: {_short(ours)} on the reference, {_short(theirs)} on the candidate; this {effect}"
                if "sha256" not in entry
                else f"{entry}: {_short(ours)} on the reference, {_short(theirs)} on the candidate; {effect}"
            )
    wanted = PRODUCTS.get(precision)
    for role, entries in pair.items():
        for entry in ("matrix products", "convolution products"):
            if wanted is not None and entries[entry] != wanted:
                sentences.append(f"{precision} was asked for, but the {role}'s {entry} are {entries[entry]}")
    return sentences


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text
