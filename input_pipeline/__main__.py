"""Prepares datasets before training, checks them, and measures how fast they are read.

Exit code 0: done; 1: the dataset has faults; 2: the request was wrong.
"""

import sys
from typing import Annotated

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from input_pipeline import prepare as preparing
from input_pipeline.bench import ARMS, Bench
from input_pipeline.check import Checked, check
from input_pipeline.examples import descriptors
from input_pipeline.exits import exit_code
from input_pipeline.flags import UserPath
from input_pipeline.limits import raise_descriptor_limit, require_descriptors
from input_pipeline.sources import open_source, split_names
from input_pipeline.terminal import console, printable


def main() -> int:
    raise_descriptor_limit()
    commands = {"prepare": _prepare, "convert": _convert, "check": _check, "bench": _bench}
    holds = tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m input_pipeline", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return 0 if holds is not False else 1


def _prepare(
    dataset: tyro.conf.Positional[str],
    data_dir: UserPath,
    manual_dir: UserPath | None = None,
    subset: bool = False,
    skip_md5: bool = False,
    skip_check: bool = False,
) -> bool:
    """Writes a tfds dataset as array_record, once, for training to read. Needs TensorFlow; training does not.

    Args:
        dataset: Name of the dataset: imagenet2012, or another tfds image classification dataset, which tfds downloads.
        data_dir: Directory that receives the dataset; give the same to train.py.
        manual_dir: Directory with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which imagenet2012 needs.
        subset: Accept imagenet2012 archives that hold only some of the images, on purpose.
        skip_md5: Do not read the imagenet2012 archives once more to compare their MD5.
        skip_check: Do not read every record afterwards.
    """
    errors = console(stderr=True)
    preparing.prepare(dataset, data_dir, manual_dir, subset=subset, verify_md5=not skip_md5, console=errors)
    if skip_check:
        errors.print("skipped: reading every record, as --skip-check says; python -m input_pipeline check does it")
        return True
    return _check(dataset, data_dir)


def _convert(dataset: tyro.conf.Positional[str], data_dir: UserPath) -> bool:
    """Adds array_record to a dataset that tfds prepared as tfrecord; the old files stay.

    Args:
        dataset: Name of the dataset.
        data_dir: Directory with the prepared tfds datasets; give the same to train.py.
    """
    preparing.convert(dataset, data_dir, console(stderr=True))
    return _check(dataset, data_dir)


def _check(
    dataset: tyro.conf.Positional[str],
    data_dir: UserPath | None = None,
    splits: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SPLIT...")] = (),
) -> bool:
    """Reads and decodes every record, as training will, and lists what is damaged; exit code 1 if anything is.

    Args:
        dataset: Dataset to read, written like train.py's --dataset: imagenet2012, cifar10, folder:PATH, ...
        data_dir: Directory with the prepared tfds datasets. None: tfds's default directory.
        splits: Splits to read, or slices such as train[:1%]. Without any, all splits are read.
    """
    sources = [open_source(dataset, split, data_dir) for split in splits or split_names(dataset, data_dir)]
    # readers stay open from the first split to the last
    require_descriptors(sum(descriptors(source) for source in sources), dataset)
    results = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console(stderr=True)) as progress:
        for source in sources:
            task = progress.add_task(f"reading {printable(source.name)}", total=len(source))
            results.append(check(source, lambda done, task=task: progress.update(task, completed=done)))
    _show(results)
    return all(result.holds for result in results)


def _bench(bench: Annotated[Bench, tyro.conf.OmitArgPrefixes]) -> None:
    """Measures training input in images/s, side by side with tf.data where it is installed.

    `python -m parity input` compares with PyTorch's DataLoader as well.
    """
    bench.run(ARMS, "python -m input_pipeline bench")


def _show(results: list[Checked]) -> None:
    table = Table("split", "examples", "classes", "smallest image", "largest", "damaged", "wrong")
    for result in results:
        least, most = (f"{height}x{width}" for height, width in (result.least, result.most))
        counts = (f"{count:,}" for count in (result.examples, result.classes))
        table.add_row(printable(result.name), *counts, least, most, f"{result.damaged:,}", f"{result.wrong:,}")
    output = console(width=120)
    output.print(table)
    for result in results:
        for fault in result.faults:
            output.print(printable(f"{result.name}: {fault}"))
        more = result.damaged + result.wrong - len(result.faults)
        if more:
            output.print(printable(f"{result.name}: and {more:,} more"))


if __name__ == "__main__":
    sys.exit(exit_code(main))
