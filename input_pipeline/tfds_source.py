"""tfds's image classification datasets, prepared as array_record and read by random access, without TensorFlow."""

import difflib
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from input_pipeline.examples import DatasetError, Example, parse_slice

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
                f"record {index} of {self.name} cannot be read ({_first_line(error)}); "
                "is the directory still there, and are its files whole?"
            ) from None
        identity = record.get("file_name", record.get("id", index))
        identity = identity.decode() if isinstance(identity, bytes) else str(identity)
        return {"image": record["image"], "label": int(record["label"]), "id": identity}


def open_tfds(dataset: str, split: str, data_dir: str | os.PathLike | None) -> TfdsSource:
    """One split, or a slice of one, of a dataset by its name, `name/config` or `name:version`.

    Raises:
        DatasetError: no such dataset, version or split, or it is not prepared, or it has other features.
    """
    import tensorflow_datasets as tfds  # seconds of imports that the embedded digits need not pay

    whole, _, _ = parse_slice(split)
    builder = open_builder(dataset, data_dir)
    name = dataset if builder.builder_config is None or "/" in dataset else f"{dataset}/{builder.builder_config.name}"
    if not is_prepared(builder):
        what = f"is there, but not as {FILE_FORMAT}" if builder.info.splits else "is not prepared"
        how = "convert" if builder.info.splits else "prepare"
        raise DatasetError(
            f"{dataset} {what} under {builder.data_dir}; python -m input_pipeline {how} {dataset} --data-dir "
            f"{builder.data_dir_root} does that, once"
        )
    if whole not in builder.info.splits:
        raise DatasetError(
            f"{dataset} has no split {split!r}; it has {', '.join(builder.info.splits)}, and slices such as train[:98%]"
        )
    try:
        records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        len(records)
    except Exception as error:  # as above; a missing shard and a foreign format come as ValueError, KeyError, OSError
        raise DatasetError(
            f"{name}/{split} under {builder.data_dir} cannot be read as {FILE_FORMAT} ({_first_line(error)}); "
            f"prepare it with python -m input_pipeline prepare"
        ) from None
    return TfdsSource(f"{name}/{split}", records, builder.info.features["label"].names)


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
        builder: Any = tfds.builder(dataset, data_dir=data_dir, file_format=FILE_FORMAT)
    except (ValueError, AssertionError) as error:  # an unknown version or configuration
        raise DatasetError(f"{dataset} cannot be had from tfds: {_first_line(error)}") from None
    features = builder.info.features or {}
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise DatasetError(f"{dataset} is not an image classification dataset: its features are {list(features)}")
    return builder


def is_prepared(builder: Any) -> bool:
    """Whether all of it is there as array_record; tfds itself announces a format only when every shard is written."""
    there = [builder.info.file_format, *builder.info.alternative_file_formats]
    return bool(builder.info.splits) and any(str(getattr(kind, "value", kind)) == FILE_FORMAT for kind in there)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
