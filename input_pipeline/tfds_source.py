"""tfds's image classification datasets, prepared as array_record and read by random access, without TensorFlow."""

import difflib
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.examples import DatasetError, Example, cannot_read

FILE_FORMAT = "array_record"


class TfdsSource:
    """One split of a tfds dataset; images stay encoded.

    Attributes:
        descriptors: number of files that stay open while all of it is read: one for each shard, or part of a shard,
            which all threads share and which is opened when its first record is read.
    """

    def __init__(self, name: str, records: Any, class_names: Sequence[str], descriptors: int):
        self.name, self.class_names, self.descriptors = name, class_names, descriptors
        self._records = records
        self._labels: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """Labels of all examples, int32; the first use reads every record."""
        if self._labels is None:
            self._labels = np.array([self[index]["label"] for index in range(len(self))], np.int32)
        return self._labels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except Exception as error:  # the reader passes on exceptions of its C++ code and of protocol buffers
            refused = _system_error(error)
            if refused:
                raise cannot_read(f"record {index} of {self.name}", refused, "the dataset's directory") from None
            raise DatasetError(
                f"record {index} of {self.name} cannot be read ({_innermost(error)}); are the dataset's files whole?"
            ) from None
        if record["label"] is None or not record["image"]:  # array_record returns this beyond a truncated file's end
            raise DatasetError(
                f"record {index} of {self.name} cannot be read (it is empty); are the dataset's files whole?"
            )
        identity = record.get("file_name", record.get("id", index))
        identity = identity.decode() if isinstance(identity, bytes) else str(identity)
        return {"image": record["image"], "label": int(record["label"]), "id": identity}


def open_tfds(dataset: str, split: str, data_dir: str | os.PathLike | None) -> TfdsSource:
    """Opens a split, or a slice of one, of the dataset `name`, `name/config` or `name:version`.

    Raises:
        DatasetError: there is no such dataset, version or split, or it is not prepared, or it has other features.
    """
    import tensorflow_datasets as tfds  # this import takes seconds, which the embedded digits do not need

    builder = open_builder(dataset, data_dir)
    try:
        records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        len(records)  # this looks for the files
        splits = builder.info.splits  # empty for tfds's mock data
        shards = len(splits[split].file_instructions) if splits else 0
    except Exception as error:  # tfds and the reader raise exceptions of many kinds
        refused = _system_error(error)
        if refused:
            raise cannot_read(f"{dataset}/{split}", refused, builder.data_dir) from None
        raise DatasetError(_why_not(dataset, split, data_dir, builder, error)) from None
    return TfdsSource(f"{dataset}/{split}", records, builder.info.features["label"].names, shards)


def _why_not(dataset: str, split: str, data_dir: str | os.PathLike | None, builder: Any, error: Exception) -> str:
    splits, command = list(builder.info.splits or ()), "python -m input_pipeline"
    where = f"{dataset} --data-dir {data_dir or _root(builder)}"
    if not splits:
        others = _prepared_names(_root(builder) / builder.name)
        ask = f"; prepared there are {', '.join(others)}" if others else ""
        return f"{dataset} is not prepared under {builder.data_dir}; {command} prepare {where} does that, once{ask}"
    names = [part.split("[")[0].strip() for part in split.split("+")]
    if not set(names) <= set(splits) or "parsing split" in str(error):
        return f"{dataset} has no split {split!r}; it has {', '.join(splits)}, and slices such as train[:98%]"
    if not is_prepared(builder):
        return f"{builder.data_dir} is in another format than {FILE_FORMAT}; {command} convert {where} converts it"
    return (
        f"{dataset}/{split} cannot be read from {builder.data_dir} ({_innermost(error)}); "
        f"see what {command} check {where} says, or prepare it again"
    )


def open_builder(dataset: str, data_dir: str | os.PathLike | None) -> Any:
    """Returns tfds's builder of an image classification dataset that tfds knows or that is prepared in `data_dir`.

    A dataset of the user's own needs no code. Unless the name has a version, the newest one is taken.

    Raises:
        CannotRead: the operating system refuses to look into the directory.
        DatasetError: there is no dataset of that name or version, or it has other features.
    """
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    name = re.split("[:/]", dataset)[0]
    if name in known:
        builder = _known(dataset, data_dir)
    elif (there := _prepared_by_others(dataset, name, data_dir)) is not None:
        builder = there
    else:
        nearest = difflib.get_close_matches(dataset, ["digits", *known], 3) or ["digits"]
        raise DatasetError(
            f"unknown dataset {dataset!r}; near it: {', '.join(nearest)} "
            "(or folder:PATH, idx:DIRECTORY, synthetic, any tfds name, or one's own that lies prepared in --data-dir)"
        )
    features = builder.info.features or {}
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise DatasetError(f"{dataset} is not an image classification dataset: its features are {list(features)}")
    return builder


def _known(dataset: str, data_dir: str | os.PathLike | None) -> Any:
    """Returns the builder of a dataset whose code is in tfds."""
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(dataset, data_dir=data_dir)
    except (ValueError, AssertionError) as error:  # an unknown version or configuration
        reason = _innermost(error).split('}": ')[-1]  # the part before repeats the request
        raise DatasetError(f"{dataset} cannot be had from tfds: {reason}") from None
    if builder.info.splits and not is_prepared(builder) and (Path(builder.data_dir) / "features.json").exists():
        builder = tfds.builder_from_directory(builder.data_dir)  # the first builder ignores formats that were added
    return builder


def _prepared_by_others(dataset: str, name: str, data_dir: str | os.PathLike | None) -> Any | None:
    """Returns a builder that only reads what is prepared in DATA_DIR/NAME, or None if nothing is."""
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import file_utils

    names: list[str] = []
    for place in file_utils.list_data_dirs(given_data_dir=data_dir):
        names += _prepared_names(Path(place) / name)
    if not names:
        return None
    try:
        return read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except Exception as error:  # tfds and the reader of its descriptions raise exceptions of many kinds
        refused = _system_error(error)
        if refused:
            raise cannot_read(dataset, refused, data_dir) from None
        missing = type(error).__name__ == "DatasetNotFoundError"
        reason = "no such version or configuration" if missing else _innermost(error)
        raise DatasetError(f"{dataset} cannot be read ({reason}); prepared are {', '.join(names[:8])}") from None


def _prepared_names(directory: Path) -> list[str]:
    """Names of what is prepared in a dataset's directory, as for --dataset: NAME:VERSION or NAME/CONFIG:VERSION."""
    try:
        inside = sorted(path for path in directory.iterdir() if path.is_dir())
        versions = [path for path in inside if (path / "features.json").exists()]
        for config in inside:
            if config not in versions:
                versions += sorted(path for path in config.iterdir() if (path / "features.json").exists())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise cannot_read(error.filename, error) from None
    return [f"{path.parent.relative_to(directory.parent)}:{path.name}" for path in versions]


def _root(builder: Any) -> Path:
    """Returns the data directory of a dataset: two levels up, or three if the dataset has a configuration."""
    directory = Path(builder.data_dir)
    return directory.parents[len(Path(builder.info.full_name).parts) - 1]


def is_prepared(builder: Any) -> bool:
    """Whether the whole dataset is there as array_record; tfds lists a format only when every shard is written."""
    there = [builder.info.file_format, *builder.info.alternative_file_formats]
    return bool(builder.info.splits) and any(str(getattr(kind, "value", kind)) == FILE_FORMAT for kind in there)


def _innermost(error: BaseException) -> str:
    """Returns the first line of the original exception, which tfds wraps in exceptions about its own work."""
    return (str(_first(error)).strip() or type(error).__name__).splitlines()[0][:300]


def _first(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _system_error(error: BaseException) -> int:
    """Returns the number of the operating system's error that caused an exception, or 0 if there is none.

    array_record's reader, which is C++, writes it into its message: "open() failed: Too many open files; opening ...".
    """
    first = _first(error)
    if isinstance(first, OSError) and first.errno:
        return first.errno
    reason = re.search(r"\w\(\) failed: ([^;]+)", str(first))
    return _NUMBERS.get(reason[1].strip(), 0) if reason else 0


_NUMBERS = {os.strerror(number): number for number in errno.errorcode}
