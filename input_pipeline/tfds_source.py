"""tfds's image classification datasets, prepared as array_record and read by random access, without TensorFlow."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.examples import DatasetError, Example

FILE_FORMAT = "array_record"


class TfdsSource:
    """A split; images stay encoded."""

    def __init__(self, name: str, records: Any, class_names: Sequence[str]):
        self.name, self.class_names = name, class_names
        self._records = records
        self._labels: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """Reads every record the first time."""
        if self._labels is None:
            self._labels = np.array([self[index]["label"] for index in range(len(self))], np.int32)
        return self._labels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except Exception as error:  # the reader raises what its C++ side and the protocol buffers raise
            raise DatasetError(
                f"record {index} of {self.name} cannot be read ({_innermost(error)}); "
                "is the directory still there, and are its files whole?"
            ) from None
        if record["label"] is None or not record["image"]:  # what array_record makes of a place beyond the file's end
            raise DatasetError(
                f"record {index} of {self.name} cannot be read (it is empty); are the dataset's files whole?"
            )
        identity = record.get("file_name", record.get("id", index))
        identity = identity.decode() if isinstance(identity, bytes) else str(identity)
        return {"image": record["image"], "label": int(record["label"]), "id": identity}


def open_tfds(dataset: str, split: str, data_dir: str | os.PathLike | None) -> TfdsSource:
    """One split, or a slice of one, of a dataset by its name, `name/config` or `name:version`.

    Raises:
        DatasetError: no such dataset, version or split, or it is not prepared, or it has other features.
    """
    import tensorflow_datasets as tfds  # seconds of imports that the embedded digits need not pay

    builder = open_builder(dataset, data_dir)
    try:
        records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        len(records)  # opens the files
    except Exception as error:  # tfds and the reader raise what they come across
        raise DatasetError(_why_not(dataset, split, data_dir, builder, error)) from None
    return TfdsSource(f"{dataset}/{split}", records, builder.info.features["label"].names)


def _why_not(dataset: str, split: str, data_dir: str | os.PathLike | None, builder: Any, error: Exception) -> str:
    splits, command = list(builder.info.splits or ()), "python -m input_pipeline"
    where = f"{dataset} --data-dir {data_dir or builder.data_dir_root}"
    if not splits:
        return f"{dataset} is not prepared under {builder.data_dir}; {command} prepare {where} does that, once"
    if not set(re.findall(r"[A-Za-z_]\w*", split)) <= set(splits) or "parsing split" in str(error):
        return f"{dataset} has no split {split!r}; it has {', '.join(splits)}, and slices such as train[:98%]"
    if not is_prepared(builder):
        return f"{builder.data_dir} is in another format than {FILE_FORMAT}; {command} convert {where} converts it"
    return (
        f"{dataset}/{split} cannot be read from {builder.data_dir} ({_innermost(error)}); "
        f"see what {command} check {where} says, or prepare it again"
    )


def open_builder(dataset: str, data_dir: str | os.PathLike | None) -> Any:
    """tfds's builder of an image classification dataset.

    Raises:
        DatasetError: there is none of that name or version, or it has other features.
    """
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if re.split("[:/]", dataset)[0] not in known:
        nearest = difflib.get_close_matches(dataset, ["digits", *known], 3) or ["digits"]
        raise DatasetError(
            f"unknown dataset {dataset!r}; near it: {', '.join(nearest)} "
            "(or folder:PATH, idx:DIRECTORY, synthetic, or any tfds name)"
        )
    try:
        builder: Any = tfds.builder(dataset, data_dir=data_dir)
    except (ValueError, AssertionError) as error:  # an unknown version or configuration
        reason = _innermost(error).split('}": ')[-1]  # what comes before repeats the request
        raise DatasetError(f"{dataset} cannot be had from tfds: {reason}") from None
    if builder.info.splits and not is_prepared(builder) and (Path(builder.data_dir) / "features.json").exists():
        builder = tfds.builder_from_directory(builder.data_dir)  # the other one forgets formats that were added
    features = builder.info.features or {}
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise DatasetError(f"{dataset} is not an image classification dataset: its features are {list(features)}")
    return builder


def is_prepared(builder: Any) -> bool:
    """Whether all of it is there as array_record; tfds itself announces a format only when every shard is written."""
    there = [builder.info.file_format, *builder.info.alternative_file_formats]
    return bool(builder.info.splits) and any(str(getattr(kind, "value", kind)) == FILE_FORMAT for kind in there)


def _innermost(error: BaseException) -> str:
    """The first line of what was raised first; tfds wraps it in what it was doing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
