"""A tfds dataset prepared once, as array_record, checked before and after. The only place that needs TensorFlow."""

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from input_pipeline import imagenet
from input_pipeline.examples import DatasetError
from input_pipeline.tfds_source import FILE_FORMAT, is_prepared, open_builder

RECORD = "prepared.json"  # beside the dataset: what it was made from, and what was verified


def prepare(
    dataset: str, data_dir: Path, manual_dir: Path | None, *, subset: bool, verify_md5: bool, console: Console
) -> None:
    """Leaves the whole dataset under `data_dir`, or nothing of it.

    Args:
        dataset: a tfds image classification dataset; imagenet2012 is made from the archives in `manual_dir`, others
            from what tfds downloads.
        subset: of imagenet2012: the archives hold only some images on purpose.
        verify_md5: of imagenet2012: read the archives once more to compare their MD5.

    Raises:
        DatasetError: it cannot be prepared; the message names the reason.
    """
    builder = open_builder(dataset, data_dir)
    target = Path(builder.data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    with _sole(data_dir / f".{builder.name}.lock"):
        if is_prepared(builder):
            console.print(f"{target} is prepared already")
            return
        if builder.info.splits:
            raise DatasetError(
                f"{target} is in another format than {FILE_FORMAT}; python -m input_pipeline convert {dataset} "
                f"--data-dir {data_dir} converts it, without the archives"
            )
        _require_tensorflow()  # before the archives are read for minutes
        made_from: dict[str, Any] = {}
        if builder.name == "imagenet2012":
            if manual_dir is None:
                raise DatasetError("imagenet2012 is made from two archives; name their directory with --manual-dir")
            made_from = _imagenet_preflight(builder, manual_dir, data_dir, subset, verify_md5, console)
        _remove_incomplete(target, console)
        console.print(f"writing {target}: tfds reads everything, shuffles it, and writes it in shards")
        _download_and_prepare(builder, data_dir, manual_dir)
        _compare_counts(open_builder(dataset, data_dir), made_from.get("images", {}))
        _write_record(target, made_from)


def convert(dataset: str, data_dir: Path, console: Console) -> None:
    """Adds array_record to a dataset that tfds prepared in another format; what an earlier attempt converted is kept.

    Raises:
        DatasetError: there is no such dataset, or it cannot be converted.
    """
    builder = open_builder(dataset, data_dir)
    target = Path(builder.data_dir)
    if is_prepared(builder):
        console.print(f"{target} is prepared as {FILE_FORMAT} already")
        return
    if not builder.info.splits:
        raise DatasetError(f"{target} holds no dataset to convert; prepare it instead")
    imagenet.check_room(data_dir, builder.info.dataset_size)
    with _sole(data_dir / f".{builder.name}.lock"):
        utils = _conversion()
        with _failures(f"{target} cannot be converted"):
            # in place: shards are added one by one, and the format is announced when all are there;
            # one worker, because the errors of several are lost
            utils.convert_dataset(
                dataset_version_dir=os.fspath(target), out_dir=None, out_file_format=FILE_FORMAT, num_workers=1
            )
    if not is_prepared(open_builder(dataset, data_dir)):
        raise DatasetError(f"{target} was not converted; see what tfds printed above")


def _imagenet_preflight(
    builder: Any, manual_dir: Path, data_dir: Path, subset: bool, verify_md5: bool, console: Console
) -> dict[str, Any]:
    """Everything that can be known before the long part; what it found, for the record."""
    archives = (imagenet.TRAIN, imagenet.VALIDATION)
    paths = {archive: imagenet.find(manual_dir, archive, subset=subset) for archive in archives}
    sizes = {archive: path.stat().st_size for archive, path in paths.items()}
    imagenet.check_room(data_dir, sum(sizes.values()))
    train, validation = paths.values()
    synsets = builder.info.features["label"].names
    with _reading(f"names in {train.name}", sizes[imagenet.TRAIN], console) as advance:
        images = {imagenet.TRAIN: imagenet.train_images(train, synsets, subset=subset, advance=advance)}
    with _reading(f"names in {validation.name}", sizes[imagenet.VALIDATION], console) as advance:
        images[imagenet.VALIDATION] = imagenet.validation_images(validation, subset=subset, advance=advance)
    for archive, path in paths.items():
        console.print(f"{path}: {sizes[archive]:,} bytes, {images[archive]:,} images, names in order")
    if subset:
        console.print("subset: sizes, counts and MD5 are not compared with the whole archives'")
    elif not verify_md5:
        console.print("skipped: the MD5 of the archives, as --skip-md5 says")
    else:
        for archive, path in paths.items():
            with _reading(f"MD5 of {archive.name}", sizes[archive], console) as advance:
                imagenet.verify_md5(path, archive, advance)
            console.print(f"{path}: MD5 {archive.md5}")
    verified = verify_md5 and not subset
    return {
        "subset": subset,
        "images": {"train": images[imagenet.TRAIN], "validation": images[imagenet.VALIDATION]},
        "archives": {
            archive.name: {"bytes": sizes[archive], "md5": archive.md5 if verified else None} for archive in archives
        },
    }


def _compare_counts(builder: Any, expected: dict[str, int]) -> None:
    """Whether what was written has as many examples as the archives; what has not is removed."""
    for split, images in expected.items():
        written = builder.info.splits[split].num_examples
        if written != images:
            shutil.rmtree(builder.data_dir)
            raise DatasetError(f"tfds wrote {written:,} {split} examples of {images:,}; nothing was kept, start again")


def _download_and_prepare(builder: Any, data_dir: Path, manual_dir: Path | None) -> None:
    import tensorflow_datasets as tfds

    # downloads that other datasets need are kept beside them; imagenet2012 needs none
    settings = tfds.download.DownloadConfig(manual_dir=manual_dir and os.fspath(manual_dir))
    with _failures(f"tfds cannot prepare {builder.info.full_name}"):
        builder.download_and_prepare(
            download_dir=os.fspath(data_dir / "downloads"), download_config=settings, file_format=FILE_FORMAT
        )


def _require_tensorflow() -> None:
    """tfds prepares and converts with TensorFlow's file system and readers."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it announces them
    if importlib.util.find_spec("tensorflow") is None:
        raise DatasetError(
            "preparing a dataset needs TensorFlow, training does not; pip install -c constraints.txt -e '.[prepare]'"
        )


def _conversion() -> Any:
    """tfds's conversion, which can run on Beam and is imported with it, but does not use it here."""
    _require_tensorflow()
    beam: Any = types.ModuleType("apache_beam")
    beam.DoFn = object
    with mock.patch.dict(sys.modules, {"apache_beam": beam}):
        from tensorflow_datasets.scripts.cli import convert_format_utils
    return convert_format_utils


def _remove_incomplete(target: Path, console: Console) -> None:
    """What a killed attempt left: tfds writes into a directory beside the target and renames it at the end."""
    for path in target.parent.glob(f"incomplete.*_{target.name}"):
        if re.fullmatch(rf"incomplete\.[A-Z0-9]{{6}}_{re.escape(target.name)}", path.name):
            console.print(f"removing {path}, which an interrupted attempt left")
            shutil.rmtree(path)


def _write_record(target: Path, made_from: dict[str, Any]) -> None:
    temporary = target / f".{RECORD}"
    temporary.write_text(json.dumps(made_from, indent=2) + "\n")
    temporary.replace(target / RECORD)


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Whatever tfds raises is what is wrong with the request or the machine; its first line says it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk that is full, a folder that cannot be written: the sentence for it is another
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DatasetError(f"{what}: {lines[0][:400]}") from error


@contextlib.contextmanager
def _sole(lock: Path) -> Iterator[None]:
    """One process at a time."""
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(f"another process prepares this dataset (it holds {lock}); wait for it") from None
        yield


@contextlib.contextmanager
def _reading(what: str, size: int, console: Console) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=size)
        yield lambda done: progress.update(task, completed=done)
