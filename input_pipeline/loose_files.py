"""Image files as a person names them on a command line: files, directories of files, and directories of classes."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from input_pipeline.examples import NO_LABEL, DatasetError, Example, canonical
from input_pipeline.folder import SUFFIXES, is_image_name
from input_pipeline.image_file import read_image_file


class LooseFiles:
    """Image files in a fixed order. As a source of examples all of them have the one label that a loader wants.

    Attributes:
        paths: the files.
        names: a name for each: the path as it was typed, or below the directory that was.
        directories: names of the directories of classes, in canonical spelling and order.
        classes: for each file the number of its directory, int32, or `NO_LABEL` if it lies in none.
    """

    name = "the images"
    class_names = ("image",)

    def __init__(self, paths: Sequence[Path], names: Sequence[str], directories: Sequence[str | None]):
        self.paths, self.names = list(paths), list(names)
        self.directories = sorted({canonical(name) for name in directories if name is not None})
        number = {name: index for index, name in enumerate(self.directories)}
        self.classes = np.array(
            [NO_LABEL if name is None else number[canonical(name)] for name in directories], np.int32
        )

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        return {"image": read_image_file(self.paths[index]), "label": 0, "id": self.names[index]}


def find(places: Sequence[Path]) -> LooseFiles:
    """Finds the image files that the places name, in the order of the places.

    A file is itself. A directory stands for the images in it, by name; if it has only directories, these are classes,
    and it stands for the images in them. Hidden files are left out, and other files that are no images are refused,
    because nobody would notice an image that is left out for its name.

    Raises:
        DatasetError: a directory has no images, or something else besides.
    """
    paths: list[Path] = []
    names: list[str] = []
    classes: list[str | None] = []
    for place in places:
        found = _within(place) if place.is_dir() else [(place, str(place), None)]
        for path, name, directory in found:
            paths.append(path)
            names.append(name)
            classes.append(directory)
    return LooseFiles(paths, names, classes)


def _within(directory: Path) -> Sequence[tuple[Path, str, str | None]]:
    """Returns (path, name, class) of each image in a directory, or in its directories of classes."""
    entries = _listed(directory)
    below = [entry for entry in entries if entry.is_dir()]
    if not entries:
        raise DatasetError(f"{directory} has no images; name another directory, or image files")
    if not below:
        return [(_image(entry), entry.name, None) for entry in entries]
    if len(below) < len(entries):
        other = next(entry for entry in entries if entry not in below)
        raise DatasetError(
            f"{directory} has directories and {other.name} beside them; a directory holds either images or one "
            "directory of images for each class"
        )
    found = [(_image(entry), f"{each.name}/{entry.name}", each.name) for each in below for entry in _listed(each)]
    if not found:
        raise DatasetError(f"the directories in {directory} have no images; name another directory, or image files")
    return found


def _listed(directory: Path) -> list[Path]:
    names = [name for name in os.listdir(directory) if not name.startswith(".")]
    return [directory / name for name in sorted(names, key=lambda name: (canonical(name), name))]


def _image(path: Path) -> Path:
    if path.is_dir() or not is_image_name(path.name):
        raise DatasetError(f"{path} is not an image file ({', '.join(SUFFIXES)}); move it elsewhere or name the images")
    return path
