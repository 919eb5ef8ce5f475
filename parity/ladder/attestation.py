"""Collects what both sides compute with before anything is compared.

A mismatch is shown first, because it may explain every difference that follows.
"""

from collections.abc import Collection
from typing import Any

from parity.ladder import forward_only
from parity.ladder.acceptance import accept
from parity.ladder.ladder import ROLES, Ladder
from parity.sides.tasks import UNKNOWN

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


def attest(ladder: Ladder, *, rungs: Collection[str], program: bool = True) -> dict[str, Any]:
    """Returns what both sides compute with, in JSON's types.

    The result has the keys "sides" ({precision: {role: entries}}), "mismatches" (sentences), "accepted" (a clause for
    each difference that --accept allows), "notes" (sentences on these and on what is not compared), and "classes"
    ({split: how its labels were matched}).

    Args:
        rungs: names of the rungs that will be climbed; a dataset that one of them uses is attested too.
        program: whether JAX's sides compile the forward pass, if it is climbed, and give its hash.

    Raises:
        RequestError: a dataset that a rung needs cannot be had, or its classes are not the head's, and no process was
            started; or a difference cannot be accepted, or an exported file does not take the images.
    """
    matchings = {split: ladder.matching(split) for _, split in _splits(ladder, rungs)}
    arguments, precisions = attested(ladder, rungs=rungs, program=program), precisions_of(ladder)

    def entries(role: str, precision: str = "fp64") -> dict[str, Any]:
        if role == "reference":
            return ladder.reference.attested(precision, arguments)
        return ladder.ask(role, precision, "attest", **arguments).info

    accepted, same = accept(ladder, entries)
    ladder.start(*precisions)
    sides = {
        precision: {role: entries(role, precision) for role in ladder.computing(precision)} for precision in precisions
    }
    if ladder.exported is not None:
        forward_only.check(ladder, sides[ladder.options.precision][ladder.exported]["takes"], rungs)
    notes = [f"accepted: {clause}" for clause in accepted] + same + forward_only.notes(ladder)
    mismatches = [sentence for precision, pair in sides.items() for sentence in _mismatches(precision, pair)]
    matched = {split: f"labels are {matching.how}" for split, matching in matchings.items()}
    return {
        "sides": sides,
        "mismatches": list(dict.fromkeys(mismatches)),
        "accepted": accepted,
        "notes": notes,
        "classes": matched,
    }


def attested(ladder: Ladder, *, rungs: Collection[str], program: bool = True) -> dict[str, Any]:
    """Returns the arguments of the attest task; see `attest` for the errors."""
    options = ladder.options
    dataset = [
        (entry, options.dataset, split, options.data_dir, ladder.matching(split).class_names)
        for entry, split in _splits(ladder, rungs)
    ]
    more: dict[str, Any] = {"dataset": dataset} if dataset else {}
    return {"images": ladder.pictures(), "program": program and "forward" in rungs} | more


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
    reference, candidate = (pair.get(role, {}) for role in ROLES)
    sentences = []
    for entry, effect in EXPLAINS.items():
        ours, theirs = (entries.get(entry, UNKNOWN) for entries in (reference, candidate))
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
            if wanted is not None and entries[entry] not in (wanted, UNKNOWN):
                sentences.append(f"{precision} was asked for, but the {role}'s {entry} are {entries[entry]}")
    return sentences


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text
