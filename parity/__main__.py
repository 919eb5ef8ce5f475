"""Proves, rung by rung, that two implementations of BiT compute the same: JAX against PyTorch unless told otherwise.

Rungs, in order: weights, pixels, forward, loss, gradients, optimizer, curve, accuracy. `all` runs them in that order
and stops at the first that fails. Exit code 0: it holds; 1: it does not, or a run failed; 2: the request was wrong.
"""

import contextlib
import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from rich.text import Text

from input_pipeline.bench import ARMS, Arm, Bench
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import replacing, writable, write_json
from input_pipeline.flags import UserPath
from input_pipeline.terminal import console, printable
from parity.bundles import against, record
from parity.ci import baseline
from parity.ladder import determinism, forward_only, reproducer, rungs, step
from parity.ladder.accuracy import compare_logits
from parity.ladder.attestation import attest
from parity.ladder.ladder import Ladder, RungResult, timed, working_folder
from parity.ladder.rungs import Rung
from parity.ladder.selftest import selftest
from parity.options import Options
from parity.report import junit, saved, terminal
from parity.report.difference import difference
from parity.throughput import convolutions, measure
from parity.throughput.request import Throughput

Flags = Annotated[Options, tyro.conf.OmitArgPrefixes]
PYTORCH_INPUT = Arm("torch DataLoader, Pillow, float32, as BiT's PyTorch code", "torch", "parity.in_torch.loader")
Measurement = Annotated[Throughput, tyro.conf.OmitArgPrefixes]


def main() -> int:
    """Runs the command of the command line; returns 0 if it holds, else 1."""
    commands: dict[str, Callable] = {name: _rung_command(name, rung) for name, rung in rungs.RUNGS.items()}
    commands = {
        "all": run_all,
        **commands,
        "record": run_record,
        "against": run_against,
        "selftest": run_selftest,
        "throughput": run_throughput,
        "convolutions": run_convolutions,
        "input": run_input,
        "determinism": run_determinism,
        "step": run_step,
        "show": show,
        "diff": diff,
        "trend": run_trend,
    }
    holds = tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m parity", description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )
    return 0 if holds else 1


def run_all(comparison: Flags, until: Rung = "accuracy") -> bool:
    """Runs every rung in order, up to the first that fails.

    Args:
        until: last rung to run.
    """
    names = list(get_args(Rung))
    return compare(comparison, names[: names.index(until) + 1])


def _rung_command(name: str, rung: Callable) -> Callable[..., bool]:
    def command(comparison: Flags) -> bool:
        return compare(comparison, [name])

    command.__doc__ = rung.__doc__
    return command


def run_record(comparison: Flags, request: record.Flags) -> bool:
    """Records the reference of every rung in one file, against which other machines judge their candidates.

    The file holds the inputs, the float64 oracle, the reference's own errors, what rounding explains, and what the
    reference's machine is. `against` needs nothing of that machine, nor of the reference's framework.
    """
    writable(request.bundle)
    return record.record(comparison, request, console())


def run_against(request: against.Flags) -> bool:
    """Judges a candidate by a reference that was recorded elsewhere, as if both were compared here."""
    bundle, options, names = request.opened()
    return compare(options, names, functools.partial(against.RecordedLadder, bundle))


def compare(options: Options, names: Sequence[str], ladder: Callable[[Options, Path], Ladder] = Ladder) -> bool:
    """Runs rungs, prints and saves the report; returns whether all of them hold.

    Args:
        ladder: function (options, folder of the processes' files) -> the comparison.
    """
    if options.baseline is not None:
        writable(options.baseline)
    if options.reproducer is not None:
        reproducer.refuse_unusable(options.reproducer)
        writable(options.reproducer / "README.md")
    runs = [] if options.baseline is None else baseline.opened(options.baseline)
    with _folder_for(options) as folder:
        report, results = _compared(options, names, ladder, runs)
        if options.baseline is not None:
            report["baseline"] = baseline.compared(report, runs)
            baseline.added(options.baseline, report, runs)
        return _kept(report, results, folder, options)


@contextlib.contextmanager
def _folder_for(options: Options | step.Step) -> Iterator[Path]:
    """Makes and owns the folder of a report, once every file that the flags ask for can be written."""
    for path in (options.json, options.html, options.junit):
        if path is not None:
            writable(path)
    with saved.owned(options.run) as folder:
        yield folder


def _compared(
    options: Options, names: Sequence[str], comparison: Callable[[Options, Path], Ladder], runs: list[dict[str, Any]]
) -> tuple[saved.Report, list[RungResult]]:
    """Climbs the rungs up to the first that fails; returns the report and the rungs' results.

    Args:
        runs: the runs in the baseline.
    """
    progress = console(stderr=True)
    results = []
    with working_folder() as files, comparison(options, files) as ladder:
        names = forward_only.possible(ladder, names)
        attestation = attest(ladder, rungs=names)
        of = baseline.work(dataclasses.asdict(options), ladder.names, options.precision)
        if same := baseline.same_program(of, attestation, runs):
            attestation["notes"].append(same)
        for sentence in attestation["notes"]:
            progress.print(Text.assemble(("note", "bold"), "  ", printable(sentence)))
        for sentence in attestation["mismatches"]:
            progress.print(Text.assemble(("mismatch", "bold red"), "  ", printable(sentence)))
        for split, matching in attestation["classes"].items():
            if ladder.matching(split).class_names is None:
                progress.print(f"{printable(options.dataset)}, {printable(split)}: {matching}")
        for name in names:
            results.append(result := timed(rungs.RUNGS[name], ladder))
            progress.print(f"{name}: {result.verdict}, {result.seconds:.1f} s")
            if result.verdict == "bug":
                if options.reproducer is not None:
                    reproducer.leave(ladder, result, options.reproducer, attestation)
                break
        return saved.build(ladder, attestation, results, _command()), results


def _kept(report: saved.Report, results: list[RungResult], folder: Path, options: Options | step.Step) -> bool:
    """Saves a report, shows it, and returns whether it holds."""
    output = console()
    saved.save(report, results, folder)
    report = saved.load(folder)
    _write_forms(report, folder, options)
    terminal.show(report, output)
    output.print(f"{printable(folder)}: report.json, report.html")
    return report["holds"]


def _command() -> str:
    return shlex.join(["python", "-m", "parity", *sys.argv[1:]])


def run_selftest(faults: tuple[str, ...] = (), clean: bool = True) -> bool:
    """Injects faults that ports of BiT really have, and requires each to be found at the right rung and place.

    Args:
        faults: names of the faults to inject; none of them means all faults.
        clean: also require that untouched pairs of several depths, widths and image sizes pass.
    """
    return selftest(faults, clean=clean, console=console())


def run_throughput(measurement: Measurement) -> bool:
    """Measures how fast each framework does the same work: a training step or a forward pass, eager or compiled.

    Each arm's loss is first held against float64; one that is wrong is not timed. Every arm runs in processes of its
    own, in turns with the others; only finished work is timed.
    """
    return measure.run(measurement)


def run_convolutions(measurement: Annotated[convolutions.Convolutions, tyro.conf.OmitArgPrefixes]) -> bool:
    """Measures how long every convolution of an architecture takes in each framework, worst first.

    The passes are forward, the gradient by the input and the gradient by the kernel, each by itself on random data:
    what a compiler team wants to know. What a training step does beside its convolutions, and what it fuses with them,
    is not in these times.
    """
    return convolutions.run(measurement)


def run_input(bench: Annotated[Bench, tyro.conf.OmitArgPrefixes]) -> bool:
    """Measures training input in images/s: train.py's loader, PyTorch's DataLoader, and tf.data where installed."""
    bench.run(ARMS | {"torch": PYTORCH_INPUT}, "python -m parity input")
    return True


def run_determinism(request: determinism.Flags) -> bool:
    """Repeats the same work in several processes, and requires the same bits from each.

    The work is a forward pass, the gradients of a batch, and a few training steps. What differs is named: the first
    unit on the way forward, the first gradient on the way back. Exit code 0: nothing differs; 1: something does.
    """
    if request.json is not None:
        writable(request.json)
    return determinism.run(request, console())


def run_step(request: step.Flags) -> bool:
    """Judges a step of a real run of train.py, on its own checkpoint and its own batch: why does the loss drift apart?

    Does the code at hand compute the step right, in both frameworks and float64? And does what the run recorded, its
    losses and its next checkpoint, follow from the checkpoint before? Exit code 0: both hold; 1: one of them does not.
    """
    with _folder_for(request) as folder:
        found = step.examine(request, console(stderr=True))
        report = saved.build(found.ladder, found.attestation, found.results, _command())
        report |= {"answers": found.answers, "conclusion": found.conclusion}
        return _kept(report, found.results, folder, request)


def show(run: tyro.conf.Positional[UserPath], html: UserPath | None = None, margin: float | None = None) -> bool:
    """Shows a saved run again.

    Args:
        run: folder of the saved run.
        html: file to write the run's page to.
        margin: margin in percentage points at which accuracy is judged anew, from the saved logits.
    """
    from parity.report import page

    report = saved.load(run)
    if margin is not None:
        report = _rejudged(report, saved.load_logits(run), margin)
    if html is not None:
        page.write(report, html, _logits(run))
    terminal.show(report, console())
    return report["holds"]


def diff(before: tyro.conf.Positional[UserPath], after: tyro.conf.Positional[UserPath], margin: float = 0.1) -> bool:
    """Shows what changed from one saved run to another: attestation, verdicts, errors, predictions.

    Args:
        before: folder of the earlier saved run.
        after: folder of the later saved run.
        margin: percentage points within which two accuracies count as the same.
    """
    output = console()
    better = difference(saved.load(before), saved.load(after), output)
    if not all((run / "logits.npz").exists() for run in (before, after)):
        return better
    old, new = saved.load_logits(before), saved.load_logits(after)
    if not (np.array_equal(old["ids"], new["ids"]) and np.array_equal(old["labels"], new["labels"])):
        output.print("the two evaluated different images; their predictions are not compared")
        return better
    judged = compare_logits(old["candidate"], new["candidate"], old["labels"], margin / 100, "fp32")
    output.print("the candidate's predictions, before (as the reference) and after (as the candidate):")
    for sentence in terminal.accuracy_sentences(judged.details | {"margin": margin}):
        output.print(f"  {printable(sentence)}")
    return better and judged.verdict != "bug"


def run_trend(runs: tyro.conf.Positional[tuple[UserPath, ...]], html: UserPath = Path("trend.html")) -> bool:
    """Shows many saved runs on one page: what each used of its limits, its times, and what it computed with.

    Exit code 0: the latest run holds; 1: it does not.

    Args:
        runs: folders of saved runs.
        html: file to write the page to.
    """
    from parity.ci import trend

    if not runs:
        raise RequestError("trend needs the folders of saved runs, such as runs/parity/*")
    writable(html)
    reports = trend.write(runs, html)
    console().print(f"{printable(html)}: {len(reports)} runs, {reports[0]['created']} to {reports[-1]['created']}")
    return reports[-1]["holds"]


def _rejudged(report: saved.Report, logits: dict[str, np.ndarray], margin: float) -> saved.Report:
    """Returns the report with the accuracy rung's verdicts at another margin."""
    judged = compare_logits(
        logits["reference"], logits["candidate"], logits["labels"], margin / 100, report["precision"]
    )
    return saved.with_accuracy(report, judged, margin)


def _logits(run: Path) -> dict[str, np.ndarray] | None:
    """Reads the logits of a saved run that has an accuracy rung."""
    return saved.load_logits(run) if (run / "logits.npz").exists() else None


def _write_forms(report: saved.Report, folder: Path, options: Options | step.Step) -> None:
    """Writes the page into the run's folder, and the files that the flags ask for."""
    from parity.report import page

    logits = _logits(folder)
    for path in (folder / "report.html", options.html):
        if path is not None:
            page.write(report, path, logits)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, report)
    if options.junit is not None:
        options.junit.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.junit) as file:
            file.write(junit.to_xml(report))


if __name__ == "__main__":
    sys.exit(exit_code(main))
