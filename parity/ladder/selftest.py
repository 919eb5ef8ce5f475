"""Does the ladder find what it claims to find? Injects known faults into one side, one after the other."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bit_jax.config import Additions
from input_pipeline.errors import RequestError
from input_pipeline.terminal import printable
from parity.faults import FAULTS, Fault
from parity.faults.additions import ADDED
from parity.ladder import rungs
from parity.ladder.attestation import attest
from parity.ladder.ladder import Ladder, RungResult, working_folder
from parity.options import Options

# Small, so that thirty ladders take minutes; it has every kind of layer, and the last batch is not full.
SMALL = Options(
    size="32",
    rows=4,
    batches=1,
    steps=6,
    warmup_steps=2,
    decay_steps=(4,),
    limit=90,
)
# weights and image size of the pairs without a fault
CLEAN = (
    ("random:R14x0.5", "33x47"),
    ("random:R26x1", "32"),
    ("random:R50x0.5", "45x30"),
    ("random:R101x0.5", "31"),
    ("random:R14x2", "17x64"),
)
CLEAN_RUNGS = ("weights", "forward", "loss", "gradients")
# what additions to the recipe can change; a pair without a fault climbs these with all of them, and their faults, too
ADDED_RUNGS = ("pixels", "loss", "gradients", "optimizer", "curve")


def selftest(names: Sequence[str], *, clean: bool, console: Console) -> bool:
    """Prints a line for each fault; returns whether all were found and, with `clean`, every untouched pair passed.

    Args:
        names: names of the faults to inject; none: all.

    Raises:
        RequestError: there is no fault of that name.
    """
    if unknown := [name for name in names if name not in FAULTS]:
        raise RequestError(f"unknown fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    passed = True
    console.print("faults injected into one side, and the first array that differs:")
    ladders: dict[Options, Ladder] = {}
    with contextlib.ExitStack() as stack:
        for fault in [FAULTS[name] for name in names or FAULTS]:
            options = options_for(fault)
            if options not in ladders:
                ladder = Ladder(options, stack.enter_context(working_folder()), console)
                ladders[options] = stack.enter_context(ladder)
            failed, detected = inject(ladders[options], fault)
            passed = passed and detected
            where = f"{failed.name}: {first_bug(failed)}, {_size(failed)}" if failed else "nothing failed"
            if not detected:
                where += f"; it should be {fault.rung}: {fault.line}... in {fault.precision}"
                where += f", and {fault.operation}" if fault.operation else ""
            console.print(Text.assemble("  ", _mark(detected), f"  {fault.description:<66} {printable(where)}"))
    if clean:
        passed = untouched(console) and passed
        passed = untouched_with_additions(console) and passed
    console.print("all as required" if passed else "NOT all as required", style="bold green" if passed else "bold red")
    return passed


def options_for(fault: Fault) -> Options:
    """Returns the options of a small comparison that must find the fault."""
    if fault.additions:  # what is wrong in an addition shows in float64, in half the time
        additions = Additions(**fault.additions)
        return dataclasses.replace(SMALL, precision="fp64", additions=additions, candidate=fault.candidate)
    # float64 is part of either
    return dataclasses.replace(SMALL, precision="fp16" if fault.precision == "fp16" else SMALL.precision)


def inject(ladder: Ladder, fault: Fault) -> tuple[RungResult | None, bool]:
    """Climbs with the fault in place; returns the first rung that fails, or None, and whether the fault was found where
    it must be."""
    ladder.fault = fault.name
    try:
        mismatches = attest(ladder, rungs=rungs.RUNGS, program=False)["mismatches"] if fault.attested else []
        attested = not fault.attested or any(sentence.startswith(fault.attested) for sentence in mismatches)
        failed = climb(ladder, ADDED_RUNGS if fault.additions else tuple(rungs.RUNGS))
    finally:
        ladder.fault = None
    if failed is None:
        return None, False
    line = next(line for line in failed.lines if line.verdict == "bug")
    right = (failed.name, line.precision) == (fault.rung, fault.precision) and first_bug(failed).startswith(fault.line)
    named = failed.details.get("operations", {"wrong": []})["wrong"]
    located = not fault.operation or named[:1] == [fault.operation]
    return failed, right and attested and located


def climb(ladder: Ladder, names: Sequence[str] = tuple(rungs.RUNGS)) -> RungResult | None:
    """Climbs the rungs of those names; returns the result of the first that fails, or None."""
    for name in names:
        result = rungs.RUNGS[name](ladder)
        if result.verdict == "bug":
            return result
    return None


def first_bug(result: RungResult) -> str:
    """Returns the name of the first array that fails in a rung."""
    return next(line.name for line in result.lines if line.verdict == "bug")


def _size(result: RungResult) -> str:
    line = next(line for line in result.lines if line.verdict == "bug")
    if line.precision == "fp64" and math.isfinite(line.difference):
        return f"{line.difference:.1e} apart"
    return line.note


def untouched(console: Console, pairs: Sequence[tuple[str, str]] = CLEAN) -> bool:
    """Climbs with pairs (weights, size) without a fault, prints a line for each, and returns whether all pass."""
    passed = True
    console.print(f"pairs without a fault, which must pass {', '.join(CLEAN_RUNGS)}:")
    for weights, size in pairs:
        options = Options(weights=weights, size=size, rows=4, batches=2)
        with working_folder() as folder, Ladder(options, folder, console) as ladder:
            failed = climb(ladder, CLEAN_RUNGS)
        where = f"{failed.name}: {first_bug(failed)}" if failed else "passed"
        console.print(Text.assemble("  ", _mark(failed is None), f"  {weights:<20} {size:<8} {printable(where)}"))
        passed = passed and failed is None
    return passed


def untouched_with_additions(console: Console, options: Options = SMALL) -> bool:
    """Climbs without a fault but with every addition to the recipe, prints a line, and returns whether that passes."""
    options = dataclasses.replace(options, additions=Additions(**ADDED))
    with working_folder() as folder, Ladder(options, folder, console) as ladder:
        failed = climb(ladder, ADDED_RUNGS)
    where = f"{failed.name}: {first_bug(failed)}" if failed else f"passed {', '.join(ADDED_RUNGS)}"
    what = "with every addition to the recipe"
    console.print(Text.assemble("  ", _mark(failed is None), f"  {what}: {printable(where)}"))
    return failed is None


def _mark(good: bool) -> tuple[str, str]:
    return ("ok    ", "green") if good else ("FAILED", "bold red")
