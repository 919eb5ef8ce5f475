"""Prepares a tfds dataset once, as array_record, with checks before and after. Only this needs TensorFlow."""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from input_pipeline import imagenet
from input_pipeline.claims import CLAIM, claimed
from input_pipeline.examples import DatasetError
from input_pipeline.files import replacing, write_json
from input_pipeline.terminal import printable
from input_pipeline.tfds_source import FILE_FORMAT, is_prepared, open_builder

RECORD = "prepared.json"  # file in the dataset's directory that says what it was made from and what was verified
STAGED = ".input_pipeline"  # file that marks a directory of unfinished work as this program's own


def prepare(
    dataset: str, data_dir: Path, manual_dir: Path | None, *, subset: bool, verify_md5: bool, console: Console
) -> None:
    """Prepares the whole dataset under `data_dir`, or leaves nothing of it.

    Args:
        dataset: a tfds image classification dataset; imagenet2012 is made from the archives in `manual_dir`, others
            from files that tfds downloads.
        subset: whether imagenet2012's archives hold only some images on purpose.
        verify_md5: whether to read imagenet2012's archives once more to compare their MD5.

    Raises:
        DatasetError: the dataset cannot be prepared; the message names the reason.
        InUse: another process prepares or converts the dataset.
    """
    builder = open_builder(dataset, data_dir)
    if _prepared_already(builder, console):
        return
    name = builder.name
    data_dir.mkdir(parents=True, exist_ok=True)
    with _claimed(data_dir, name):
        builder = open_builder(dataset, data_dir)  # anew: another process may just have ended
        if _prepared_already(builder, console):
            return
        target = Path(builder.data_dir)
        if builder.info.splits:
            raise DatasetError(
                f"{target} is in another format than {FILE_FORMAT}; python -m input_pipeline convert {dataset} "
                f"--data-dir {data_dir} converts it, without the archives"
            )
        if target.exists():
            raise DatasetError(f"{target} is there, but holds no dataset that tfds knows; move it elsewhere")
        _require_tensorflow()  # before the archives are read for minutes
        made_from: dict[str, Any] = {}
        if builder.name == "imagenet2012":
            if manual_dir is None:
                raise DatasetError("imagenet2012 is made from two archives; name their directory with --manual-dir")
            made_from = _imagenet_preflight(builder, manual_dir, data_dir, subset, verify_md5, console)
        for path in target.parent.glob("incomplete.*"):
            console.print(f"{printable(path)} is left as it is: tfds began it, by another command")
        with _staging(data_dir, name, console) as staging:
            console.print(f"writing {printable(target)}: tfds reads everything, shuffles it, and writes it in shards")
            written = open_builder(dataset, staging)
            _download_and_prepare(written, data_dir, manual_dir)
            _compare_counts(open_builder(dataset, staging), made_from.get("images", {}))
            write_json(Path(written.data_dir) / RECORD, made_from)
            _move(staging, data_dir, Path(written.data_dir).relative_to(staging))


def convert(dataset: str, data_dir: Path, console: Console) -> None:
    """Adds array_record to a dataset that tfds prepared in another format; shards of an earlier attempt are kept.

    Raises:
        DatasetError: there is no such dataset, or it cannot be converted.
        InUse: another process prepares or converts the dataset.
    """
    builder = open_builder(dataset, data_dir)
    target = Path(builder.data_dir)
    if _prepared_already(builder, console):
        return
    if not builder.info.splits:
        raise DatasetError(f"{target} holds no dataset to convert; prepare it instead")
    imagenet.check_room(data_dir, builder.info.dataset_size)
    with _claimed(data_dir, builder.name):
        if _prepared_already(open_builder(dataset, data_dir), console):  # another process has just ended
            return
        _require_tensorflow()
        console.print(f"adding {FILE_FORMAT} to {printable(target)}, shard by shard")
        with _failures(f"{target} cannot be converted"):
            for split in builder.info.splits.values():
                _add_shards(split, builder.info.file_format)
            builder.info.add_alternative_file_format(FILE_FORMAT)
            with replacing(target / "dataset_info.json") as file:  # what tfds reads the formats from
                file.write(builder.info.as_json.encode())


def _prepared_already(builder: Any, console: Console) -> bool:
    if is_prepared(builder):
        console.print(f"{printable(builder.data_dir)} is prepared already, as {FILE_FORMAT}")
        return True
    return False


def _claimed(data_dir: Path, name: str) -> contextlib.AbstractContextManager[None]:
    """Claims a dataset in a data directory, so that only one process at a time prepares or converts it."""
    return claimed(data_dir / f".{name}{CLAIM}", f"{name} in {data_dir}", "choose another --data-dir")


@contextlib.contextmanager
def _staging(data_dir: Path, name: str, console: Console) -> Iterator[Path]:
    """Makes a new directory beside the dataset for unfinished work, and removes it afterwards. If a process is killed,
    the next one removes its directory, which it recognizes by a marker; nothing else is ever deleted."""
    staging = data_dir / f".{name}.unfinished"
    if staging.exists() and any(staging.iterdir()):
        if not (staging / STAGED).is_file():
            raise DatasetError(f"{staging} is in the way, and this program did not make it; move it elsewhere")
        console.print(f"removing {printable(staging)}, which an interrupted attempt left")
        _remove(staging)
    staging.mkdir(exist_ok=True)
    (staging / STAGED).touch()
    try:
        yield staging
    finally:
        _remove(staging)


def _remove(staging: Path) -> None:
    """Removes the directory, its marker last, so that the next process recognizes it even if this is interrupted."""
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != STAGED:
            path.unlink()
    (staging / STAGED).unlink()
    staging.rmdir()


def _move(staging: Path, data_dir: Path, dataset: Path) -> None:
    """Moves the finished dataset, NAME/VERSION or NAME/CONFIG/VERSION, to its place, where it appears whole."""
    (data_dir / dataset).parent.mkdir(parents=True, exist_ok=True)
    for notes in (staging / dataset.parts[0]).glob(".config/*"):  # they say which configuration is the default
        place = data_dir / dataset.parts[0] / ".config" / notes.name
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            notes.rename(place)
    (staging / dataset).rename(data_dir / dataset)


def _imagenet_preflight(
    builder: Any, manual_dir: Path, data_dir: Path, subset: bool, verify_md5: bool, console: Console
) -> dict[str, Any]:
    """Makes every check that is possible before the long part, and returns the results for `RECORD`."""
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
        console.print(f"{printable(path)}: {sizes[archive]:,} bytes, {images[archive]:,} images, names in order")
    if subset:
        console.print("subset: sizes, counts and MD5 are not compared with the whole archives'")
    elif not verify_md5:
        console.print("skipped: the MD5 of the archives, as --skip-md5 says")
    else:
        for archive, path in paths.items():
            with _reading(f"MD5 of {archive.name}", sizes[archive], console) as advance:
                imagenet.verify_md5(path, archive, advance)
            console.print(f"{printable(path)}: MD5 {archive.md5}")
    verified = verify_md5 and not subset
    return {
        "subset": subset,
        "images": {"train": images[imagenet.TRAIN], "validation": images[imagenet.VALIDATION]},
        "archives": {
            archive.name: {"bytes": sizes[archive], "md5": archive.md5 if verified else None} for archive in archives
        },
    }


def _compare_counts(builder: Any, expected: dict[str, int]) -> None:
    """Refuses the written dataset unless it has as many examples as the archives have images."""
    for split, images in expected.items():
        written = builder.info.splits[split].num_examples
        if written != images:
            raise DatasetError(f"tfds wrote {written:,} {split} examples of {images:,}; nothing was kept, start again")


def _download_and_prepare(builder: Any, data_dir: Path, manual_dir: Path | None) -> None:
    import tensorflow_datasets as tfds

    # downloads are kept beside the datasets; imagenet2012 needs none
    settings = tfds.download.DownloadConfig(manual_dir=manual_dir and os.fspath(manual_dir))
    with _failures(f"tfds cannot prepare {builder.info.full_name}"):
        builder.download_and_prepare(
            download_dir=os.fspath(data_dir / "downloads"), download_config=settings, file_format=FILE_FORMAT
        )


def _require_tensorflow() -> None:
    """Checks that TensorFlow is installed: tfds prepares and converts with its file system and readers."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # otherwise TensorFlow prints that it uses them
    if importlib.util.find_spec("tensorflow") is None:
        raise DatasetError(
            "preparing a dataset needs TensorFlow, training does not; "
            "pip install -c $(make -s constraints) -e '.[prepare]'"
        )


def _add_shards(split: Any, file_format: Any) -> None:
    """Writes a tfds split's shards, which are in `file_format`, as `FILE_FORMAT` too, unless they are there already.
    Each gets its name once it is whole."""
    from tensorflow_datasets.core.file_adapters import ADAPTER_FOR_FORMAT, FileFormat

    reader, writer = ADAPTER_FOR_FORMAT[file_format], ADAPTER_FOR_FORMAT[FileFormat(FILE_FORMAT)]
    names = (split.filename_template, split.filename_template.replace(filetype_suffix=FILE_FORMAT))
    for source, target in zip(*(name.sharded_filepaths(split.num_shards) for name in names), strict=True):
        if not target.exists():
            unfinished = target.with_name(f"unfinished.{target.name}")  # the next attempt overwrites it
            writer.write_examples(unfinished, enumerate(record.numpy() for record in reader.make_tf_data(source)))
            unfinished.rename(target)


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turns any exception of tfds into a `DatasetError` with the exception's first line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk or a read-only folder: `exits.exit_code` has a sentence for these
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DatasetError(f"{what}: {lines[0][:400]}") from error


@contextlib.contextmanager
def _reading(what: str, size: int, console: Console) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=size)
        yield lambda done: progress.update(task, completed=done)
